"""How it runs: ops and their implementations, packed weights, streaming state, batches and tiles. Knows no model."""

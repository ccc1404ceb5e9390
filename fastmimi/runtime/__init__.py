"""How models run: ops and their backends, packed weights, streaming state, ragged batches, tiles. Imports no model."""

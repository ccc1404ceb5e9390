"""The `triton` backend: one file per op, each with its kernel and its launcher."""

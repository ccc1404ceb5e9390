"""The `triton` backend: one file per op, each with its kernel, its launcher and `unsupported(target)`."""

"""Tuned CPU implementations, one file per op, each with `unsupported(target)`."""

"""Triton kernels, one file per op, each with its launcher and `unsupported(target)`."""

"""The `onednn` backend: PyTorch's oneDNN operations on prepacked weights, one file per op.

It runs on CPUs for which the native kernels of the `cpu` backend are not built.
"""

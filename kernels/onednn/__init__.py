"""CPU implementations in PyTorch's own operations over weights laid out once, one file per op."""

"""Implementations of the ops that are faster than the reference. Imported only as `fastmimi.kernels`."""

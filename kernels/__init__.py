"""Fast implementations of the ops, one package per backend. Import this package as `fastmimi.kernels`."""

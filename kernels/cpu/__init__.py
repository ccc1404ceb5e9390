"""The `cpu` backend: native CPU kernels (C++ in native/), one file per op."""

"""Shared by tests and benchmarks: tolerances, test models, workloads of the ops, and the cost model."""

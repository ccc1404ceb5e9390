"""What tests and benchmarks share: tolerances, workloads, costs."""

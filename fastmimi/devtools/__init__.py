"""For tests, benchmarks and debugging: tolerances, test models, workloads, the cost model, comparison by layer."""

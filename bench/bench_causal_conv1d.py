"""causal_conv1d by each implementation that runs here, at the models' shapes."""

import pytest

from fastmimi import dispatch, workloads


@pytest.mark.parametrize("workload", workloads.of("causal_conv1d"), ids=str)
@pytest.mark.parametrize("candidate", dispatch.CANDIDATES)
def bench_causal_conv1d(time_op, workload, candidate):
    time_op(workload, candidate)

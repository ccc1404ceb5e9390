"""window_attention by each implementation that runs here, at the models' shapes."""

import pytest

from fastmimi import dispatch, workloads


@pytest.mark.parametrize("workload", workloads.of("window_attention"), ids=str)
@pytest.mark.parametrize("candidate", dispatch.CANDIDATES)
def bench_window_attention(time_op, workload, candidate):
    time_op(workload, candidate)

"""rvq_decode by each implementation that runs here, at the models' shapes."""

import pytest

from fastmimi import dispatch, workloads


@pytest.mark.parametrize("workload", workloads.of("rvq_decode"), ids=str)
@pytest.mark.parametrize("candidate", dispatch.CANDIDATES)
def bench_rvq_decode(time_op, workload, candidate):
    time_op(workload, candidate)

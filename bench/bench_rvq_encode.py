"""rvq_encode by each implementation that runs here, at the models' shapes."""

import pytest

from fastmimi import dispatch, workloads


@pytest.mark.parametrize("workload", workloads.of("rvq_encode"), ids=str)
@pytest.mark.parametrize("candidate", dispatch.CANDIDATES)
def bench_rvq_encode(time_op, workload, candidate):
    time_op(workload, candidate)

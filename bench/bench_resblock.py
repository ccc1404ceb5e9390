"""resblock by each implementation that runs here, at the models' shapes."""

import pytest

from fastmimi import dispatch, workloads


@pytest.mark.parametrize("workload", workloads.of("resblock"), ids=str)
@pytest.mark.parametrize("candidate", dispatch.CANDIDATES)
def bench_resblock(time_op, workload, candidate):
    time_op(workload, candidate)

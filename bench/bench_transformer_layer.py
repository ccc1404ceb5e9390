"""transformer_layer by each implementation that runs here, at the models' shapes."""

import pytest

from fastmimi import dispatch, workloads


@pytest.mark.parametrize("workload", workloads.of("transformer_layer"), ids=str)
@pytest.mark.parametrize("candidate", dispatch.CANDIDATES)
def bench_transformer_layer(time_op, workload, candidate):
    time_op(workload, candidate)

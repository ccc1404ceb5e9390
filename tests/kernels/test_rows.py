"""Streaming ops on rows of a pool's state: bit for bit what they do on those rows alone; no other row changes."""

import pytest
import torch

from fastmimi.devtools.testing import noise
from fastmimi.runtime import dispatch
from fastmimi.runtime.ops import OPS

ROWS = [4, 0, 6, 2, 2]  # of seven; row 2, which is not active, is named twice
MANY = [(11 * i) % 47 for i in range(40)]  # more than fit in one tile


def history_state(length, channels, pool):
    return {"history": noise(pool, length, channels, seed=9), "first": torch.arange(pool) % 3 == 0}


def ring_state(heads, window, dim, pool):
    rings = {f"cache_{kind}": noise(pool, heads, window, dim, seed=seed) for seed, kind in enumerate("kv")}
    return {**rings, "offset": torch.arange(pool) * 3}


def conv(batch, pool):
    x, weight = noise(batch, 6, 5), noise(8, 6, 3)
    return "causal_conv1d", (x, weight, noise(8)), {"pad": (2, 0), "pad_mode": "replicate"}, history_state(2, 6, pool)


def split_conv(batch, pool):
    """Of a long sum, which few rows divide among programs of a GPU."""
    x, weight = noise(batch, 64, 2), noise(32, 64, 16)
    return "causal_conv1d", (x, weight, None), {"pad": (15, 0), "pre": "elu"}, history_state(15, 64, pool)


def grouped_conv(batch, pool):
    x, weight = noise(batch, 6, 5), noise(8, 3, 3)
    return "causal_conv1d", (x, weight, None), {"pad": (2, 0), "groups": 2}, history_state(2, 6, pool)


def upsample(batch, pool):
    x, weight = noise(batch, 6, 3), noise(6, 5, 4)
    return "causal_conv_transpose1d", (x, weight, noise(5)), {"stride": 2}, history_state(1, 6, pool)


def depthwise(batch, pool):
    x, weight = noise(batch, 6, 3), noise(6, 1, 4)
    return "causal_conv_transpose1d", (x, weight, None), {"stride": 2, "groups": 6}, history_state(1, 6, pool)


def resblock(batch, pool):
    weights = (noise(4, 8, 3), noise(4), noise(8, 4, 1), noise(8))
    return "resblock", (noise(batch, 8, 5), *weights), {"pad": (4, 0), "dilation": 2}, history_state(4, 8, pool)


def attention(batch, pool, length=2):
    q, k = noise(batch, 4, length, 8, seed=1), noise(batch, 2, length, 8, seed=2)
    return "window_attention", (q, k, k, noise(4)), {"window": 5}, ring_state(2, 5, 8, pool)


def long_attention(batch, pool):
    return attention(batch, pool, length=30)


def layer(batch, pool):
    norm, square = noise(8), noise(8, 8)
    hidden = (noise(12, 8), noise(8, 12))
    tensors = (noise(batch, 2, 8), norm, None, *[square] * 4, None, norm, None, *hidden, None, noise(4))
    return "transformer_layer", tensors, {"window": 5, "eps": 1e-5}, ring_state(1, 5, 8, pool)


CASES = [conv, split_conv, grouped_conv, upsample, depthwise, resblock, attention, long_attention, layer]


@pytest.fixture(params=["reference", "cpu", "onednn", pytest.param("triton", marks=pytest.mark.kernels)])
def backend(request):
    on = "cuda" if request.param == "triton" and torch.cuda.is_available() else "cpu"
    if (why := dispatch.why_not(request.param, "causal_conv1d", dispatch.Target(on, torch.float32))) is not None:
        pytest.skip(why)
    return request.param


@pytest.mark.parametrize("rows", [ROWS, MANY], ids=["few", "many"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_rows_of_a_pool(backend, case, rows):
    with torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"):
        rows, pool = torch.tensor(rows), max(rows) + 1
        name, tensors, options, state = case(len(rows), pool)
        state["active"] = torch.arange(pool) % 4 != 2
        gathered = {key: tensor[rows] for key, tensor in state.items()}
        before = {key: tensor.clone() for key, tensor in state.items()}
    op = dispatch.implementation(name, backend)
    alone = op(*tensors, **options, **gathered)
    assert torch.equal(op(*tensors, **options, **state, rows=rows), alone)
    for key, tensor in state.items():
        expected = before[key]
        expected[rows] = gathered[key]
        assert torch.equal(tensor, expected), key
    changed = [key for key in state if not torch.equal(state[key], case(len(rows), pool)[3].get(key, state[key]))]
    assert set(changed) <= {"history", "cache_k", "cache_v"} and changed, "the state moved on"


def test_every_streaming_op_is_tested():
    assert {case(2, 3)[0] for case in CASES} == {name for name, op in OPS.items() if op.state}


@pytest.mark.parametrize("rows, error, sentence", [
    (torch.tensor([0, 3]), IndexError, r"rows must lie in \[0, 3\), got \[0, 3\]"),
    (torch.tensor([-1, 0]), IndexError, r"rows must lie in \[0, 3\), got \[-1, 0\]"),
    (torch.tensor([0]), ValueError, r"rows must be int64, contiguous and \(2,\), got torch.int64 \(1,\)"),
    (torch.tensor([0, 1], dtype=torch.int32), ValueError, r"rows must be int64, .* got torch.int32 \(2,\)"),
])  # fmt: skip
def test_rows_that_do_not_fit_are_refused(backend, rows, error, sentence):
    if backend == "reference":
        pytest.skip("PyTorch checks the indices of the reference")
    for case in (conv, attention):
        name, tensors, options, state = case(2, 3)
        with pytest.raises(error, match=sentence):
            dispatch.implementation(name, backend)(
                *tensors, **options, **state, active=torch.ones(3, dtype=torch.bool), rows=rows
            )

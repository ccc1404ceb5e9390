"""The ops that are traced with open lengths (reference/_open_lengths.py) give the reference's results."""

from __future__ import annotations

import pytest
import torch

from fastmimi.devtools.testing import noise, relative_error
from fastmimi.reference import _open_lengths as ops
from fastmimi.reference.rvq_decode import rvq_decode
from fastmimi.reference.rvq_encode import rvq_encode
from fastmimi.reference.window_attention import window_attention

WINDOW, DIM = 20, 8
INV_FREQ = 0.5 ** torch.arange(DIM // 2)


def heads(length: int, kv_heads: int = 4) -> list[torch.Tensor]:
    """q, k and v, [2, heads, length, DIM]."""
    return [noise(2, count, length, DIM, seed=i, scale=1.0) for i, count in enumerate((4, kv_heads, kv_heads))]


@pytest.mark.parametrize("length", [1, 2, 19, 63, 64, 65, 200])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_offline(length, kv_heads):
    inputs, options = heads(length, kv_heads), {"window": WINDOW, "rope_scale": 1.25}
    want = window_attention(*inputs, INV_FREQ, **options)
    assert relative_error(ops.window_attention(*inputs, INV_FREQ, **options), want) < 1e-6


@pytest.mark.parametrize("chunks", [(1,) * 50, (50,), (3, 1, 30, 16)], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_in_chunks(chunks, kv_heads):
    q, k, v = heads(sum(chunks), kv_heads)
    want = window_attention(q, k, v, INV_FREQ, window=WINDOW)
    state = {name: torch.zeros(2, kv_heads, WINDOW, DIM) for name in ("cache_k", "cache_v")}
    offset, done = torch.zeros(2, dtype=torch.int64), []
    for parts in zip(*(x.split(chunks, dim=2) for x in (q, k, v)), strict=True):
        done.append(ops.window_attention(*parts, INV_FREQ, window=WINDOW, offset=offset, **state))
        offset += parts[0].shape[2]
    assert relative_error(torch.cat(done, dim=2), want) < 1e-6


def test_attention_of_a_stream_that_starts_anew():
    """What its caches still hold from before is not seen."""
    inputs = heads(3)
    state = {name: noise(2, 4, WINDOW, DIM, seed=9) for name in ("cache_k", "cache_v")}
    got = ops.window_attention(*inputs, INV_FREQ, window=WINDOW, offset=torch.tensor([0, 0]), **state)
    assert relative_error(got, window_attention(*inputs, INV_FREQ, window=WINDOW)) < 1e-6


def test_search_and_lookup():
    x, codebooks = noise(50, 16), noise(5, 32, 16, seed=1)
    codes = ops.rvq_encode(x, codebooks)
    assert torch.equal(codes, rvq_encode(x, codebooks))
    for levels in (1, 3, 5):
        want = rvq_decode(codes[:levels], codebooks[:levels])
        assert relative_error(ops.rvq_decode(codes[:levels], codebooks), want) < 1e-6
    assert ops.rvq_decode(codes, codebooks, dtype=torch.float64).dtype == torch.float64

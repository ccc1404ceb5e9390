"""window_attention, each implementation, against a dense fp64 softmax with explicit rotations and masks."""

import pytest
import torch

from fastmimi.devtools.testing import assert_as_exact, noise, relative_error
from fastmimi.reference import window_attention as module
from fastmimi.reference.window_attention import window_attention as reference


def frequencies(dim=8):
    return 1.0 / (10_000.0 ** (torch.arange(0, dim, 2) / dim))


def case(length, heads=4, kv_heads=2, batch=2):
    q = noise(batch, heads, length, 8, seed=1, scale=1.0)
    k, v = (noise(batch, kv_heads, length, 8, seed=s, scale=1.0) for s in (2, 3))
    return q, k, v


def dense(q, k, v, window, interleaved=False, scale=1.0):
    """Attention in fp64, one query at a time; rotation is a complex product, by angles computed in fp32."""
    pair = (lambda x: (x[..., 0::2], x[..., 1::2])) if interleaved else (lambda x: x.double().chunk(2, dim=-1))

    def rotated(x):
        real, imaginary = pair(x.double())
        angle = (torch.arange(x.shape[2])[:, None] * frequencies()).double()
        return torch.complex(real.contiguous(), imaginary.contiguous()) * torch.polar(
            torch.full_like(angle, scale), angle
        )

    q, k, v = rotated(q), rotated(k).repeat_interleave(2, dim=1), v.double().repeat_interleave(2, dim=1)
    rows = []
    for i in range(q.shape[2]):
        keys = slice(max(0, i - window + 1), i + 1)
        scores = (q[:, :, i, None].conj() * k[:, :, keys]).real.sum(-1) / 8**0.5
        rows.append((scores.softmax(-1)[..., None] * v[:, :, keys]).sum(2))
    return torch.stack(rows, dim=2)


@pytest.mark.parametrize("length, window", [(1, 5), (4, 5), (23, 5), (23, 1), (23, 100)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_whole(op, length, window, interleaved):
    q, k, v = case(length)
    mine = op(q, k, v, frequencies(), window=window, interleaved=interleaved, rope_scale=1.1)
    assert relative_error(mine, dense(q, k, v, window, interleaved, scale=1.1)) < 1e-6


def test_blocks_equal_one_block(monkeypatch):
    q, k, v = case(50)
    whole = reference(q, k, v, frequencies(), window=7)
    monkeypatch.setattr(module, "BLOCK", 8)
    assert relative_error(reference(q, k, v, frequencies(), window=7), whole) < 1e-6


@pytest.mark.parametrize("window", [1, 5, 30])
@pytest.mark.parametrize("sizes", [[1] * 40, [3, 1, 7, 29], [40]])
def test_chunks_equal_the_whole_and_masked_rows_stay(op, window, sizes):
    q, k, v = case(40, batch=3)
    whole = op(q, k, v, frequencies(), window=window)
    cache_k, cache_v = (torch.full((3, 2, window, 8), float("nan")) for _ in range(2))
    cache_k[2] = cache_v[2] = 7.0
    cache_k[:2], cache_v[:2] = 0.0, 0.0
    offset, active = torch.zeros(3, dtype=torch.int64), torch.tensor([True, True, False])
    outputs = []
    for qs, ks, vs in zip(*(t.split(sizes, dim=2) for t in (q, k, v)), strict=True):
        outputs.append(
            op(qs, ks, vs, frequencies(), window=window, offset=offset, cache_k=cache_k, cache_v=cache_v,
                             active=active)
        )  # fmt: skip
        offset += active * qs.shape[2]
    assert relative_error(torch.cat(outputs, dim=2)[:2], whole[:2]) < 1e-6
    assert (cache_k[2] == 7.0).all() and (cache_v[2] == 7.0).all()


def test_a_window_longer_than_a_block_of_queries(op):
    """The second block of queries of a chunk still attends to positions in the ring."""
    q, k, v = case(600, batch=1)
    cache_k, cache_v = torch.zeros(1, 2, 290, 8), torch.zeros(1, 2, 290, 8)
    state = {"cache_k": cache_k, "cache_v": cache_v, "active": torch.tensor([True])}
    outputs = [
        op(*(t[:, :, chunk] for t in (q, k, v)), frequencies(), window=290, offset=torch.tensor([start]), **state)
        for start, chunk in ((0, slice(0, 299)), (299, slice(299, 600)))
    ]
    assert relative_error(torch.cat(outputs, dim=2), dense(q, k, v, 290)) < 1e-6


def test_rows_at_their_own_positions(op):
    """A row that joins later attends to its own past only."""
    q, k, v = case(9)
    cache_k, cache_v = torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 5, 8)
    offset = torch.zeros(2, dtype=torch.int64)
    both = torch.tensor([True, True])
    state = {"offset": offset, "cache_k": cache_k, "cache_v": cache_v}
    op(q[:, :, :4], k[:, :, :4], v[:, :, :4], frequencies(), window=5, active=both, **state)
    offset[0] += 4  # row 1 is reset: its offset stays 0, and what its ring holds is ignored
    later = op(q[:, :, 4:], k[:, :, 4:], v[:, :, 4:], frequencies(), window=5, active=both, **state)
    assert relative_error(later[:1], op(q, k, v, frequencies(), window=5)[:1, :, 4:]) < 1e-6
    alone = op(q[:, :, 4:], k[:, :, 4:], v[:, :, 4:], frequencies(), window=5)
    assert relative_error(later[1:], alone[1:]) < 1e-6


def test_half_precision_rotates_by_fp32_angles(op):
    """At position 5000, bf16 angles would be off by whole turns."""
    q, k, v = (t.bfloat16() for t in case(1, batch=1))
    state = {"cache_k": torch.zeros(1, 2, 4, 8, dtype=torch.bfloat16), "active": torch.tensor([True])}
    op(q, k, v, frequencies(), window=4, offset=torch.tensor([5000]), cache_v=state["cache_k"].clone(), **state)
    angle = 5000 * frequencies().double()
    a, b = k[0, :, 0].double().chunk(2, dim=-1)
    truth = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)
    assert relative_error(state["cache_k"][0, :, 5000 % 4], truth) < 2**-7


@pytest.mark.parametrize(
    "heads, kv_heads, dim, length", [(8, 8, 64, 300), (16, 16, 64, 40), (2, 1, 128, 70), (2, 2, 16, 33), (2, 2, 12, 9)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_models_shapes(op, heads, kv_heads, dim, length, dtype, interleaved):
    """Inputs have the strides that projections leave: [B, T, H, D] in memory."""
    q = noise(1, length, heads, dim, seed=1, scale=1.0).to(dtype).transpose(1, 2)
    k, v = (noise(1, length, kv_heads, dim, seed=s, scale=1.0).to(dtype).transpose(1, 2) for s in (2, 3))
    options = {"window": 250, "interleaved": interleaved, "longest": max(dim, min(length, 250)), "fixed": (3,)}
    assert_as_exact(op, reference, (q, k, v, frequencies(dim)), **options)


@pytest.mark.parametrize("position", [0, 5_000, 100_000, 20_000_001, 2_000_000_011])
def test_rotation_at_large_positions(op, position):
    q = noise(1, 1, 1, 64, scale=1.0)
    rings = []
    for f in (op, reference):
        rings.append(torch.zeros(1, 1, 4, 64))
        state = {"offset": torch.tensor([position]), "active": torch.tensor([True])}
        f(q, q, q, frequencies(64), window=4, cache_k=rings[-1], cache_v=torch.zeros(1, 1, 4, 64), **state)
    assert relative_error(*rings) < 1e-6


def test_ring_entries_from_before_a_reset_are_ignored(op):
    q, k, v = case(3)
    state = {"cache_k": torch.full((2, 2, 5, 8), 1e4), "cache_v": torch.full((2, 2, 5, 8), 1e4)}
    state |= {"offset": torch.zeros(2, dtype=torch.int64), "active": torch.tensor([True, True])}
    mine = op(q, k, v, frequencies(), window=5, **state)
    assert relative_error(mine, op(q, k, v, frequencies(), window=5)) < 1e-6


def test_a_key_that_is_nan_shows_as_long_as_it_is_in_the_window(op):
    """At position 7 it is still in the ring, masked: onednn multiplies it by 0."""
    q, k, v = case(16, batch=1)
    k[:, :, 2] = float("nan")
    rings = {"cache_k": torch.zeros(1, 2, 5, 8), "cache_v": torch.zeros(1, 2, 5, 8), "active": torch.tensor([True])}
    parts, at = [], 0
    for size in [1] * 8 + [8]:
        new = (t[:, :, at : at + size] for t in (q, k, v))
        parts.append(op(*new, frequencies(), window=5, offset=torch.tensor([at]), **rings))
        at += size
    seen = torch.cat(parts, dim=2).isnan().any(-1).any(1)[0].tolist()
    assert seen[:7] == [False] * 2 + [True] * 5 and not any(seen[8:])


def test_fp32_rings_under_bf16_autocast(op):
    """Under autocast, q, k and v are bf16 and the rings keep the model's dtype, fp32."""
    q, k, v = (t.bfloat16() for t in case(9))
    rings = {"cache_k": torch.zeros(2, 2, 5, 8), "cache_v": torch.zeros(2, 2, 5, 8)}
    state = {"active": torch.tensor([True, True]), **rings}
    with torch.autocast(q.device.type, torch.bfloat16):
        for chunk in (slice(0, 4), slice(4, 9)):
            offset = torch.full((2,), chunk.start)
            y = op(q[:, :, chunk], k[:, :, chunk], v[:, :, chunk], frequencies(), window=5, offset=offset, **state)
    assert relative_error(y, reference(q.float(), k.float(), v.float(), frequencies(), window=5)[:, :, 4:]) < 0.02


def test_gradients_match_the_reference(op):
    inputs = [t.requires_grad_() for t in case(9)]
    grads = []
    for f in (op, reference):
        y = f(*inputs, frequencies(), window=4)
        grads.append(torch.autograd.grad(y, inputs, noise(*y.shape, seed=5)))
    for mine, theirs in zip(*grads, strict=True):
        assert relative_error(mine, theirs) < 1e-5


def test_dropout_changes_the_output(op):
    q, k, v = case(20)
    torch.manual_seed(0)
    dropped = op(q, k, v, frequencies(), window=5, dropout=0.5)
    assert relative_error(dropped, op(q, k, v, frequencies(), window=5)) > 0.1


def test_gradients_of_the_reference():
    inputs = [t.double().requires_grad_() for t in case(6, batch=1)]
    assert torch.autograd.gradcheck(lambda *a: reference(*a, frequencies(), window=3), inputs)

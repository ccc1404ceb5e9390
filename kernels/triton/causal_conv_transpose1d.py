"""Triton kernels for `causal_conv_transpose1d`: activation, transposed convolution, overlap-add, bias, trim at once.

In channels-last memory a transposed convolution with kernel K and stride s is a causal convolution with stride 1,
m = ceil(K / s) taps and s * C_out outputs (j, o), without overlap-add:

    y[b, t * s + j, o] = bias[o] + sum_{i < m, c} w[c, o, i * s + j] * pre(x)[b, t - i, c]

Offline, the kernel of `causal_conv1d` is launched with weights packed as [s * C_out, C, m]. In Mimi, K = 2 s and m = 2.

When streaming, the first K - s outputs also get the `overlap` of the previous call, and the m - 1 rows of the
convolution after the end of the input become the overlap for the next call. Those rows are placed first in the order of
rows, so that they are in the same tile as the first outputs: the program that writes an overlap is the one that has
read it.

Depthwise convolutions (the upsampling to 25 Hz) have no reduction over channels and use a kernel of their own.
"""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ...runtime import layout, packing
from .._common import as_convolution, conv_transpose_length, taps_of
from . import _launch
from ._conv import LENGTHS, activate, blocks, convolve, rows_of, segments
from .causal_conv1d import causal_conv1d


@triton.jit
def tail_first_rows(tile, B, T, tail_rows, seg, per_tile, BLOCK_T: tl.constexpr):
    """`rows_of` for T + tail_rows times, in the order T, ..., T + tail_rows - 1, 0, ..., T - 1: the tail first."""
    b, i, m_row, _ = rows_of(tile, B, T + tail_rows, seg, per_tile, BLOCK_T)
    return b, tl.where(i < tail_rows, i + T, i - tail_rows), m_row


@triton.jit
def add_and_keep_overlap(acc, p_overlap, p_active, b, m_row, p, m, T_out, tail, channel, so_b):
    """Add the overlap to outputs p; for active rows, keep the outputs from T_out on as the next overlap."""
    p_row = p_overlap + b * so_b + channel * tail
    acc += tl.load(p_row + p, mask=m & (p < tail), other=0.0).to(tl.float32)
    tl.debug_barrier()  # everything is read before any of it is overwritten
    active = tl.load(p_active + b, mask=m_row, other=0) != 0  # [BLOCK_T, 1]
    m = m & active & (p >= T_out) & (p < T_out + tail)
    tl.store(p_row + (p - T_out), acc.to(p_overlap.dtype.element_ty), mask=m)
    return acc


@triton.jit(do_not_specialize=LENGTHS)
def causal_conv_transpose1d_step_kernel(
    p_x, p_w, p_bias, p_overlap, p_active, p_y,
    B, T, C, O, stride, taps, tail, seg, per_tile, sx_b, sx_t, so_b, sy_b,
    PRE: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, TAPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of streams. Column n of the GEMM is output channel o = n % O of output j = n // O, j < stride."""
    columns = tl.cdiv(stride * O, BLOCK_O)
    n = (tl.program_id(0) % columns) * BLOCK_O + tl.arange(0, BLOCK_O)
    b, t, m_row = tail_first_rows(tl.program_id(0) // columns, B, T, taps - 1, seg, per_tile, BLOCK_T)
    acc = convolve(
        p_x, p_x, p_w, b, t, m_row, m_row, n,
        T, C, stride * O, taps, 1, 1, taps - 1, T, sx_b, sx_t, 0,
        PRE, "constant", False, BLOCK_T, BLOCK_O, BLOCK_C, TAPS, PRECISION,
    )  # fmt: skip
    m = m_row[:, None] & (n < stride * O)[None, :]
    p = t[:, None] * stride + (n // O)[None, :]
    o = (n % O)[None, :]
    acc = add_and_keep_overlap(acc, p_overlap, p_active, b[:, None], m_row[:, None], p, m, T * stride, tail, o, so_b)
    if BIAS:
        acc += tl.load(p_bias + o, mask=(n < stride * O)[None, :], other=0.0).to(tl.float32)
    p_out = p_y + (b * sy_b)[:, None] + p.to(tl.int64) * O + o
    tl.store(p_out, acc.to(p_y.dtype.element_ty), mask=m & (p < T * stride))


@triton.jit(do_not_specialize=LENGTHS)
def causal_conv_transpose1d_depthwise_kernel(
    p_x, p_w, p_bias, p_overlap, p_active, p_y,
    B, T, C, K, stride, taps, tail, T_out, left, seg, per_tile, sx_b, sx_t, so_b, sy_b, sy_t,
    PRE: tl.constexpr, BIAS: tl.constexpr, STREAM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Depthwise: outputs j < stride of each row are sums over taps only. Offline, `left` outputs are trimmed."""
    dtype: tl.constexpr = p_y.dtype.element_ty
    columns = tl.cdiv(C, BLOCK_C)
    c = (tl.program_id(0) % columns) * BLOCK_C + tl.arange(0, BLOCK_C)
    b, t, m_row = tail_first_rows(tl.program_id(0) // columns, B, T, taps - 1, seg, per_tile, BLOCK_T)
    m_c = c < C
    m = m_row[:, None] & m_c[None, :]
    for j in range(stride):
        acc = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
        for i in range(taps):
            m_t = m_row & (t - i >= 0) & (t - i < T)
            p_rows = p_x + b * sx_b + (t - i).to(tl.int64) * sx_t
            b_x = tl.load(p_rows[:, None] + c[None, :], mask=m_t[:, None] & m_c[None, :], other=0.0).to(tl.float32)
            b_x = activate(b_x, PRE, dtype == tl.float32)
            k = tl.full([BLOCK_C], i * stride + j, tl.int32)  # Triton 3.9's interpreter refuses `m_c &` a scalar
            acc += b_x * tl.load(p_w + c * K + k, mask=m_c & (k < K), other=0.0).to(tl.float32)[None, :]
        p = (t * stride + j)[:, None]
        if STREAM:
            acc = add_and_keep_overlap(
                acc, p_overlap, p_active, b[:, None], m_row[:, None], p, m, T_out, tail, c[None, :], so_b
            )
        if BIAS:
            acc += tl.load(p_bias + c, mask=m_c, other=0.0).to(tl.float32)[None, :]
        p = p - left
        p_out = p_y + (b * sy_b)[:, None] + p.to(tl.int64) * sy_t + c[None, :]
        tl.store(p_out, acc.to(dtype), mask=m & (p >= 0) & (p < T_out))


def causal_conv_transpose1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, groups: int = 1,
    trim: tuple[int, int] = (0, 0), pre: str = "none", scales: Tensor | None = None, overlap: Tensor | None = None,
    active: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As in the reference; the result is channels-last."""
    total = conv_transpose_length(x, weight, bias, stride, groups, trim, overlap)
    channels, per_group = weight.shape[:2]
    x = layout.channels_last(x)
    if not total or not len(x):
        return layout.empty_channels_last(x, per_group * groups, total)
    if groups == channels and per_group == 1:
        return _depthwise(x, weight, bias, stride, trim, pre, overlap, active, total)
    if groups == 1:
        return _ungrouped(x, weight, bias, stride, trim, pre, overlap, active, total)
    y = layout.empty_channels_last(x, per_group * groups, total)
    for g in range(groups):
        px, pw, pb, po = (
            t if t is None else t.chunk(groups, dim)[g] for t, dim in ((x, 1), (weight, 0), (bias, 0), (overlap, 1))
        )
        y[:, g * per_group : (g + 1) * per_group] = _ungrouped(px, pw, pb, stride, trim, pre, po, active, total)
    return y


def _ungrouped(x, weight, bias, stride, trim, pre, overlap, active, total):
    """A convolution without groups, offline or streaming, with `total` outputs."""
    if overlap is not None:
        return _step(x, weight, bias, stride, pre, overlap, active)
    (batch, _, length), (_, out, kernel) = x.shape, weight.shape
    # as many rows, of s outputs each, as contain the last output that is kept
    rows = triton.cdiv(trim[0] + total, stride)
    taps, packed = taps_of(kernel, stride), _pack(weight, stride)
    repeated_bias = None if bias is None else packing.packed(bias, f"x{stride}", lambda v: v.repeat(stride))
    y = causal_conv1d(x, packed, repeated_bias, pad=(taps - 1, rows - length), pre=pre)
    y = y.transpose(1, 2).reshape(batch, rows * stride, out)
    return y[:, trim[0] : trim[0] + total].contiguous().transpose(1, 2)  # copies if trimmed


def _pack(weight: Tensor, stride: int) -> Tensor:
    return packing.packed(weight, f"stride {stride}", lambda w: as_convolution(w, stride))


def _step(x, weight, bias, stride, pre, overlap, active):
    """One call of streams, ungrouped."""
    (batch, channels, length), (_, out, kernel) = x.shape, weight.shape
    taps = taps_of(kernel, stride)
    y = layout.empty_channels_last(x, out, length * stride)
    tile = blocks(batch * (length + taps - 1), channels, stride * out, taps, x)
    for name in ("BLOCK_T", "BLOCK_O"):
        tile[name] = min(tile[name], 64)  # the addresses of the overlap take registers
    seg, per_tile, groups, tiles = _tiles(batch, length + taps - 1, taps, tile)
    packed = _pack(weight, stride)
    by_taps = packing.packed(packed, "by_taps", lambda w: w.permute(0, 2, 1).contiguous())
    _launch.launch(
        "causal_conv_transpose1d", causal_conv_transpose1d_step_kernel,
        (groups * tiles * triton.cdiv(stride * out, tile["BLOCK_O"]),),
        x, by_taps, weight if bias is None else bias, overlap, active, y,
        batch, length, channels, out, stride, taps, kernel - stride, seg, per_tile,
        x.stride(0), x.stride(2), overlap.stride(0), y.stride(0),
        PRE=pre, BIAS=bias is not None, PRECISION=_launch.precision(x), **tile,
    )  # fmt: skip
    return y


def _depthwise(x, weight, bias, stride, trim, pre, overlap, active, total):
    """A depthwise convolution, offline or streaming, with `total` outputs."""
    kernel = weight.shape[2]
    taps, stream = taps_of(kernel, stride), overlap is not None
    missing = 0 if stream else triton.cdiv(trim[0] + total, stride) - (x.shape[2] + taps - 1)
    if missing > 0:  # outputs that no input contributes to: the stride is longer than the kernel
        x = layout.channels_last(F.pad(x, (0, missing)))
    batch, channels, length = x.shape
    y = layout.empty_channels_last(x, channels, total)
    tile = {"BLOCK_T": 16, "BLOCK_C": min(64, triton.next_power_of_2(channels)), "num_warps": 4}
    seg, per_tile, groups, tiles = _tiles(batch, length + taps - 1, taps, tile)
    o, a = (overlap, active) if stream else (x, x)
    _launch.launch(
        "causal_conv_transpose1d", causal_conv_transpose1d_depthwise_kernel,
        (groups * tiles * triton.cdiv(channels, tile["BLOCK_C"]),),
        x, weight.contiguous(), weight if bias is None else bias, o, a, y,
        batch, length, channels, kernel, stride, taps, kernel - stride, total, 0 if stream else trim[0], seg, per_tile,
        x.stride(0), x.stride(2), o.stride(0), y.stride(0), y.stride(2),
        PRE=pre, BIAS=bias is not None, STREAM=stream, **tile,
    )  # fmt: skip
    return y


def _tiles(batch, rows, taps, tile):
    """`segments`, with tiles long enough to hold both the rows of the overlap and the rows that read it."""
    tile["BLOCK_T"] = max(tile["BLOCK_T"], triton.next_power_of_2(2 * (taps - 1)))
    return segments(batch, rows, tile["BLOCK_T"])

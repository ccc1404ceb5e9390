"""Triton kernels for `causal_conv_transpose1d`: activation, transposed convolution, bias and trim in one launch.

In channels-last memory a transposed convolution with kernel K and stride s is a causal convolution with stride 1,
m = ceil(K / s) taps and s * C_out outputs (j, o), without overlap-add:

    y[b, t * s + j, o] = bias[o] + sum_{i < m, c} w[c, o, i * s + j] * pre(x)[b, t - i, c]

The kernel of `causal_conv1d` is launched with weights packed as [s * C_out, m, C]. In Mimi, K = 2 s and m = 2. Streams
keep the last m - 1 inputs, as for any convolution.

Depthwise convolutions (the upsampling to 25 Hz) have no reduction over channels and use a kernel of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...runtime import layout, packing
from .._common import as_convolution, conv_transpose_length, taps_of
from . import _launch
from ._conv import LENGTHS, activate, channels_of, load_either, rows_of, segments, state_rows
from .causal_conv1d import launch_group


@triton.jit(do_not_specialize=[*LENGTHS, "tiles"])
def causal_conv_transpose1d_depthwise_kernel(
    p_x, p_w, p_bias, p_history, p_active, p_state_rows, p_y,
    B, T, T_out, steps, C, K, stride, taps, left, seg, per_tile, tiles, sx_b, sx_t, sh_b, sh_t, sy_b, sy_t,
    PRE: tl.constexpr, BIAS: tl.constexpr, STREAM: tl.constexpr, ROWS: tl.constexpr, SELECT: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Depthwise: outputs j < stride of each row are sums over taps only. Offline, `left` outputs are trimmed.

    A program computes `tiles` tiles; when streaming, all of a group, so that it alone reads and writes their history.
    """
    dtype: tl.constexpr = p_y.dtype.element_ty
    columns = tl.cdiv(C, BLOCK_C)
    c = (tl.program_id(0) % columns) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = c < C
    first_tile = tl.program_id(0) // columns * tiles
    for tile in range(first_tile, first_tile + tiles):
        b, t, m_row, _ = rows_of(tile, B, steps, seg, per_tile, 0, SHARED, BLOCK_T)
        state = state_rows(p_state_rows, b, m_row, ROWS, SHARED)
        if SHARED:
            b, state = b[:, None], state[:, None]
        m = m_row[:, None] & m_c[None, :]
        for j in range(stride):
            acc = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
            for i in range(taps):
                time = (t - i)[:, None]
                p_rows = p_x + b * sx_b + time.to(tl.int64) * sx_t + c[None, :]
                m_x = m & (time < T)
                if STREAM:
                    p_past = p_history + state * sh_b + (taps - 1 + time) * sh_t + c[None, :]
                    b_x = load_either(time < 0, p_past, p_rows, m_x, SELECT)
                else:
                    b_x = tl.load(p_rows, mask=m_x & (time >= 0), other=0.0)
                b_x = activate(b_x.to(tl.float32), PRE, dtype == tl.float32)
                k = tl.full([BLOCK_C], i * stride + j, tl.int32)  # Triton 3.9's interpreter refuses `m_c &` a scalar
                acc += b_x * tl.load(p_w + c * K + k, mask=m_c & (k < K), other=0.0).to(tl.float32)[None, :]
            if BIAS:
                acc += tl.load(p_bias + c, mask=m_c, other=0.0).to(tl.float32)[None, :]
            p = (t * stride + j - left)[:, None]
            p_out = p_y + b * sy_b + p.to(tl.int64) * sy_t + c[None, :]
            tl.store(p_out, acc.to(dtype), mask=m & (p >= 0) & (p < T_out))
    if STREAM:
        b = first_tile // tl.cdiv(steps, seg) * per_tile + tl.arange(0, BLOCK_T)
        m = (tl.arange(0, BLOCK_T) < per_tile) & (b < B)
        state = state_rows(p_state_rows, b, m, ROWS, True).to(tl.int64)
        m = (m & (tl.load(p_active + state, mask=m, other=0) != 0))[:, None] & m_c[None, :]
        p_rows = p_x + (b.to(tl.int64) * sx_b)[:, None] + c[None, :]
        p_past = p_history + (state * sh_b)[:, None] + c[None, :]
        for i in range(taps - 1):
            tl.debug_barrier()  # everything is read before any of it is overwritten
            time = T - (taps - 1) + i
            is_past = tl.full([BLOCK_T, BLOCK_C], time, tl.int32) < 0
            b_h = load_either(is_past, p_past + (taps - 1 + time) * sh_t, p_rows + time * sx_t, m, SELECT)
            tl.store(p_past + i * sh_t, b_h, mask=m)


def causal_conv_transpose1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, groups: int = 1,
    trim: tuple[int, int] = (0, 0), pre: str = "none", scales: Tensor | None = None, history: Tensor | None = None,
    first: Tensor | None = None, active: Tensor | None = None, rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As in the reference; the result is channels-last."""
    total = conv_transpose_length(x, weight, bias, stride, groups, trim, history, rows)
    (channels, per_group, _), taps = weight.shape, taps_of(weight.shape[2], stride)
    x, left = layout.channels_last(x), 0 if history is not None else trim[0]
    batch, out, length = len(x), per_group * groups, x.shape[2]
    if not total or not batch:
        return layout.empty_channels_last(x, out, total)
    if groups == channels and per_group == 1:
        return _depthwise(x, weight, bias, stride, left, pre, history, active, rows, total)
    steps = triton.cdiv(left + total, stride)  # of s outputs each
    y = x.new_empty(batch, steps, stride, out)
    packed = packing.packed(weight, f"upsampling {stride} {groups}", lambda w: _pack(w, stride, groups))
    repeated = None
    if bias is not None:
        repeated = packing.packed(bias, f"x{stride} {groups}", lambda v: v.view(groups, -1).repeat(1, stride).flatten())
    tensors = ((x, 1), (packed, 0), (repeated, 0), (history, 2))
    for g in range(groups):
        px, pw, pb, ph = (channels_of(t, dim, g, groups) for t, dim in tensors)
        part = y if groups == 1 else y.new_empty(batch, steps, stride, per_group)
        launch_group(
            px, pw, pb, None, ph, first, active, rows, part.flatten(2).transpose(1, 2),
            pad=(taps - 1, max(0, steps - length)), pre=pre,
        )  # fmt: skip
        if groups > 1:
            y[..., g * per_group : (g + 1) * per_group] = part
    return y.view(batch, steps * stride, out)[:, left : left + total].contiguous().transpose(1, 2)  # copies if trimmed


def _pack(weight: Tensor, stride: int, groups: int) -> Tensor:
    """[C, C_out / groups, K] -> [s * C_out, taps, C / groups], as `causal_conv1d` reads weights."""
    return as_convolution(weight, stride, groups).permute(0, 2, 1).contiguous()


def _depthwise(x, weight, bias, stride, left, pre, history, active, rows, total):
    """A depthwise convolution with `total` outputs."""
    (batch, channels, length), kernel = x.shape, weight.shape[2]
    taps, stream, steps = taps_of(kernel, stride), history is not None, triton.cdiv(left + total, stride)
    y = layout.empty_channels_last(x, channels, total)
    tile = {"BLOCK_T": 16, "BLOCK_C": min(64, triton.next_power_of_2(channels)), "num_warps": 4}
    seg, per_tile, groups, tiles = segments(batch, steps, tile["BLOCK_T"])
    per_program = tiles if stream else 1
    h, a = (history, active) if stream else (x, x)
    by_name = stream and rows is not None
    _launch.launch(
        "causal_conv_transpose1d", causal_conv_transpose1d_depthwise_kernel,
        (groups * tiles // per_program * triton.cdiv(channels, tile["BLOCK_C"]),),
        x, weight.contiguous(), weight if bias is None else bias, h, a, rows if by_name else x, y,
        batch, length, total, steps, channels, kernel, stride, taps, left, seg, per_tile, per_program,
        x.stride(0), x.stride(2), h.stride(0), h.stride(1), y.stride(0), y.stride(2),
        PRE=pre, BIAS=bias is not None, STREAM=stream, ROWS=by_name, SELECT=True, SHARED=per_tile > 1,
        **tile,
    )  # fmt: skip
    return y

"""Triton kernel for `audio_resblock`: the residual unit beside the audio and its convolution from or to one channel.

The signal between the two, 64 channels at 24 kHz, is the largest of the model, and never leaves the chip. Memory
traffic in bf16 per second of audio, where this signal is 3.07 MB and the audio 0.05 MB, computed and not measured:

    | what runs                          | bytes moved                           | MB  |
    |------------------------------------|---------------------------------------|-----|
    | convolution and unit, two launches | the signal, written twice, read once  | 9.3 |
    | this kernel                        | the signal once, the audio once       | 3.1 |

So it is limited by its instructions, and these are few:

- before the unit: a row of the left operand is the K samples that an output depends on, and a 1, whose weight is the
  bias. Rows outside of the signal are zero, and so are their products, as the unit's padding is. The products are the
  unit's input as they are, in fp32.
- after it: one product of the unit's output with all taps, [BLOCK_T, K]; the columns of earlier taps are moved down. A
  tile needs K - 1 more rows before its own, which it computes and discards.

If the audio has several channels, or a tile cannot hold all channels of the unit, the two ops are launched one after
the other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ...runtime import layout, packing
from .._common import check_audio_resblock
from . import _launch
from ._conv import LENGTHS, activate, by_taps, rows_of, segments
from .causal_conv1d import causal_conv1d
from .resblock import TAPS as UNIT_TAPS
from .resblock import resblock, unit_of_tile

BLOCK_K = 16  # the least that a product sums over, or has columns
WIDEST = 64  # channels of a tile
REGISTERS = 168  # with more, two programs would run on a processor instead of three


@triton.jit(do_not_specialize=LENGTHS)
def audio_resblock_fwd_kernel(
    p_x, p_w1, p_b1, p_w2, p_b2, p_audio, p_audio_bias, p_y,
    B, T, C, H, dilation, pad, seg, per_tile, sx_b, sx_t, sy_b, sy_t,
    POST: tl.constexpr, AFTER: tl.constexpr, TAPS: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """TAPS: of the convolution from or to the audio. `pad`: rows that a tile has before its own."""
    dtype: tl.constexpr = p_y.dtype.element_ty
    b, t, m_row, _ = rows_of(tl.program_id(0), B, T, seg, per_tile, pad, SHARED, BLOCK_T)
    m_x = m_row & (t >= 0)
    t64 = t.to(tl.int64)
    p_rows = (p_x + b * sx_b + t64 * sx_t)[:, None]
    k = tl.arange(0, BLOCK_K)
    c = tl.arange(0, BLOCK_C)
    m_c = c < C
    if AFTER:
        b_x = tl.load(p_rows + c[None, :], mask=m_x[:, None] & m_c[None, :], other=0.0).to(tl.float32)
    else:
        back = (TAPS - 1 - k)[None, :]
        m_taps = m_x[:, None] & (back >= 0) & (t[:, None] >= back)
        of_bias = (m_x[:, None] & (back == -1)).to(tl.float32).to(dtype)
        b_taps = tl.load(p_rows - back.to(tl.int64) * sx_t, mask=m_taps, other=of_bias)
        b_w = tl.load(p_audio + c[:, None] * BLOCK_K + k[None, :], mask=m_c[:, None], other=0.0)
        b_x = tl.dot(b_taps, tl.trans(b_w), input_precision=PRECISION)
    b_y = unit_of_tile(b_x, p_w1, p_b1, p_w2, p_b2, C, H, dilation, BLOCK_T, BLOCK_H, BLOCK_C, PRECISION)
    b_y = activate(b_y, POST, dtype == tl.float32).to(dtype)
    i = tl.arange(0, BLOCK_T)
    m_y = m_row & ((i % (seg + pad) if SHARED else i) >= pad)
    p_results = p_y + b * sy_b + t64 * sy_t
    if AFTER:
        b_w = tl.load(p_audio + k[:, None] * C + c[None, :], mask=(k < TAPS)[:, None] & m_c[None, :], other=0.0)
        products = tl.dot(b_y, tl.trans(b_w), input_precision=PRECISION)  # [BLOCK_T, BLOCK_K]
        total = tl.load(p_audio_bias).to(tl.float32) + tl.zeros([BLOCK_T], dtype=tl.float32)
        for tap in tl.static_range(TAPS):
            product = tl.sum(tl.where((k == tap)[None, :], products, 0.0), axis=1)  # [BLOCK_T]
            product = tl.gather(product, tl.maximum(i - (TAPS - 1 - tap), 0), axis=0)
            total += tl.where(t >= TAPS - 1 - tap, product, 0.0)
        tl.store(p_results, total.to(dtype), mask=m_y)
    else:
        tl.store(p_results[:, None] + c[None, :], b_y, mask=m_y[:, None] & m_c[None, :])


def audio_resblock(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, audio_weight: Tensor,
    audio_bias: Tensor, *, after: bool = False, dilation: int = 1, post: str = "none",
) -> Tensor:  # fmt: skip
    """As in the reference; the result is channels-last."""
    check_audio_resblock(x, weight1, bias1, weight2, bias2, audio_weight, audio_bias, after, dilation)
    (hidden, channels, kernel), (batch, _, length), taps = weight1.shape, x.shape, audio_weight.shape[2]
    left, outputs = (kernel - 1) * dilation, len(audio_weight) if after else channels
    halo, tile = left + (taps - 1 if after else 0), _blocks(channels, hidden, x)
    fits = kernel == UNIT_TAPS and taps < BLOCK_K and max(channels, hidden) <= WIDEST and halo <= tile["BLOCK_T"] // 2
    if not fits or (outputs if after else x.shape[1]) != 1:
        x = x if after else causal_conv1d(x, audio_weight, audio_bias, pad=(taps - 1, 0))
        x = resblock(x, weight1, bias1, weight2, bias2, dilation=dilation, pad=(left, 0), post=post)
        return causal_conv1d(x, audio_weight, audio_bias, pad=(taps - 1, 0)) if after else x
    x, y = layout.channels_last(x), layout.empty_channels_last(x, outputs, length)
    if not batch:
        return y
    seg, per_tile, groups, tiles = segments(batch, length, tile["BLOCK_T"], halo)
    _launch.launch(
        "audio_resblock", audio_resblock_fwd_kernel, (groups * tiles,),
        x, by_taps(weight1), bias1, weight2.contiguous(), bias2,
        by_taps(audio_weight) if after else _with_bias(audio_weight, audio_bias), audio_bias, y,
        batch, length, channels, hidden, dilation, halo, seg, per_tile,
        x.stride(0), x.stride(2), y.stride(0), y.stride(2),
        POST=post, AFTER=after, TAPS=taps, SHARED=per_tile > 1, PRECISION=_launch.precision(x), **tile,
    )  # fmt: skip
    return y


def _with_bias(weight: Tensor, bias: Tensor) -> Tensor:
    """A convolution of one channel, [C, 1, K], packed as [C, BLOCK_K]: K taps, the bias, and zeros."""

    def pack(weight: Tensor, bias: Tensor) -> Tensor:
        taps = weight.shape[2]
        return F.pad(torch.cat([weight[:, 0], bias[:, None]], dim=1), (0, BLOCK_K - 1 - taps))

    return packing.packed((weight, bias), "with bias", pack)


def _blocks(channels: int, hidden: int, x: Tensor) -> dict[str, int]:
    """Block sizes, warps and pipeline stages. fp32 has three TF32 products, whose operands need registers."""
    fp32 = x.dtype == torch.float32
    tile = {
        "BLOCK_T": 64 if fp32 or not _launch.has_warp_groups(x) else 128,
        "BLOCK_H": max(16, triton.next_power_of_2(hidden)), "BLOCK_C": max(16, triton.next_power_of_2(channels)),
        "BLOCK_K": BLOCK_K, "num_warps": 4, "num_stages": 1,
    }  # fmt: skip
    return tile if fp32 else tile | {"maxnreg": REGISTERS}

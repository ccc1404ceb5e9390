"""Triton kernels for `transformer_layer`: one launch for a frame of a stream, five for few rows, PyTorch's for many.

    y   = x + scale1 * o(attention(q(n), k(n), v(n))),    n = norm1(x)
    out = y + scale2 * fc2(activation(fc1(norm2(y))))

A frame of a stream is limited by reading the weights: 6.3 MB in bf16 for 512 channels and 2048 hidden ones, 2.1 us at 3
TB/s. Composed of PyTorch's operations, a layer is 14 launches, each longer than its share of that. Here it has five
phases, each of which reads what all of the one before wrote:

    norm + q, k, v | RoPE + attention + ring | o + scale + residual | norm + fc1 + activation | fc2 + scale + residual

Four of them are one function (`_linear.py`): a product of normalised rows with a weight, and all that follows it. The
fifth is that of `window_attention`.

- One tile of rows, whose queries are one tile too, as in a frame of up to 8 streams: one cooperative launch. Its
  programs, at most one per multiprocessor, take the tiles of a phase in turn and wait for each other between phases
  (`_wait.py`). Assumed, not measured: a launch in a CUDA graph takes 2.5 us, such a wait 1.5 us. Triton's interpreter,
  which runs one program after another, is given each phase as a launch of the same kernel.
- At most `FEW` rows, and on AMD GPUs, where programs may not wait: five launches of the same tiles.
- More rows: PyTorch's products (cuBLAS) are faster than these tiles, which read the weights again for each tile of
  rows. The bound `FEW` follows from counted bytes of the L2 cache and has not been measured.

Attention and the product with `o` are two phases. In one, either each program would attend to all heads, 512 KB of
rings for 16 outputs, or heads would add partial products [rows, 512] in fp32, which atomically has no fixed order, and
through memory is 16 KB a row that each program of the next phase would read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ...runtime import packing
from ...runtime.arrivals import arrivals
from .._common import check_attention, check_norm, normalized, stacked_bias
from . import _launch
from ._linear import linear_tile
from ._wait import arrive, leave, wait_for
from .window_attention import attention_tile, one_tile, state_arguments, tile_arguments, window_attention

ONE_TILE = 16  # rows of a layer that is one launch, at most the rows of its tiles
FEW = 512  # rows, positions of all streams together
PHASES = 5
CHUNK = 8192  # elements of rows that a program holds while it computes their mean and variance
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@triton.jit(do_not_specialize=["R"])
def transformer_layer_linear_kernel(
    p_x, p_w, p_y, p_norm_weight, p_norm_bias, p_bias, p_scale, p_residual, R, units, O, eps,
    PRE: tl.constexpr, POST: tl.constexpr, NORM_BIAS: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr,
    RESIDUAL: tl.constexpr, UNIT: tl.constexpr, WHOLE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y [R, O] = residual + scale * post(pre(x) [R, C] w [O, C] + bias), all rows contiguous."""
    linear_tile(
        tl.program_id(0), p_x, p_w, p_y, p_norm_weight, p_norm_bias, p_bias, p_scale, p_residual, R, units, O, eps,
        PRE, POST, NORM_BIAS, BIAS, SCALE, RESIDUAL, UNIT, WHOLE, CHUNK, BLOCK_T, BLOCK_O, BLOCK_C, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["R", "T"])
def transformer_layer_kernel(
    p_x, p_norm1, p_norm1_bias, p_qkv, p_qkv_bias, p_o, p_o_bias, p_scale1, p_norm2, p_norm2_bias, p_fc1, p_fc2,
    p_scale2, p_hidden, p_out, p_arrivals, R, units, hidden, eps,
    p_q, p_k, p_v, p_freq, p_y, p_offset, p_ring_k, p_ring_v, p_active, p_state_rows,
    H, H_kv, T, D, window, scale, rope_scale,
    sq_b, sq_h, sq_t, sk_b, sk_h, sk_t, sv_b, sv_h, sv_t, sy_b, sy_h, sy_t,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, NORM1_BIAS: tl.constexpr, NORM2_BIAS: tl.constexpr,
    QKV_BIAS: tl.constexpr, O_BIAS: tl.constexpr, SCALE1: tl.constexpr, SCALE2: tl.constexpr,
    UNIT: tl.constexpr, WHOLE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
    INTERLEAVED: tl.constexpr, STREAM: tl.constexpr, ROWS: tl.constexpr, FEW: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Phases FIRST to LAST - 1 of a layer of rows x [R, C], R at most BLOCK_T: a launch does all, or one of them.

    p_q, p_k and p_v are parts of the heads [R, (H + 2 * H_kv) * D]; y [R, H * D]; hidden [R, hidden]; out [R, C], where
    rows after attention are too.
    """
    me, programs = tl.program_id(0), tl.num_programs(0)
    C = units * UNIT
    for phase in tl.static_range(FIRST, LAST):
        if phase > 0:
            wait_for(p_arrivals, phase * programs)
        if phase == 0:
            for tile in range(me, tl.cdiv((H + 2 * H_kv) * D, BLOCK_O), programs):
                linear_tile(
                    tile, p_x, p_qkv, p_q, p_norm1, p_norm1_bias, p_qkv_bias, p_x, p_x,
                    R, units, (H + 2 * H_kv) * D, eps, NORM, "none", NORM1_BIAS, QKV_BIAS, False, False,
                    UNIT, WHOLE, CHUNK, BLOCK_T, BLOCK_O, BLOCK_C, PRECISION,
                )  # fmt: skip
        elif phase == 1:
            for tile in range(me, R // T * H_kv, programs):
                attention_tile(
                    tile, p_q, p_k, p_v, p_freq, p_y, p_offset, p_ring_k, p_ring_v, p_active, p_state_rows,
                    H, H_kv, T, D, window, scale, rope_scale,
                    sq_b, sq_h, sq_t, sk_b, sk_h, sk_t, sv_b, sv_h, sv_t, sy_b, sy_h, sy_t,
                    INTERLEAVED, STREAM, ROWS, FEW, PADDED, BLOCK_Q, BLOCK_K, BLOCK_D, HALF, PRECISION,
                )  # fmt: skip
        elif phase == 2:
            for tile in range(me, tl.cdiv(C, BLOCK_O), programs):
                linear_tile(
                    tile, p_y, p_o, p_out, p_x, p_x, p_o_bias, p_scale1, p_x,
                    R, H * D, C, eps, "none", "none", False, O_BIAS, SCALE1, True,
                    1, WHOLE, CHUNK, BLOCK_T, BLOCK_O, BLOCK_C, PRECISION,
                )  # fmt: skip
        elif phase == 3:
            for tile in range(me, tl.cdiv(hidden, BLOCK_O), programs):
                linear_tile(
                    tile, p_out, p_fc1, p_hidden, p_norm2, p_norm2_bias, p_x, p_x, p_x,
                    R, units, hidden, eps, NORM, ACTIVATION, NORM2_BIAS, False, False, False,
                    UNIT, WHOLE, CHUNK, BLOCK_T, BLOCK_O, BLOCK_C, PRECISION,
                )  # fmt: skip
        else:
            for tile in range(me, tl.cdiv(C, BLOCK_O), programs):
                linear_tile(
                    tile, p_hidden, p_fc2, p_out, p_x, p_x, p_x, p_scale2, p_out,
                    R, hidden, C, eps, "none", "none", False, False, SCALE2, True,
                    1, WHOLE, CHUNK, BLOCK_T, BLOCK_O, BLOCK_C, PRECISION,
                )  # fmt: skip
        if phase < 4:
            arrive(p_arrivals)
        else:
            leave(p_arrivals, 5 * programs)


class Norm(NamedTuple):
    kind: str
    weight: Tensor
    bias: Tensor | None
    eps: float


class Layer(NamedTuple):
    """The weights of a layer; q, k and v are one [(H + 2 * H_kv) * D, C]."""

    norm1: Norm
    qkv: Tensor
    qkv_bias: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    scale1: Tensor | None
    norm2: Norm
    fc1: Tensor
    activation: str
    fc2: Tensor
    scale2: Tensor | None


def transformer_layer(
    x: Tensor, norm1_weight: Tensor, norm1_bias: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor,
    scale1: Tensor | None, norm2_weight: Tensor, norm2_bias: Tensor | None, fc1: Tensor, fc2: Tensor,
    scale2: Tensor | None, inv_freq: Tensor, q_bias: Tensor | None = None, k_bias: Tensor | None = None,
    v_bias: Tensor | None = None, o_bias: Tensor | None = None, scales: Tensor | None = None, *, window: int,
    eps: float, norm: str = "layer", activation: str = "gelu", rope_scale: float = 1.0, offset: Tensor | None = None,
    cache_k: Tensor | None = None, cache_v: Tensor | None = None, active: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As in the reference."""
    check_norm(norm, norm1_bias, norm2_bias)
    if not x.numel():
        return torch.empty_like(x)
    x = x.contiguous()
    qkv, qkv_bias = packing.packed((q, k, v, q_bias, k_bias, v_bias), "triton q, k, v", _stacked)
    layer = Layer(
        Norm(norm, norm1_weight, norm1_bias, eps), qkv, qkv_bias, o, o_bias, scale1,
        Norm(norm, norm2_weight, norm2_bias, eps), fc1, activation, fc2, scale2,
    )  # fmt: skip
    fits = x.shape[0] * x.shape[1] <= ONE_TILE and one_tile(x.shape[1], len(q) // len(k))
    return (_whole if fits and not _launch.is_amd(x) else _in_parts)(
        x, layer, [len(weight) for weight in (q, k, v)], inv_freq, window=window, rope_scale=rope_scale,
        offset=offset, cache_k=cache_k, cache_v=cache_v, active=active, rows=rows,
    )  # fmt: skip


def _in_parts(x: Tensor, layer: Layer, widths: list[int], inv_freq: Tensor, **attention: Any) -> Tensor:
    """The layer in five launches, or with PyTorch's products; x is contiguous."""
    linear = _few if x.shape[0] * x.shape[1] <= FEW else _many
    q, k, v = _heads(linear(x, layer.qkv, layer.norm1, bias=layer.qkv_bias), widths, inv_freq)
    y = window_attention(q, k, v, inv_freq, **attention)
    x = linear(y.transpose(1, 2).flatten(-2), layer.o, bias=layer.o_bias, scale=layer.scale1, residual=x)
    hidden = linear(x, layer.fc1, layer.norm2, activation=layer.activation)
    return linear(hidden, layer.fc2, scale=layer.scale2, residual=x)


def _heads(x: Tensor, widths: list[int], inv_freq: Tensor) -> list[Tensor]:
    """[B, T, sum of widths] -> [B, width / D, T, D] for each width."""
    return [part.unflatten(-1, (-1, 2 * len(inv_freq))).transpose(1, 2) for part in x.split(widths, dim=-1)]


def _whole(
    x: Tensor, layer: Layer, widths: list[int], inv_freq: Tensor, *, window: int, rope_scale: float,
    cache_k: Tensor | None, cache_v: Tensor | None, rows: Tensor | None, **state: Tensor | None,
) -> Tensor:  # fmt: skip
    """The layer in one launch, or in the interpreter in one for each phase; x is contiguous."""
    batch, length, channels = x.shape
    outputs = (len(layer.qkv), widths[0], len(layer.fc1), channels)
    heads, attended, hidden, y = (x.new_empty(batch, length, width) for width in outputs)
    q, k, v = _heads(heads, widths, inv_freq)
    check_attention(q, k, v, window, cache_k, cache_v, rows)
    (attended,) = _heads(attended, widths[:1], inv_freq)
    pointers, kind = state_arguments(x, cache_k=cache_k, cache_v=cache_v, rows=rows, **state)
    attention, blocks = tile_arguments(q, k, v, inv_freq, attended, pointers, window, rope_scale)
    options = blocks | kind | _options(batch * length, channels, x)
    tiles = max(triton.cdiv(max(outputs), options["BLOCK_O"]), batch * k.shape[1])
    norm1, norm2, counter = layer.norm1, layer.norm2, arrivals(x, 1)
    phases = PHASES if _launch.may_wait(x) else 1  # in one launch
    for first in range(0, PHASES, phases):
        _launch.launch(
            "transformer_layer", transformer_layer_kernel, (min(tiles, _launch.programs(x)),),
            x, *(x if t is None else t.contiguous() for t in (
                norm1.weight, norm1.bias, layer.qkv, layer.qkv_bias, layer.o, layer.o_bias, layer.scale1,
                norm2.weight, norm2.bias, layer.fc1, layer.fc2, layer.scale2,
            )),
            hidden, y, counter, batch * length, channels // options["UNIT"], len(layer.fc1), norm1.eps, *attention,
            NORM=norm1.kind, ACTIVATION=layer.activation, NORM1_BIAS=norm1.bias is not None,
            NORM2_BIAS=norm2.bias is not None, QKV_BIAS=layer.qkv_bias is not None, O_BIAS=layer.o_bias is not None,
            SCALE1=layer.scale1 is not None, SCALE2=layer.scale2 is not None, FIRST=first, LAST=first + phases,
            launch_cooperative_grid=phases > 1, **options,
        )  # fmt: skip
    return y


def _stacked(
    q: Tensor, k: Tensor, v: Tensor, q_bias: Tensor | None, k_bias: Tensor | None, v_bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    return torch.cat([q, k, v]), stacked_bias((q, k, v), (q_bias, k_bias, v_bias))


def _many(
    x: Tensor, weight: Tensor, norm: Norm | None = None, *, bias: Tensor | None = None, activation: str = "none",
    scale: Tensor | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """residual + scale * activation(norm(x) [B, T, C] weight [O, C] + bias), by PyTorch."""
    if norm is not None:
        x = normalized(x, norm.weight, norm.bias, norm.eps, norm.kind)
    y = F.linear(x, weight, bias)
    if activation != "none":
        y = ACTIVATIONS[activation](y)
    if residual is None:
        return y
    return residual + y if scale is None else torch.addcmul(residual, y, scale)


def _few(
    x: Tensor, weight: Tensor, norm: Norm | None = None, *, bias: Tensor | None = None, activation: str = "none",
    scale: Tensor | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same in one launch; x and residual are contiguous."""
    (batch, length, channels), outputs = x.shape, len(weight)
    y, weight = x.new_empty(batch, length, outputs), weight.contiguous()
    kind, norm_weight, norm_bias, eps = norm or Norm("none", x, None, 0.0)
    options = _options(batch * length, channels, x)
    _launch.launch(
        "transformer_layer", transformer_layer_linear_kernel,
        (triton.cdiv(batch * length, options["BLOCK_T"]) * triton.cdiv(outputs, options["BLOCK_O"]),),
        x, weight, y, norm_weight, *(x if t is None else t for t in (norm_bias, bias, scale, residual)),
        batch * length, channels // options["UNIT"], outputs, eps,
        PRE=kind, POST=activation, NORM_BIAS=norm_bias is not None, BIAS=bias is not None, SCALE=scale is not None,
        RESIDUAL=residual is not None, **options,
    )  # fmt: skip
    return y


def _options(rows: int, channels: int, x: Tensor) -> dict[str, Any]:
    """Constants of `linear_tile` for rows [rows, channels] like x, with warps and stages."""
    tile, unit = _blocks(rows, x), math.gcd(channels, 16)
    chunk, most = triton.next_power_of_2(channels), CHUNK // tile["BLOCK_T"]
    if chunk > most:
        chunk = most // 2  # read in turns, with the next in flight
    return {"UNIT": unit, "WHOLE": channels <= chunk, "CHUNK": chunk, "PRECISION": _launch.precision(x), **tile}


def _blocks(rows: int, x: Tensor) -> dict[str, int]:
    """Tiles for so many rows that spill no registers: with few rows small ones, so that many programs read weights."""
    fp32 = x.dtype == torch.float32
    if rows <= ONE_TILE:
        tile = {"BLOCK_T": 16, "BLOCK_O": 32 if fp32 else 16, "BLOCK_C": 64 if fp32 else 256}
    elif rows <= 64:
        tile = {"BLOCK_T": 16, "BLOCK_O": 32, "BLOCK_C": 32 if fp32 else 256}
    elif rows <= 256:
        tile = {"BLOCK_T": 32, "BLOCK_O": 32, "BLOCK_C": 32 if fp32 else 128}
    else:
        tile = {"BLOCK_T": 64, "BLOCK_O": 32 if fp32 else 64, "BLOCK_C": 32 if fp32 else 64}
    return {**tile, "num_warps": 8 if fp32 and not ONE_TILE < rows <= 256 else 4, "num_stages": 4}

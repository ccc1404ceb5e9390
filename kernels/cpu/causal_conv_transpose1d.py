"""CPU kernel for `causal_conv_transpose1d`: computed as a causal convolution, so that there is no overlap-add offline.

    y[t s + j, o] = bias[o] + sum_{tap, c} w[c, o, j + (taps - 1 - tap) s] x[t - taps + 1 + tap, c],  taps = ceil(K / s)

is a convolution with stride 1 and s * C_out outputs (j, o). In channels-last memory its output [T, s * C_out] is the
upsampled signal [T * s, C_out], without a copy (native/conv.h). When streaming, the convolution also computes the
taps - 1 rows after the input: the tail that the next call adds to its first samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime import layout, packing
from .._common import as_convolution, conv_transpose_length, taps_of
from ._abi import ACTIVATIONS, DTYPES, Output
from ._native import native
from ._pack import address, check_dtypes, panels
from .causal_conv1d import by_taps, input_of, output_of


def causal_conv_transpose1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, groups: int = 1,
    trim: tuple[int, int] = (0, 0), pre: str = "none", scales: Tensor | None = None, overlap: Tensor | None = None,
    active: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As in the reference; the result is channels-last."""
    check_dtypes(x, weight, overlap)
    total = conv_transpose_length(x, weight, bias, stride, groups, trim, overlap)
    out, taps = weight.shape[1] * groups, taps_of(weight.shape[2], stride)
    x = layout.channels_last(x)
    batch, _, length = x.shape
    if overlap is not None:
        y, tail = x.new_empty(batch, length, stride * out), x.new_empty(batch, taps - 1, stride * out).float()
        _multiply(x, weight, bias, scales, stride, groups, taps, pre, y, tail)
        samples = y.view(batch, total, out)
        if overlap.shape[2] > 0:
            native().overlap(
                DTYPES[x.dtype], samples.data_ptr(), tail.data_ptr(), overlap.data_ptr(), address(active), batch,
                samples.shape[1], tail.shape[1] * stride, out, overlap.shape[2], samples.stride(0), out,
                overlap.stride(0),
            )  # fmt: skip
        return samples.transpose(1, 2)
    rows = -(-(total + trim[0]) // stride)
    y = x.new_empty(batch, rows, stride * out)
    if y.numel():
        _multiply(x, weight, bias, scales, stride, groups, taps, pre, y, None)
    return y.view(batch, rows * stride, out)[:, trim[0] : trim[0] + total].contiguous().transpose(1, 2)


def _multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None, stride: int, groups: int, taps: int,
    pre: str, y: Tensor, tail: Tensor | None,
) -> None:  # fmt: skip
    """Write the first rows of the convolution to y [B, rows, s * C_out].

    If there is a tail [B, taps - 1, s * C_out], the rows after them are written to it, without bias.
    """
    channels, per_group, _ = weight.shape
    rows, beyond = y.shape[1], 0 if tail is None else taps - 1
    pad = (taps - 1, max(0, rows + beyond - x.shape[2]))
    threads = torch.get_num_threads()
    if groups == channels and per_group == 1:
        taps_first = packing.packed(weight, f"depthwise {stride}", lambda w: _depthwise(w, stride))
        fp32_bias = None if bias is None else packing.packed(bias, "fp32", lambda b: b.float().contiguous())
        native().keep(x, taps_first, fp32_bias, y, tail)
        target = Output(y=y.data_ptr(), rows=rows, tail=address(tail))
        native().depthwise(
            input_of(x), taps_first.data_ptr(), address(fp32_bias), target, stride, taps, ACTIVATIONS[pre],
            rows + beyond, threads,
        )  # fmt: skip
        return
    for group in range(groups):
        inputs = slice(group * channels // groups, (group + 1) * channels // groups)
        outputs = slice(group * per_group, (group + 1) * per_group)
        group_y, group_tail = y, tail
        if groups > 1:
            group_y = x.new_empty(y.shape[0], rows, stride * per_group)
            group_tail = None if tail is None else tail.new_empty(tail.shape[0], beyond, stride * per_group)
        packed = panels(
            weight, bias, scales, f"upsampling {stride}", lambda w: by_taps(as_convolution(w, stride)),
            repeats=stride, channel=1, group=group, groups=groups,
        )  # fmt: skip
        native().keep(x, packed, group_y, group_tail)
        target = output_of(group_y.transpose(1, 2), packed)
        if group_tail is not None:
            target.rows, target.tail = rows, address(group_tail)
        native().conv(
            input_of(x[:, inputs], pad), packed.structure, target, packed.kind, 1, 1, ACTIVATIONS[pre], rows + beyond,
            group_y.stride(0), 0, threads,
        )  # fmt: skip
        if groups > 1:
            for whole, part in ((y, group_y), (tail, group_tail)):
                if whole is not None and part is not None:
                    shape = (*whole.shape[:2], stride, whole.shape[2] // stride)
                    whole.view(shape)[..., outputs] = part.view(*part.shape[:2], stride, per_group)


def _depthwise(weight: Tensor, stride: int) -> Tensor:
    """[C, 1, K] -> [taps, s, C] fp32."""
    outputs = as_convolution(weight, stride, len(weight)).view(len(weight), stride, -1)
    return outputs.permute(2, 1, 0).float().contiguous()

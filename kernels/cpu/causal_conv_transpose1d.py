"""CPU kernel for `causal_conv_transpose1d`: computed as a causal convolution, so that there is no overlap-add offline.

    y[t s + j, o] = bias[o] + sum_{tap, c} w[c, o, j + (taps - 1 - tap) s] x[t - taps + 1 + tap, c],  taps = ceil(K / s)

is a convolution with stride 1 and s * C_out outputs (j, o). In channels-last memory its output [T, s * C_out] is the
upsampled signal [T * s, C_out], without a copy (native/conv.h). Streams keep the last taps - 1 inputs, as for any
convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime import layout, packing
from .._common import as_convolution, conv_transpose_length, taps_of
from ._abi import ACTIVATIONS
from ._native import native
from ._pack import address, check_dtypes, panels
from .causal_conv1d import by_taps, input_of, output_of


def causal_conv_transpose1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, groups: int = 1,
    trim: tuple[int, int] = (0, 0), pre: str = "none", scales: Tensor | None = None, history: Tensor | None = None,
    first: Tensor | None = None, active: Tensor | None = None, rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As in the reference; the result is channels-last."""
    check_dtypes(x, weight, history)
    total = conv_transpose_length(x, weight, bias, stride, groups, trim, history, rows)
    (channels, per_group, _), taps = weight.shape, taps_of(weight.shape[2], stride)
    out, begin, threads = per_group * groups, 0 if history is not None else trim[0], torch.get_num_threads()
    x = layout.channels_last(x)
    batch, _, length = x.shape
    steps = -(-(total + begin) // stride)
    y = x.new_empty(batch, steps, stride * out)
    pad, state = (taps - 1, max(0, steps - length)), (history, first, active, rows)
    if y.numel() and groups == channels and per_group == 1:
        taps_first = packing.packed(weight, f"depthwise {stride}", lambda w: _depthwise(w, stride))
        fp32_bias = None if bias is None else packing.packed(bias, "fp32", lambda b: b.float().contiguous())
        native().keep(x, taps_first, fp32_bias, y)
        native().depthwise(
            input_of(x, pad, "constant", *state), taps_first.data_ptr(), address(fp32_bias), y.data_ptr(), stride, taps,
            ACTIVATIONS[pre], steps, threads,
        )  # fmt: skip
    elif y.numel():
        for group in range(groups):
            inputs = slice(group * channels // groups, (group + 1) * channels // groups)
            part = y if groups == 1 else x.new_empty(batch, steps, stride * per_group)
            packed = panels(
                weight, bias, scales, f"upsampling {stride}", lambda w: by_taps(as_convolution(w, stride)),
                repeats=stride, channel=1, group=group, groups=groups,
            )  # fmt: skip
            native().keep(x, packed, part)
            native().conv(
                input_of(x[:, inputs], pad, "constant", *state, inputs.start), packed.structure,
                output_of(part.transpose(1, 2), packed), packed.kind, 1, 1, ACTIVATIONS[pre], steps, part.stride(0), 0,
                threads,
            )  # fmt: skip
            if groups > 1:
                outputs = slice(group * per_group, (group + 1) * per_group)
                y.view(batch, steps, stride, out)[..., outputs] = part.view(batch, steps, stride, per_group)
    if history is not None and taps > 1:
        native().advance(input_of(x, pad, "constant", *state))
    return y.view(batch, steps * stride, out)[:, begin : begin + total].contiguous().transpose(1, 2)


def _depthwise(weight: Tensor, stride: int) -> Tensor:
    """[C, 1, K] -> [taps, s, C] fp32."""
    outputs = as_convolution(weight, stride, len(weight)).view(len(weight), stride, -1)
    return outputs.permute(2, 1, 0).float().contiguous()

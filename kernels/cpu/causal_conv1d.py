"""CPU kernel for `causal_conv1d`: activation, padding or history, GEMM, bias, activation and residual in one pass.

In channels-last memory a convolution is a matrix product of overlapping rows with packed weights, without an im2col
copy (native/conv.h). The work is divided into chunks whose activated input stays in the caches of a thread. The first
strided layer (64 to 128 channels, kernel 8, stride 4) takes at least 0.79 GFLOP and 9 MB of memory traffic per second
of audio.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime import layout
from .._common import conv_length
from ._abi import ACTIVATIONS, DTYPES, PAD_MODES, Input, Output
from ._native import native
from ._pack import Panels, address, check_dtypes, panels


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, dilation: int = 1, groups: int = 1,
    pad: tuple[int, int] = (0, 0), pad_mode: str = "constant", pre: str = "none", post: str = "none",
    residual: Tensor | None = None, scales: Tensor | None = None, history: Tensor | None = None,
    first: Tensor | None = None, active: Tensor | None = None, rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As in the reference; the result is channels-last."""
    check_dtypes(x, weight, residual, history)
    length = conv_length(x, weight, bias, stride, dilation, groups, pad, history, rows)
    out, per_group, _ = weight.shape
    x = layout.channels_last(x)
    y = layout.empty_channels_last(x, out, length)
    if not y.numel():
        return y
    residual = None if residual is None else layout.channels_last(residual.expand(y.shape))
    state = (history, first, active, rows)
    for group in range(groups):
        inputs, outputs = (slice(group * n, (group + 1) * n) for n in (per_group, out // groups))
        packed = panels(weight, bias, scales, "by taps", by_taps, group=group, groups=groups)
        target = output_of(y[:, outputs], packed, None if residual is None else residual[:, outputs])
        target.post = ACTIVATIONS[post]
        native().keep(x, packed, residual, y)
        native().conv(
            input_of(x[:, inputs], pad, pad_mode, *state, group * per_group), packed.structure, target, packed.kind,
            stride, dilation, ACTIVATIONS[pre], length, y.stride(0), 0 if residual is None else residual.stride(0),
            torch.get_num_threads(),
        )  # fmt: skip
    if history is not None and pad[0]:
        native().advance(input_of(x, pad, pad_mode, *state))
    return y


def by_taps(weight: Tensor) -> Tensor:
    """[C_out, C, K] -> [C_out, K, C]."""
    return weight.transpose(1, 2)


def input_of(
    x: Tensor, pad: tuple[int, int] = (0, 0), pad_mode: str = "constant", history: Tensor | None = None,
    first: Tensor | None = None, active: Tensor | None = None, rows: Tensor | None = None, channel: int = 0,
) -> Input:  # fmt: skip
    """The native `Input` for channels-last x [B, C, T] with its padding or history.

    If x holds some of the channels of a grouped convolution, `channel` is the index of its first one in the history.
    """
    begin, steps = None, (0, 0)
    if history is not None:
        begin = history.data_ptr() + channel * history.element_size()
        steps = (history.stride(0), history.stride(1))
    return Input(
        x.data_ptr(), DTYPES[x.dtype], x.shape[0], x.shape[2], x.shape[1], x.stride(0), x.stride(2), *pad,
        PAD_MODES[pad_mode], begin, *steps, address(first), address(active), address(rows),
    )  # fmt: skip


def output_of(y: Tensor, weights: Panels, residual: Tensor | None = None) -> Output:
    """The native `Output` for channels-last y [B, C, T], with the bias of the weights and a residual of y's shape."""
    return Output(
        y.data_ptr(), DTYPES[y.dtype], y.stride(2), weights.structure.bias, 0, None,
        weights.structure.dequantize, address(residual),
        DTYPES[y.dtype], 0 if residual is None else residual.stride(2),
    )  # fmt: skip

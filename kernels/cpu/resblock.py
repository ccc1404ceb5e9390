"""CPU kernel for `resblock`: ELU, dilated convolution, ELU, 1 x 1 convolution and skip, fused.

The audio is processed in chunks that stay in the caches of a thread, and the hidden channels are never written to
memory (native/conv.h). The unit with 64 channels moves 12 MB per second of audio; five separate passes would move 60
MB.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime import layout
from ._native import native
from ._pack import check_channels, check_dtypes, check_state, panels
from .causal_conv1d import by_taps, causal_conv1d, input_of, output_of


def resblock(
    x: Tensor,  # [B, C, T]
    weight1: Tensor,  # [C / compress, C, K]
    bias1: Tensor,
    weight2: Tensor,  # [C, C / compress, 1]
    bias2: Tensor,
    *,
    dilation: int = 1,
    pad: tuple[int, int] = (0, 0),
    pad_mode: str = "constant",
    shortcut_weight: Tensor | None = None,  # [C, C, 1]
    shortcut_bias: Tensor | None = None,
    history: Tensor | None = None,  # [B, C, pad[0]], mutated
    first: Tensor | None = None,  # [B] bool
    active: Tensor | None = None,  # [B] bool
) -> Tensor:  # [B, C, T], channels-last
    check_dtypes(x, weight1, weight2, history)
    if history is not None:
        check_state("history", history, (*x.shape[:2], pad[0]))
    check_channels(x, weight1.shape[1], len(weight1), bias1)
    check_channels(x, len(weight2), len(weight2), bias2)
    if weight2.shape[1:] != (len(weight1), 1):
        raise ValueError(f"weight2 must be [{x.shape[1]}, {len(weight1)}, 1], got {tuple(weight2.shape)}")
    x = layout.channels_last(x)
    skip = x if shortcut_weight is None else causal_conv1d(x, shortcut_weight, shortcut_bias)
    y = layout.empty_channels_last(x, x.shape[1], x.shape[2] + sum(pad) - (weight1.shape[2] - 1) * dilation)
    if y.shape[2] != x.shape[2]:
        raise ValueError(f"the padding must keep the length {x.shape[2]}, got {y.shape[2]}")
    if not y.numel():
        return y
    pairs = (weight1, bias1), (weight2, bias2)
    hidden, outputs = (panels(*pair, "by taps", by_taps) for pair in pairs)
    if hidden.kind != outputs.kind:  # only one layer is large enough to have been quantized
        hidden, outputs = (panels(*pair, "by taps", by_taps, quantize=False) for pair in pairs)
    native().keep(x, hidden, outputs, skip, y)
    source = input_of(x, pad, pad_mode, history, first, active)
    native().resblock(
        source, hidden.structure, outputs.structure, output_of(y, outputs, skip), hidden.kind, dilation, y.shape[2],
        y.stride(0), skip.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    if history is not None and pad[0]:
        native().advance(source)
    return y

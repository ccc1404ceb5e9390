"""`resblock` with oneDNN: two convolutions with prepacked weights, the second with the skip connection fused."""

from __future__ import annotations

from torch import Tensor

from ...runtime import layout
from ._prepacked import IN_PLACE
from .causal_conv1d import causal_conv1d


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
    x = layout.channels_last(x)
    skip = x if shortcut_weight is None else causal_conv1d(x, shortcut_weight, shortcut_bias)
    hidden = causal_conv1d(
        x, weight1, bias1, dilation=dilation, pad=pad, pad_mode=pad_mode, pre="elu",
        history=history, first=first, active=active,
    )  # fmt: skip
    return causal_conv1d(IN_PLACE["elu"](hidden), weight2, bias2, residual=skip)

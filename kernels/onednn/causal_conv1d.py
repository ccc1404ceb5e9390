"""`causal_conv1d` with oneDNN: a channels-last convolution with prepacked weights and a fused residual.

The input is copied once, behind its padding or history, and the activation `pre` is applied to the copy in place.
"""

from __future__ import annotations

from torch import Tensor

from ...runtime import layout
from ._prepacked import IN_PLACE, conv, padded


def causal_conv1d(
    x: Tensor,  # [B, C, T]
    weight: Tensor,  # [C_out, C / groups, K]
    bias: Tensor | None = None,  # [C_out]
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    pad: tuple[int, int] = (0, 0),
    pad_mode: str = "constant",
    pre: str = "none",
    post: str = "none",
    residual: Tensor | None = None,  # [B, C_out, T_out]
    history: Tensor | None = None,  # [B, C, pad[0]], mutated
    first: Tensor | None = None,  # [B] bool
    active: Tensor | None = None,  # [B] bool
) -> Tensor:  # [B, C_out, T_out], channels-last
    x = padded(x, pad, pad_mode, pre, history, first, active)
    out, _, kernel = weight.shape
    length = (x.shape[2] - (kernel - 1) * dilation - 1) // stride + 1
    if not x.shape[0] or length < 1:
        return layout.empty_channels_last(x, out, max(length, 0))
    residual = None if residual is None else residual.expand(x.shape[0], out, length)
    fused = residual if post == "none" else None
    y = conv(x, weight, bias, stride=stride, dilation=dilation, groups=groups, residual=fused)
    y = IN_PLACE[post](y)
    return y if residual is None or residual is fused else y + residual

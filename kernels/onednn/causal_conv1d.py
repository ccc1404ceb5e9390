"""`causal_conv1d` with oneDNN: a channels-last convolution with prepacked weights and a fused residual.

The input is copied once, behind its padding or history, and the activation `pre` is applied to the copy in place.
"""

from __future__ import annotations

from torch import Tensor

from ...runtime import layout
from .._common import conv_length
from ._prepacked import IN_PLACE, conv, padded


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, dilation: int = 1, groups: int = 1,
    pad: tuple[int, int] = (0, 0), pad_mode: str = "constant", pre: str = "none", post: str = "none",
    residual: Tensor | None = None, scales: Tensor | None = None, history: Tensor | None = None,
    first: Tensor | None = None, active: Tensor | None = None, rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As in the reference; the result is channels-last."""
    length = conv_length(x, weight, bias, stride, dilation, groups, pad, history, rows)
    x = padded(x, pad, pad_mode, pre, history, first, active, rows)
    if not x.shape[0]:
        return layout.empty_channels_last(x, len(weight), length)
    residual = None if residual is None else residual.expand(x.shape[0], len(weight), length)
    return IN_PLACE[post](conv(x, weight, bias, stride=stride, dilation=dilation, groups=groups, residual=residual))

"""`resblock` with oneDNN: two convolutions with prepacked weights, the second with the skip connection fused."""

from __future__ import annotations

from torch import Tensor

from ...runtime import layout
from .._common import check_resblock
from ._prepacked import IN_PLACE
from .causal_conv1d import causal_conv1d


def resblock(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, *, dilation: int = 1,
    pad: tuple[int, int] = (0, 0), pad_mode: str = "constant", post: str = "none",
    shortcut_weight: Tensor | None = None, shortcut_bias: Tensor | None = None, scales: Tensor | None = None,
    history: Tensor | None = None, first: Tensor | None = None, active: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As in the reference; the result is channels-last."""
    check_resblock(x, weight1, bias1, weight2, bias2, dilation, pad, history, rows)
    x = layout.channels_last(x)
    skip = x if shortcut_weight is None else causal_conv1d(x, shortcut_weight, shortcut_bias)
    hidden = causal_conv1d(
        x, weight1, bias1, dilation=dilation, pad=pad, pad_mode=pad_mode, pre="elu",
        history=history, first=first, active=active, rows=rows,
    )  # fmt: skip
    return causal_conv1d(IN_PLACE["elu"](hidden), weight2, bias2, residual=skip, post=post)

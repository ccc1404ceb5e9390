"""Reference for `resblock`, a SEANet residual unit: ELU, dilated convolution, ELU, 1 x 1 convolution, + skip [-> ELU].

The skip connection is the input or, with `shortcut_weight`, a 1 x 1 convolution of it. Only the dilated convolution
looks at earlier samples, so only it has a history. Follows transformers' `MimiResnetBlock` and moshi's
`SEANetResnetBlock`.
"""

from torch import Tensor

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
    post: str = "none",  # as in `causal_conv1d`: the next layer's activation
    shortcut_weight: Tensor | None = None,  # [C, C, 1]
    shortcut_bias: Tensor | None = None,
    scales: Tensor | None = None,  # [C / compress + C], of both weights: as in `causal_conv1d`
    history: Tensor | None = None,  # [B, pad[0], C], mutated
    first: Tensor | None = None,  # [B] bool
    active: Tensor | None = None,  # [B] bool
    rows: Tensor | None = None,  # [B] int64: rows of a pool's state, as in `causal_conv1d`
) -> Tensor:  # [B, C, T]
    skip = x if shortcut_weight is None else causal_conv1d(x, shortcut_weight, shortcut_bias)
    hidden = causal_conv1d(
        x, weight1, bias1, dilation=dilation, pad=pad, pad_mode=pad_mode, pre="elu",
        history=history, first=first, active=active, rows=rows,
    )  # fmt: skip
    return causal_conv1d(hidden, weight2, bias2, pre="elu", post=post, residual=skip)

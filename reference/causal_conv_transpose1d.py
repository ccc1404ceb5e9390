"""Reference for `causal_conv_transpose1d`: [activation ->] transposed convolution, overlap-add, bias, trim.

    y[b, o, t * stride + k] += weight[c, o, k] * pre(x)[b, c, t],   then + bias[o]

A full transposed convolution gives (T - 1) * stride + K samples. Offline, `trim` samples are removed on the left and on
the right. The right trim may be negative if the stride exceeds the kernel: that many samples are appended, which no
input contributes to, so that they hold the bias alone.

When streaming, each call returns T * stride samples, to which the last ceil(K / stride) - 1 inputs of the previous
calls contribute: they are kept in `history`, updated in place for the active batch rows. moshi's
`StreamingConvTranspose1d` keeps what those inputs contribute instead; the sums are the same.
"""

import torch.nn.functional as F
from torch import Tensor

from .causal_conv1d import ACTIVATIONS, as_image, ieee_convolutions, is_bf16_on_cpu, with_history


def causal_conv_transpose1d(
    x: Tensor,  # [B, C, T]
    weight: Tensor,  # [C, C_out / groups, K]
    bias: Tensor | None = None,  # [C_out]
    *,
    stride: int = 1,
    groups: int = 1,
    trim: tuple[int, int] = (0, 0),
    pre: str = "none",
    scales: Tensor | None = None,  # [C_out]: as in `causal_conv1d`
    history: Tensor | None = None,  # [B, ceil(K / stride) - 1, C], mutated
    first: Tensor | None = None,  # [B] bool: rows at the start of their stream, whose history is zero
    active: Tensor | None = None,  # [B] bool
    rows: Tensor | None = None,  # [B] int64: rows of a pool's state, as in `causal_conv1d`
) -> Tensor:  # [B, C_out, T * stride] with trim = (0, K - stride)
    left, right = trim
    if history is not None:
        x = with_history(x, history, first, active, rows, "constant")
        left, right = stride * history.shape[1], weight.shape[2] - stride
    x = ACTIVATIONS[pre](x)
    more = max(0, -right)
    with ieee_convolutions(x):
        if is_bf16_on_cpu(x):
            y = F.conv_transpose2d(as_image(x), weight.unsqueeze(2), bias, (1, stride), 0, (0, more), groups).squeeze(2)
        else:
            y = F.conv_transpose1d(x, weight, bias, stride=stride, groups=groups, output_padding=more)
    return y[..., left : y.shape[-1] - max(0, right)]

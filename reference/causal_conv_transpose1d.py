"""Reference for `causal_conv_transpose1d`: [activation ->] transposed convolution, overlap-add, bias, trim.

    y[b, o, t * stride + k] += weight[c, o, k] * pre(x)[b, c, t],   then + bias[o]

A full transposed convolution gives (T - 1) * stride + K samples. Offline, `trim` samples are removed on the left and on
the right. The right trim may be negative if the stride exceeds the kernel: that many samples are appended, which no
input contributes to, so that they hold the bias alone.

When streaming, each call returns T * stride samples. The K - stride samples that would follow them, without bias, are
kept in `overlap` [B, C_out, max(0, K - stride)], updated in place for the active batch rows, and added to the first
samples of the next call. Follows moshi's `StreamingConvTranspose1d`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .causal_conv1d import ACTIVATIONS, ieee_convolutions


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
    overlap: Tensor | None = None,  # [B, C_out, max(0, K - stride)], mutated
    active: Tensor | None = None,  # [B] bool
) -> Tensor:  # [B, C_out, T * stride] with trim = (0, K - stride)
    x = ACTIVATIONS[pre](x)
    if overlap is None:
        with ieee_convolutions(x):
            y = F.conv_transpose1d(x, weight, bias, stride=stride, groups=groups, output_padding=max(0, -trim[1]))
        return y[..., trim[0] : y.shape[-1] - max(0, trim[1])]
    missing = max(0, stride - weight.shape[2])  # samples that the kernel is too short to reach
    with ieee_convolutions(x):
        y = F.conv_transpose1d(x, weight, None, stride=stride, groups=groups, output_padding=missing)
    assert active is not None, "an overlap needs `active`"
    tail = overlap.shape[-1]
    if tail:
        y[..., :tail] += overlap
        overlap.copy_(torch.where(active[:, None, None], y[..., -tail:], overlap))
        y = y[..., :-tail]
    return y if bias is None else y + bias[:, None]

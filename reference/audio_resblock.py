"""Reference for `audio_resblock`: the residual unit beside the audio, and the convolution from or to the audio.

    y = resblock(conv(x))    or, with `after`,    y = conv(resblock(x))

Of whole signals only: convolutions are causal and padded with zeros. In streams, where each of the two ops has a
history, models call them one after the other, as they do where no backend has a kernel for both.
"""

from torch import Tensor

from .causal_conv1d import causal_conv1d
from .resblock import resblock


def audio_resblock(
    x: Tensor,  # [B, C_in, T] or, with `after`, [B, C, T]
    weight1: Tensor,  # as in `resblock`, of C channels
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    audio_weight: Tensor,  # [C, C_in, K] or, with `after`, [C_out, C, K]
    audio_bias: Tensor,
    *,
    after: bool = False,  # the convolution follows the unit
    dilation: int = 1,
    post: str = "none",  # of the unit
) -> Tensor:  # [B, C, T] or, with `after`, [B, C_out, T]
    if not after:
        x = causal_conv1d(x, audio_weight, audio_bias, pad=(audio_weight.shape[2] - 1, 0))
    left = (weight1.shape[2] - 1) * dilation
    x = resblock(x, weight1, bias1, weight2, bias2, dilation=dilation, pad=(left, 0), post=post)
    if after:
        x = causal_conv1d(x, audio_weight, audio_bias, pad=(audio_weight.shape[2] - 1, 0))
    return x

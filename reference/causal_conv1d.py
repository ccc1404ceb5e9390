"""Reference of `causal_conv1d`: [activation ->] strided, dilated convolution + bias [-> activation] [+ residual].

    y[b, o, t] = post( bias[o] + sum_{c, k} weight[o, c, k] * pre(x)[b, c, t * stride + k * dilation - pad_left] ) + r

Offline, `pad` gives the samples added left and right. Streaming, `history` [B, C, pad_left] holds what came before
and is updated in place for the active rows; the right is never padded but at the end of a stream.
Follows transformers' `MimiConv1d` and moshi's `StreamingConv1d`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"none": lambda x: x, "elu": F.elu, "silu": F.silu}  # each maps 0 to 0, so zero padding commutes


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
    first: Tensor | None = None,  # [B] bool: rows at the start of their stream
    active: Tensor | None = None,  # [B] bool: rows whose history advances
) -> Tensor:  # [B, C_out, T_out]
    """`pad_mode` is 'constant' (zeros), 'replicate' or 'reflect' (offline only); activations 'none', 'elu', 'silu'."""
    if history is None:
        x = pad1d(x, pad, pad_mode)
    else:
        x = pad1d(with_history(x, history, first, active, pad_mode), (0, pad[1]), pad_mode)
    with ieee_convolutions(x):
        y = F.conv1d(ACTIVATIONS[pre](x), weight, bias, stride=stride, dilation=dilation, groups=groups)
    y = ACTIVATIONS[post](y)
    return y if residual is None else y + residual


@contextmanager
def ieee_convolutions(x: Tensor) -> Iterator[None]:
    """fp32 means fp32: on a GPU, cuDNN would convolve x in TF32, PyTorch's default, and codes would change."""
    if x.device.type != "cuda" or x.dtype != torch.float32:
        yield
        return
    if torch.compiler.is_compiling():  # the switch would not be in the graph
        raise RuntimeError("the reference's fp32 convolutions cannot be compiled for a GPU: they would run in TF32")
    flags: Any = torch.backends.cudnn
    name = "allow_tf32"
    if hasattr(flags, "conv"):  # torch >= 2.9, where reading the old flag may fail once the new one is used
        flags, name = flags.conv, "fp32_precision"
    before = getattr(flags, name)
    setattr(flags, name, "ieee" if name == "fp32_precision" else False)
    try:
        yield
    finally:
        setattr(flags, name, before)


def with_history(x: Tensor, history: Tensor, first: Tensor | None, active: Tensor | None, pad_mode: str) -> Tensor:
    """x [B, C, T] behind its history [B, C, P] -> [B, C, P + T]; the history moves on where `active`."""
    assert first is not None and active is not None, "a history comes with `first` and `active`"
    length = history.shape[-1]
    past = history
    if pad_mode == "replicate" and length:
        past = torch.where(first[:, None, None], x[..., :1], history)
    x = torch.cat([past, x], dim=-1)
    if length:
        history.copy_(torch.where(active[:, None, None], x[..., -length:], history))
    return x


def pad1d(x: Tensor, pad: tuple[int, int], mode: str) -> Tensor:
    """Pad the last dimension; 'reflect' on less than it mirrors first gets zeros on the right, as in the peers."""
    if pad == (0, 0):
        return x
    missing = max(pad) - x.shape[-1] + 1 if mode == "reflect" else 0
    if missing <= 0:
        return F.pad(x, pad, mode)
    y = F.pad(F.pad(x, (0, missing)), pad, mode)
    return y[..., : y.shape[-1] - missing]

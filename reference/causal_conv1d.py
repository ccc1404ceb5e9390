"""Reference for `causal_conv1d`: [activation ->] strided, dilated convolution + bias [+ residual] [-> activation].

    y[b, o, t] = post( bias[o] + sum_{c, k} weight[o, c, k] * pre(x)[b, c, t * stride + k * dilation - pad_left] + r )

`pre` and `post` are activations; r is the residual. When a whole signal is processed at once (offline), `pad` is the
number of samples padded on the left and on the right. When streaming, the left padding is `history` [B, pad_left, C],
the last samples of the previous calls, which is updated in place for the active batch rows. On the right, a stream is
padded at its end only.

The state of streams may be that of a pool, of S streams: then `rows` names the row of `history`, `first` and `active`
that each batch row continues, and B in their shapes is S. A row may be named more than once if it is not active.

Follows transformers' `MimiConv1d` and moshi's `StreamingConv1d`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"none": lambda x: x, "elu": F.elu, "silu": F.silu}  # all map 0 to 0: padding before or after is the same

# In bf16, oneDNN's strided convolutions of fewer channels are wrong on processors with AMX (PyTorch 2.6 to 2.14).
FEW_CHANNELS = 32


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
    scales: Tensor | None = None,  # [C_out]: the weight is these times int8 values, which a kernel may use
    history: Tensor | None = None,  # [B, pad[0], C], mutated
    first: Tensor | None = None,  # [B] bool: rows at the start of their stream
    active: Tensor | None = None,  # [B] bool: rows whose history advances
    rows: Tensor | None = None,  # [B] int64: rows of a pool's state
) -> Tensor:  # [B, C_out, T_out]
    """`pad_mode` is 'constant' (zeros), 'replicate' or, offline only, 'reflect'. `pre` and `post` name ACTIVATIONS."""
    if history is None:
        x = pad1d(x, pad, pad_mode)
    else:
        x = pad1d(with_history(x, history, first, active, rows, pad_mode), (0, pad[1]), pad_mode)
    x = ACTIVATIONS[pre](x)
    with ieee_convolutions(x):
        if not is_bf16_on_cpu(x):
            y = F.conv1d(x, weight, bias, stride=stride, dilation=dilation, groups=groups)
        elif stride > 1 and groups == 1 and x.shape[1] < FEW_CHANNELS:
            with torch.autocast("cpu", enabled=False):
                bias = None if bias is None else bias.float()
                y = F.conv1d(x.float(), weight.float(), bias, stride, 0, dilation).bfloat16()
        else:
            y = F.conv2d(as_image(x), weight.unsqueeze(2), bias, (1, stride), 0, (1, dilation), groups).squeeze(2)
    return ACTIVATIONS[post](y if residual is None else y + residual)


def is_bf16_on_cpu(x: Tensor) -> bool:
    """Whether a convolution of x runs in bf16 on a CPU, as in training with mixed precision.

    oneDNN computes those channels-last. F.conv1d has the usual layout and transposes before and after, which takes as
    long as the convolution; F.conv2d does not, nor do the activations between, for a tensor that is channels-last.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return dtype == torch.bfloat16


def as_image(x: Tensor) -> Tensor:
    """[B, C, T] -> [B, C, 1, T], channels-last."""
    # one channel is contiguous in any layout; strides [T, 1, 1] say that the result is to be channels-last
    last = x.squeeze(1).unsqueeze(2) if x.shape[1] == 1 else x.transpose(1, 2).contiguous()  # [B, T, C]
    return last.transpose(1, 2).unsqueeze(2)


@contextmanager
def ieee_convolutions(x: Tensor) -> Iterator[None]:
    """Disable TF32 for fp32 convolutions of x: it is PyTorch's default on a GPU, and would change the codes.

    Raises RuntimeError under `torch.compile` where TF32 would have to be disabled.
    """
    if x.device.type != "cuda" or x.dtype != torch.float32:
        yield
        return
    if torch.compiler.is_compiling():  # the compiled graph would not contain the setting
        raise RuntimeError("the reference's fp32 convolutions cannot be compiled for a GPU: they would run in TF32")
    flags: object = torch.backends.cudnn
    name = "allow_tf32"
    if hasattr(flags, "conv"):  # torch >= 2.9, where the old flag may not be read once the new one has been set
        flags, name = flags.conv, "fp32_precision"
    before = getattr(flags, name)
    setattr(flags, name, "ieee" if name == "fp32_precision" else False)
    try:
        yield
    finally:
        setattr(flags, name, before)


def with_history(
    x: Tensor, history: Tensor, first: Tensor | None, active: Tensor | None, rows: Tensor | None, pad_mode: str
) -> Tensor:
    """Prepend the history [B, P, C] to x [B, C, T] -> [B, C, P + T], and update it in place for the active rows.

    With 'replicate', the first sample stands in for the history of a row at the start of its stream.
    """
    assert first is not None and active is not None, "a history needs `first` and `active`"
    pool = history
    if rows is not None:
        history, first, active = history[rows], first[rows], active[rows]
    past = history.mT
    length = past.shape[-1]
    if pad_mode == "replicate" and length:
        past = torch.where(first[:, None, None], x[..., :1], past)
    x = torch.cat([past, x], dim=-1)
    if length:
        pool[... if rows is None else rows] = torch.where(active[:, None, None], x[..., -length:].mT, history)
    return x


def pad1d(x: Tensor, pad: tuple[int, int], mode: str) -> Tensor:
    """Pad the last dimension of x [B, C, T].

    A signal too short to be reflected is first extended with zeros on the right, as in transformers and moshi.
    """
    if pad == (0, 0):
        return x
    if mode == "constant" and is_bf16_on_cpu(x):
        return F.pad(as_image(x), pad).squeeze(2)
    missing = max(pad) - x.shape[-1] + 1 if mode == "reflect" else 0
    if missing <= 0:
        return F.pad(x, pad, mode)
    y = F.pad(F.pad(x, (0, missing)), pad, mode)
    return y[..., : y.shape[-1] - missing]

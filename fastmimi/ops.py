"""The op table: the units that have a reference, kernels, a test and a benchmark under one name. A leaf.

An op is what should be fused; `model.py` calls ops and never a kernel. Every implementation of an op has the
signature and the semantics of its reference, `reference/<op>.py`, where the arguments are described.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from .state import Lane

OPS: dict[str, str] = {
    "causal_conv1d": "[activation ->] causal, dilated, strided convolution + bias [-> activation] [+ residual]",
    "causal_conv_transpose1d": "[activation ->] transposed convolution, overlap-add, bias, trim",
    "resblock": "a SEANet residual unit: ELU, conv k3, ELU, conv k1, + input",
    "window_attention": "RoPE and causal attention over the last `window` positions, ring KV cache when streaming",
    "rvq_encode": "the residual chain of nearest-entry searches over all levels, in fp32",
    "rvq_decode": "sum over levels of the chosen codebook entries",
}


class Ops(NamedTuple):
    """One implementation of each op, bound by `dispatch.bind` for a (device, dtype)."""

    causal_conv1d: Callable[..., Tensor]
    causal_conv_transpose1d: Callable[..., Tensor]
    resblock: Callable[..., Tensor]
    window_attention: Callable[..., Tensor]
    rvq_encode: Callable[..., Tensor]
    rvq_decode: Callable[..., Tensor]


@dataclass
class Call:
    """What one pass through the model hands from layer to layer.

    ops: the bound implementations; lane: the streaming state of this direction, or None offline; lengths: [B] int64,
    the valid length of each row at the layer at hand (strided layers divide it), or None where rows are full.
    """

    ops: Ops
    lane: Lane | None = None
    lengths: Tensor | None = None

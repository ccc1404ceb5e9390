"""CPU kernel for `resblock`: ELU, dilated convolution, ELU, 1 x 1 convolution and skip, fused.

The audio is processed in chunks that stay in the caches of a thread, and the hidden channels are never written to
memory (native/conv.h). The unit with 64 channels moves 12 MB per second of audio; five separate passes would move 60
MB.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime import layout
from .._common import check_resblock
from ._abi import ACTIVATIONS
from ._native import native
from ._pack import check_dtypes, panels
from .causal_conv1d import by_taps, causal_conv1d, input_of, output_of


def resblock(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, *, dilation: int = 1,
    pad: tuple[int, int] = (0, 0), pad_mode: str = "constant", post: str = "none",
    shortcut_weight: Tensor | None = None, shortcut_bias: Tensor | None = None, scales: Tensor | None = None,
    history: Tensor | None = None, first: Tensor | None = None, active: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As in the reference; the result is channels-last."""
    check_dtypes(x, weight1, weight2, history)
    check_resblock(x, weight1, bias1, weight2, bias2, dilation, pad, history, rows)
    x = layout.channels_last(x)
    skip = x if shortcut_weight is None else causal_conv1d(x, shortcut_weight, shortcut_bias)
    y = layout.empty_channels_last(x, x.shape[1], x.shape[2])
    if not y.numel():
        return y
    hidden = panels(weight1, bias1, scales, "by taps", by_taps)
    outputs = panels(weight2, bias2, scales, "by taps", by_taps, first_scale=len(weight1))
    if hidden.kind != outputs.kind:  # one of them has been edited since it was quantized
        hidden, outputs = (panels(w, b, None, "by taps", by_taps) for w, b in ((weight1, bias1), (weight2, bias2)))
    native().keep(x, hidden, outputs, skip, y)
    source = input_of(x, pad, pad_mode, history, first, active, rows)
    target = output_of(y, outputs, skip)
    target.post = ACTIVATIONS[post]
    native().resblock(
        source, hidden.structure, outputs.structure, target, hidden.kind, dilation, y.shape[2],
        y.stride(0), skip.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    if history is not None and pad[0]:
        native().advance(source)
    return y

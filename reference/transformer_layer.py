"""Reference of `transformer_layer`: a pre-norm layer with LayerScale.

    y = x + scale1 * o(attention(q(n), k(n), v(n))), n = norm1(x);    then y + scale2 * fc2(activation(fc1(norm2(y))))

Weights are those of `nn.LayerNorm` and `nn.Linear`; the head dimension is that of the RoPE frequencies. Attention is
another op, whose kernel the dispatcher puts in the place of its reference. Follows transformers'
`MimiTransformerLayer` and moshi's `StreamingTransformerLayer`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .window_attention import window_attention

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def transformer_layer(
    x: Tensor,  # [B, T, C]
    norm1_weight: Tensor,  # [C]
    norm1_bias: Tensor,
    q: Tensor,  # [H * D, C]
    k: Tensor,  # [H_kv * D, C]
    v: Tensor,
    o: Tensor,  # [C, H * D]
    scale1: Tensor,  # [C]
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc1: Tensor,  # [F, C]
    fc2: Tensor,  # [C, F]
    scale2: Tensor,  # [C]
    inv_freq: Tensor,  # [D / 2] fp32
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    o_bias: Tensor | None = None,
    *,
    window: int,
    eps: float,
    activation: str | Callable[[Tensor], Tensor] = "gelu",
    rope_scale: float = 1.0,
    dropout: float = 0.0,
    attention: Callable[..., Tensor] = window_attention,
    **state: Tensor | None,  # offset, cache_k, cache_v, active: as for `window_attention`
) -> Tensor:  # [B, T, C]
    act = ACTIVATIONS[activation] if isinstance(activation, str) else activation
    normal = F.layer_norm(x, x.shape[-1:], norm1_weight, norm1_bias, eps)
    heads = [
        F.linear(normal, weight, bias).unflatten(-1, (-1, 2 * len(inv_freq))).transpose(1, 2)  # [B, H, T, D]
        for weight, bias in ((q, q_bias), (k, k_bias), (v, v_bias))
    ]
    y = attention(*heads, inv_freq, window=window, rope_scale=rope_scale, dropout=dropout, **state)
    x = x + scale1 * F.linear(y.transpose(1, 2).flatten(-2), o, o_bias)
    normal = F.layer_norm(x, x.shape[-1:], norm2_weight, norm2_bias, eps)
    return x + scale2 * F.linear(act(F.linear(normal, fc1)), fc2)

"""Reference for `transformer_layer`: a pre-norm transformer layer with optional LayerScale.

    y   = x + scale1 * o(attention(q(n), k(n), v(n))),    n = norm1(x)
    out = y + scale2 * fc2(activation(fc1(norm2(y))))

The norms are LayerNorm or RMSNorm (arXiv 1910.07467). Weights have the shapes of `nn.LayerNorm` and `nn.Linear`. The
head dimension D is twice the number of RoPE frequencies. Attention is an op of its own: the dispatcher passes the
kernel that it has chosen for it as `attention`. Follows transformers' `MimiTransformerLayer` and moshi's
`StreamingTransformerLayer`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
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
    norm1_bias: Tensor | None,
    q: Tensor,  # [H * D, C]
    k: Tensor,  # [H_kv * D, C]
    v: Tensor,
    o: Tensor,  # [C, H * D]
    scale1: Tensor | None,  # [C]
    norm2_weight: Tensor,
    norm2_bias: Tensor | None,
    fc1: Tensor,  # [F, C]
    fc2: Tensor,  # [C, F]
    scale2: Tensor | None,  # [C]
    inv_freq: Tensor,  # [D / 2] fp32
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    o_bias: Tensor | None = None,
    scales: Tensor | None = None,  # one per output of q, k, v, o, fc1 and fc2: as in `causal_conv1d`
    *,
    window: int,
    eps: float,
    norm: str = "layer",
    activation: str | Callable[[Tensor], Tensor] = "gelu",
    rope_scale: float = 1.0,
    dropout: float = 0.0,
    residual_dropout: float = 0.0,
    attention: Callable[..., Tensor] = window_attention,
    **state: Tensor | None,  # offset, cache_k, cache_v, active, rows: see `window_attention`
) -> Tensor:  # [B, T, C]
    """`norm` is 'layer' or 'rms'. `dropout` applies to the attention weights, `residual_dropout` to both branches."""
    act = ACTIVATIONS[activation] if isinstance(activation, str) else activation
    hidden = normalized(x, norm1_weight, norm1_bias, eps, norm)
    heads = [
        rearrange(F.linear(hidden, weight, bias), "b t (h d) -> b h t d", d=2 * len(inv_freq))
        for weight, bias in ((q, q_bias), (k, k_bias), (v, v_bias))
    ]
    y = attention(*heads, inv_freq, window=window, rope_scale=rope_scale, dropout=dropout, **state)
    y = F.dropout(F.linear(rearrange(y, "b h t d -> b t (h d)"), o, o_bias), residual_dropout)
    x = x + (y if scale1 is None else scale1 * y)
    hidden = normalized(x, norm2_weight, norm2_bias, eps, norm)
    y = F.dropout(F.linear(act(F.linear(hidden, fc1)), fc2), residual_dropout)
    return x + (y if scale2 is None else scale2 * y)


def normalized(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, norm: str) -> Tensor:
    """LayerNorm, or RMSNorm (which has no bias), over the last dimension of x [..., C]."""
    if norm == "rms":
        if bias is not None:
            raise ValueError("an RMSNorm has no bias, got one")
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

"""The bottleneck transformers (arXiv 2410.00037, section 3.3.1): pre-norm, RoPE, sliding window, LayerScale.

Parameters under transformers' names (`MimiTransformerModel`); a layer is one op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..runtime.ops import ForwardContext
from ..runtime.quantized import scales_of
from ..runtime.signatures import RingCaches
from ..runtime.state import StreamingModule
from .config import MimiCodecConfig
from .validation import ACTIVATIONS


def activation(name: str) -> str | Callable[[Tensor], Tensor]:
    """A feed-forward activation by transformers' name: the op's name for it, or the function of transformers."""
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    from transformers.activations import ACT2FN

    return ACT2FN[name]


def rope_frequencies(config: MimiCodecConfig) -> tuple[Tensor, float]:
    """Inverse frequencies [head_dim / 2] in fp32 and the scale of cos and sin, as transformers computes them."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default":
        steps = torch.arange(0, config.head_dim, 2, dtype=torch.float, device="cpu")
        return 1.0 / (rope.get("rope_theta", 10_000.0) ** (steps / config.head_dim)), 1.0
    from transformers import MimiConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    values = config.to_dict()
    base = values.pop("rope_theta")
    if not hasattr(MimiConfig(), "rope_parameters"):  # transformers 4
        values |= {"rope_theta": base, "rope_scaling": rope}
    with torch.device("cpu"):  # the model itself may be made on the meta device
        inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](MimiConfig(**values), torch.device("cpu"))
    if inv_freq.shape != (config.head_dim // 2,) or not inv_freq.isfinite().all():
        raise InputError(f"rope_parameters must give a finite frequency for each pair of features, got {rope}")
    return inv_freq.float(), float(scale)


class Rings(StreamingModule):
    """Self-attention over the last `window` positions: its state are ring buffers of keys and values."""

    head_dim: int
    kv_heads: int
    window: int

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        ring = (batch, self.kv_heads, self.window, self.head_dim)
        return {f"{self.name}.k": ring, f"{self.name}.v": ring}

    def state(self, context: ForwardContext) -> RingCaches:
        """The op's arguments for the streaming state; none offline."""
        if (state := context.state) is None:
            return {}
        cache_k, cache_v = (state.buffers[f"{self.name}.{kind}"] for kind in "kv")
        rings: RingCaches = {"cache_k": cache_k, "cache_v": cache_v}
        return {"offset": state.offset, **rings, "active": state.active, "rows": state.rows}


class Attention(Rings, nn.Module):
    """The parameters of self-attention over the last `sliding_window` positions."""

    def __init__(self, config: MimiCodecConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.window = config.sliding_window
        self.dropout = config.attention_dropout
        self.kv_heads = config.num_key_value_heads
        wide, narrow = config.num_attention_heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, wide, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, narrow, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, narrow, bias=config.attention_bias)
        self.o_proj = nn.Linear(wide, config.hidden_size, bias=config.attention_bias)


class FeedForward(nn.Module):
    """The parameters hidden_size -> intermediate_size -> hidden_size."""

    def __init__(self, config: MimiCodecConfig):
        super().__init__()
        self.activation = activation(config.hidden_act)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)


class LayerScale(nn.Module):
    """A learnt scale per channel (arXiv 2103.17239), starting at 0.01."""

    def __init__(self, config: MimiCodecConfig):
        super().__init__()
        self.scale = nn.Parameter(torch.full((config.hidden_size,), config.layer_scale_initial_scale))


class TransformerLayer(nn.Module):
    """[B, T, hidden] -> the same: one op; the modules own its parameters, under transformers' names."""

    def __init__(self, config: MimiCodecConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn_layer_scale = LayerScale(config)
        self.mlp_layer_scale = LayerScale(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, float], context: ForwardContext) -> Tensor:
        attn, mlp, norm1, norm2 = self.self_attn, self.mlp, self.input_layernorm, self.post_attention_layernorm
        biases = (attn.q_proj.bias, attn.k_proj.bias, attn.v_proj.bias, attn.o_proj.bias)
        return context.ops.transformer_layer(
            x, norm1.weight, norm1.bias,
            attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight, attn.o_proj.weight,
            self.self_attn_layer_scale.scale, norm2.weight, norm2.bias, mlp.fc1.weight, mlp.fc2.weight,
            self.mlp_layer_scale.scale, rope[0], *biases,
            scales_of(attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj, mlp.fc1, mlp.fc2),
            window=attn.window, eps=norm1.eps, activation=mlp.activation, rope_scale=rope[1],
            dropout=attn.dropout if self.training else 0.0, **attn.state(context),
        )  # fmt: skip


class Transformer(nn.Module):
    """[B, hidden_size, T] -> the same; recomputes each layer in backward where `gradient_checkpointing` is set."""

    def __init__(self, config: Any, layer: Callable[[Any], nn.Module] = TransformerLayer):
        super().__init__()
        self.layers = nn.ModuleList(layer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
        # a plain tensor, not a buffer: `.half()` and the like must not round the frequencies
        self._inv_freq, self._rope_scale = rope_frequencies(config)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        if self._inv_freq.device != x.device:
            self._inv_freq = self._inv_freq.to(x.device)
        rope = (self._inv_freq, self._rope_scale)
        x = x.transpose(1, 2)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(layer, x, rope, context, use_reentrant=False)
            else:
                x = layer(x, rope, context)
        return x.transpose(1, 2)

"""The bottleneck transformers (arXiv 2410.00037, section 3.3.1): pre-norm, RoPE, sliding window, LayerScale.

Parameters under transformers' names (`MimiTransformerModel`); attention is an op, plain GEMMs are `nn.Linear`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import CodecConfig
from .errors import InputError
from .ops import Call

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """A feed-forward activation by transformers' name; names beyond the usual ones are looked up there."""
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise InputError(f"hidden_act must be one of {', '.join(sorted(ACT2FN))}, got {name!r}")
    return ACT2FN[name]


def rope_frequencies(config: CodecConfig) -> tuple[Tensor, float]:
    """Inverse frequencies [head_dim / 2] in fp32 and the scale of cos and sin, as transformers computes them."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default":
        steps = torch.arange(0, config.head_dim, 2, dtype=torch.float, device="cpu")
        return 1.0 / (rope.get("rope_theta", 10_000.0) ** (steps / config.head_dim)), 1.0
    if kind in ("dynamic", "longrope"):
        raise InputError(
            f"rope_type {kind!r} changes the frequencies with the length, so that no chunking equals the whole; "
            "use 'default', 'linear', 'yarn' or 'llama3'"
        )
    from transformers import MimiConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if kind not in ROPE_INIT_FUNCTIONS:
        raise InputError(f"rope_type must be one of default, {', '.join(ROPE_INIT_FUNCTIONS)}, got {kind!r}")
    values = config.to_dict()
    values.pop("rope_theta")
    with torch.device("cpu"):  # the model itself may be made on the meta device
        inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](MimiConfig(**values), torch.device("cpu"))
    return inv_freq.float(), float(scale)


class Attention(nn.Module):
    """Self-attention over the last `sliding_window` positions, [B, T, hidden] -> [B, T, hidden]."""

    name = ""  # path in the model, the key of its state; set by the model

    def __init__(self, config: CodecConfig):
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

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        ring = (batch, self.kv_heads, self.window, self.head_dim)
        return {f"{self.name}.k": ring, f"{self.name}.v": ring}

    def forward(self, x: Tensor, rope: tuple[Tensor, float], call: Call) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H, T, D]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        state: dict[str, Tensor] = {}
        if (lane := call.lane) is not None:
            rings = {f"cache_{kind}": lane.buffers[f"{self.name}.{kind}"] for kind in "kv"}
            state = {"offset": lane.offset, "active": lane.active, **rings}
        dropout = self.dropout if self.training else 0.0
        y = call.ops.window_attention(
            q, k, v, rope[0], window=self.window, rope_scale=rope[1], dropout=dropout, **state
        )
        return self.o_proj(y.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """[B, T, hidden] -> intermediate -> [B, T, hidden]."""

    def __init__(self, config: CodecConfig):
        super().__init__()
        self.activation = activation(config.hidden_act)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class LayerScale(nn.Module):
    """A learnt scale per channel (arXiv 2103.17239), starting at 0.01."""

    def __init__(self, config: CodecConfig):
        super().__init__()
        self.scale = nn.Parameter(torch.full((config.hidden_size,), config.layer_scale_initial_scale))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


class TransformerLayer(nn.Module):
    def __init__(self, config: CodecConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn_layer_scale = LayerScale(config)
        self.mlp_layer_scale = LayerScale(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, float], call: Call) -> Tensor:
        x = x + self.self_attn_layer_scale(self.self_attn(self.input_layernorm(x), rope, call))
        return x + self.mlp_layer_scale(self.mlp(self.post_attention_layernorm(x)))


class Transformer(nn.Module):
    """[B, hidden_size, T] -> the same; recomputes each layer in backward where `gradient_checkpointing` is set."""

    def __init__(self, config: CodecConfig):
        super().__init__()
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
        # a plain tensor, not a buffer: `.half()` and the like must not round the frequencies
        self._inv_freq, self._rope_scale = rope_frequencies(config)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        if self._inv_freq.device != x.device:
            self._inv_freq = self._inv_freq.to(x.device)
        rope = (self._inv_freq, self._rope_scale)
        x = x.transpose(1, 2)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(layer, x, rope, call, use_reentrant=False)
            else:
                x = layer(x, rope, call)
        return x.transpose(1, 2)

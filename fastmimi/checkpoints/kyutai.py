"""Conversion between Kyutai's checkpoint layout and the flat layout of fastmimi's own state dicts.

Kyutai's layout is that of `tokenizer-*.safetensors` files, which moshi and rustymimi read. It differs in three ways:

- parameters have other names;
- the projections to queries, keys and values are one matrix;
- the rows of the query and key projections are in another order, because RoPE rotates other pairs of dimensions:
  (2i, 2i + 1) in Kyutai's layout, (i, i + head_dim / 2) in transformers' and here.

Pocket TTS writes the same names with one module less around each convolution (`conv.` where moshi has `conv.conv.`).
Its Mimi has no codebooks, but a projection of the latents that its language model generates.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, named
from ..models.config import MimiCodecConfig
from ..models.continuous import ContinuousMimiConfig

FILE_NAME = "tokenizer-e351c8d8-checkpoint125.safetensors"  # in Kyutai's hub repositories

SPELLINGS = (  # names in older released files -> the names in moshi's current modules
    (r"\.in_proj_weight$", ".in_projs.0.weight"),
    (r"\.in_proj\.weight$", ".in_projs.0.weight"),
    (r"\.out_proj\.weight$", ".out_projs.0.weight"),
    (r"\._codebook\.inited$", "._codebook._initialized"),
    (r"\._codebook\.cluster_size$", "._codebook.cluster_usage"),
    (r"\._codebook\.embed_(avg|sum)$", "._codebook.embedding_sum"),
)
TO_FLAT = (  # Kyutai's names -> flat names
    (r"^(encoder|decoder)\.model\.(\d+)\.convtr\.(?:convtr\.)?", r"\1.layers.\2.conv."),
    (r"^(encoder|decoder)\.model\.(\d+)\.(block\.\d+\.|shortcut\.|)conv\.(?:conv\.)?", r"\1.layers.\2.\3conv."),
    (r"^downsample\.conv\.conv\.(?:conv\.)?", "downsample.conv."),
    (r"^upsample\.convtr\.convtr\.(?:convtr\.)?", "upsample.conv."),
    (r"^quantizer\.output_proj\.", "projection.conv."),
    (r"^(\w+_transformer)\.transformer\.layers\.", r"\1.layers."),
    (r"\.out_projs\.0\.", ".o_proj."),
    (r"\.norm1\.", ".input_layernorm."),
    (r"\.norm2\.", ".post_attention_layernorm."),
    (r"\.linear1\.", ".mlp.fc1."),
    (r"\.linear2\.", ".mlp.fc2."),
    (r"\.layer_scale_1\.", ".self_attn_layer_scale."),
    (r"\.layer_scale_2\.", ".mlp_layer_scale."),
    (r"^quantizer\.rvq_first\.", "quantizer.semantic_residual_vector_quantizer."),
    (r"^quantizer\.rvq_rest\.", "quantizer.acoustic_residual_vector_quantizer."),
    (r"\.vq\.layers\.", ".layers."),
    (r"\._codebook\._initialized$", ".codebook.initialized"),
    (r"\._codebook\.cluster_usage$", ".codebook.cluster_usage"),
    (r"\._codebook\.embedding_sum$", ".codebook.embed_sum"),
)
FROM_FLAT = (  # flat names -> Kyutai's names, except for SEANet's convolutions, see `_kyutai_name`
    (r"^downsample\.conv\.", "downsample.conv.conv.conv."),
    (r"^upsample\.conv\.", "upsample.convtr.convtr.convtr."),
    (r"^(\w+_transformer)\.layers\.", r"\1.transformer.layers."),
    (r"\.o_proj\.", ".out_proj."),
    (r"\.input_layernorm\.", ".norm1."),
    (r"\.post_attention_layernorm\.", ".norm2."),
    (r"\.mlp\.fc1\.", ".linear1."),
    (r"\.mlp\.fc2\.", ".linear2."),
    (r"\.self_attn_layer_scale\.", ".layer_scale_1."),
    (r"\.mlp_layer_scale\.", ".layer_scale_2."),
    (r"^(quantizer\.\w+)\.layers\.", r"\1.vq.layers."),
    (r"^quantizer\.semantic_residual_vector_quantizer\.", "quantizer.rvq_first."),
    (r"^quantizer\.acoustic_residual_vector_quantizer\.", "quantizer.rvq_rest."),
    (r"\.codebook\.initialized$", "._codebook._initialized"),
    (r"\.codebook\.cluster_usage$", "._codebook.cluster_usage"),
    (r"\.codebook\.embed_sum$", "._codebook.embedding_sum"),
)


SEANET = {  # fields of a MimiCodecConfig -> keys of Kyutai's section "seanet"
    "audio_channels": "channels", "hidden_size": "dimension", "num_filters": "n_filters",
    "num_residual_layers": "n_residual_layers", "upsampling_ratios": "ratios", "kernel_size": "kernel_size",
    "last_kernel_size": "last_kernel_size", "residual_kernel_size": "residual_kernel_size",
    "dilation_growth_rate": "dilation_base", "compress": "compress", "pad_mode": "pad_mode",
}  # fmt: skip


def seanet_fields(seanet: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `MimiCodecConfig` that moshi's and Pocket TTS's configurations hold in the section "seanet"."""
    return {field: seanet[key] for field, key in SEANET.items()}


def is_kyutai(state: Iterable[str]) -> bool:
    """Whether the names of a state dict are those of Kyutai's layout."""
    return any(name.startswith("encoder.model.") for name in state)


def mimi_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a Mimi: of a file of Pocket TTS, those under `mimi.`, without it; of any other file, all."""
    if not any(name.startswith("mimi.encoder.model.") for name in state):
        return dict(state)
    return {name.removeprefix("mimi."): tensor for name, tensor in state.items() if name.startswith("mimi.")}


def flat_name(name: str) -> str:
    """The flat name of a parameter; fused projections end in `.in_projs.0.weight`."""
    return _substitute(_substitute(name, SPELLINGS), TO_FLAT)


def to_flat(state: Mapping[str, Tensor], config: MimiCodecConfig | ContinuousMimiConfig) -> dict[str, Tensor]:
    """Convert a state dict in Kyutai's layout, in any of its spellings, to the flat layout.

    A tensor of a wrong shape or with an unknown name is passed on, for `weights.fill` to report.
    """
    flat: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = flat_name(name)
        half = config.half_of(name) if isinstance(config, ContinuousMimiConfig) else config
        rows = (half.num_attention_heads + 2 * half.num_key_value_heads) * half.head_dim
        if name.endswith(".in_projs.0.weight") and tensor.dim() == 2 and len(tensor) == rows:
            base = name.removesuffix("in_projs.0.weight")
            flat |= {f"{base}{part}_proj.weight": t for part, t in split_projections(tensor, half).items()}
        else:
            flat[name] = tensor
    return flat


def shapes_of_flat(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict in Kyutai's layout to flat names and shapes, without a configuration.

    The shapes are those of the flat layout, the values are not: rows of queries and keys keep Kyutai's order.
    Raises InputError if a projection cannot be split into queries, keys and values.
    """
    flat: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = flat_name(name)
        if name.endswith(".in_projs.0.weight"):
            base = name.removesuffix("in_projs.0.weight")
            width = tensor.shape[-1] if tensor.dim() == 2 else 0
            kv_rows, remainder = divmod(len(tensor) - width if width else -1, 2)
            if kv_rows < 1 or remainder:
                raise InputError(
                    f"{named(name)} must hold rows for queries, keys and values, got {tuple(tensor.shape)}"
                )
            parts = zip("qkv", tensor.split([width, kv_rows, kv_rows]), strict=True)
            flat |= {f"{base}{part}_proj.weight": t for part, t in parts}
        else:
            flat[name] = tensor
    return flat


def from_flat(state: Mapping[str, Tensor], config: MimiCodecConfig) -> dict[str, Tensor]:
    """Convert a flat state dict to Kyutai's layout, in the spelling of the released files.

    moshi and rustymimi both read that spelling. Raises InputError for a configuration that the layout cannot represent.
    """
    if config.attention_bias or config.num_attention_heads * config.head_dim != config.hidden_size:
        raise InputError(
            "Kyutai's layout requires attention without biases and heads * head_dim = hidden_size; got attention_bias="
            f"{config.attention_bias}, {config.num_attention_heads} heads of {config.head_dim} for {config.hidden_size}"
        )
    transposed = _transposed_layers(config)
    out = {}
    for name, tensor in state.items():
        if name.endswith(".q_proj.weight"):
            base = name.removesuffix("q_proj.weight")
            rows = [_to_pairs(state[f"{base}{part}_proj.weight"], config.head_dim) for part in "qk"]
            out[_kyutai_name(base, transposed) + "in_proj_weight"] = torch.cat([*rows, state[f"{base}v_proj.weight"]])
        elif not name.endswith((".k_proj.weight", ".v_proj.weight")):
            out[_kyutai_name(name, transposed)] = tensor
    return out


def split_projections(weight: Tensor, config: MimiCodecConfig) -> dict[str, Tensor]:
    """[(H + 2 H_kv) * D, hidden] -> q, k and v, with the rows of q and k in flat order."""
    kv_rows = config.num_key_value_heads * config.head_dim
    q, k, v = weight.split([weight.shape[0] - 2 * kv_rows, kv_rows, kv_rows])
    return {"q": _to_halves(q, config.head_dim), "k": _to_halves(k, config.head_dim), "v": v}


def _to_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of each head: RoPE's pairs move from (2i, 2i + 1) to (i, i + D / 2)."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _to_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of each head: RoPE's pairs move from (i, i + D / 2) to (2i, 2i + 1)."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _transposed_layers(config: MimiCodecConfig) -> set[str]:
    """The indices of the transposed convolutions in the decoder's layers."""
    step = 2 + config.num_residual_layers
    return {str(2 + i * step) for i in range(len(config.upsampling_ratios))}


def _kyutai_name(name: str, transposed: set[str]) -> str:
    """The name in Kyutai's layout of a flat name; `transposed` are the indices of transposed convolutions."""
    match = re.match(r"^(encoder|decoder)\.layers\.(\d+)\.(block\.\d+\.|shortcut\.|)conv\.(.+)$", name)
    if match is None:
        return _substitute(name, FROM_FLAT)
    half, layer, inner, parameter = match.groups()
    kind = "convtr" if half == "decoder" and not inner and layer in transposed else "conv"
    return f"{half}.model.{layer}.{inner}{kind}.{kind}.{parameter}"


def _substitute(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name

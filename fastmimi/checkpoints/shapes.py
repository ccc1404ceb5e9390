"""Infer a configuration from the shapes in a checkpoint, or compare one with its size. No values are read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import Tensor

from ..errors import InputError
from ..models.config import AnyConfig, MimiCodecConfig
from ..models.continuous import ContinuousMimiConfig, pocket_half
from . import kyutai

OF_POCKET_TTS = {512: (8, 250), 128: (4, 50)}  # width of a half -> its heads and its attention window
MAX_SIZE_RATIO = 4  # between parameters of checkpoint and model; up to that, the model is built and misfits are listed


def check_size(config: AnyConfig, state: Mapping[str, Tensor], source: object) -> None:
    """Raise InputError if the configuration describes a much larger or smaller model than the checkpoint holds.

    Otherwise a wrong configuration could make `load` spend minutes on building a model that the checkpoint does not
    fill.
    """
    described, held = config.num_parameters, sum(tensor.numel() for tensor in state.values())
    if not held <= MAX_SIZE_RATIO * described or not described <= MAX_SIZE_RATIO * held:
        raise InputError(
            f"the configuration describes a model of {described:,} parameters, and {source} holds {held:,}"
        )


def infer_config(state: Mapping[str, Tensor]) -> MimiCodecConfig | ContinuousMimiConfig:
    """Infer the configuration of a Mimi from the shapes of its state dict, in Kyutai's layout or the flat one.

    What shapes do not determine is taken from kyutai/mimi: heads of 64 dimensions, the attention window, RoPE's base,
    the dilation of residual layers and so on. Raises InputError, naming the tensor, if it is no checkpoint of a Mimi.
    """
    if kyutai.is_kyutai(state):
        state = kyutai.shapes_of_flat(state)
    if "projection.conv.weight" in state:
        return ContinuousMimiConfig(
            encoder=_infer_half(state, "encoder"),
            decoder=_infer_half(state, "decoder"),
            encoded_size=_shape(state, "downsample.conv.weight", 3)[0],
            latent_size=_shape(state, "projection.conv.weight", 3)[1],
        )
    first = _shape(state, "encoder.layers.0.conv.weight", 3)
    hidden = _shape(state, "decoder.layers.0.conv.weight", 3)[1]
    *upsampling, last = [
        name for name, number in _layers(state, r"decoder\.layers\.(\d+)\.conv\.weight") if number
    ] or [""]
    ratios = [_shape(state, name, 3)[2] // 2 for name in upsampling]
    blocks = [name for name, _ in _layers(state, r"decoder\.layers\.(\d+)\.block\.1\.conv\.weight")]
    block = _shape(state, blocks[0] if blocks else "decoder.layers.3.block.1.conv.weight", 3)
    q_proj = _shape(state, "encoder_transformer.layers.0.self_attn.q_proj.weight", 2)
    k_proj = _shape(state, "encoder_transformer.layers.0.self_attn.k_proj.weight", 2)
    fc1 = _shape(state, "encoder_transformer.layers.0.mlp.fc1.weight", 2)
    semantic = len(_layers(state, r"quantizer\.semantic\w+\.layers\.(\d+)\.codebook\.embed_sum"))
    acoustic = len(_layers(state, r"quantizer\.acoustic\w+\.layers\.(\d+)\.codebook\.embed_sum"))
    codebook = _shape(state, "quantizer.semantic_residual_vector_quantizer.layers.0.codebook.embed_sum", 2)
    if not ratios:
        raise InputError("this is not a Mimi checkpoint: its decoder has no transposed convolutions")
    head_dim = 64 if q_proj[0] % 64 == 0 else q_proj[0] // MimiCodecConfig.num_attention_heads
    resampled = "upsample.conv.weight" in state
    return MimiCodecConfig(
        audio_channels=first[1],
        hidden_size=hidden,
        num_filters=first[0],
        num_residual_layers=len(blocks) // len(ratios),
        upsampling_ratios=ratios,
        kernel_size=first[2],
        last_kernel_size=_shape(state, last, 3)[2],
        residual_kernel_size=block[2],
        compress=block[1] // block[0],
        codebook_size=codebook[0],
        codebook_dim=codebook[1],
        vector_quantization_hidden_dimension=codebook[1],
        num_quantizers=semantic + acoustic,
        num_semantic_quantizers=semantic,
        use_conv_shortcut=any(".shortcut." in name for name in state),
        upsample_groups=hidden // _shape(state, "upsample.conv.weight", 3)[1] if resampled else hidden,
        num_hidden_layers=len(_layers(state, r"encoder_transformer\.layers\.(\d+)\.self_attn\.q_proj\.weight")),
        intermediate_size=fc1[0],
        num_attention_heads=q_proj[0] // max(head_dim, 1),
        num_key_value_heads=k_proj[0] // max(head_dim, 1),
        head_dim=head_dim,
        attention_bias="encoder_transformer.layers.0.self_attn.q_proj.bias" in state,
        frame_rate=0.0 if resampled else MimiCodecConfig.sampling_rate / math.prod(ratios),
    )


def _infer_half(state: Mapping[str, Tensor], half: str) -> MimiCodecConfig:
    """The configuration of one half of Pocket TTS's Mimi; heads and window are those published for its width."""
    encodes = half == "encoder"
    names = [name for name, _ in _layers(state, rf"{half}\.layers\.(\d+)\.conv\.weight")]
    names = names or [f"{half}.layers.0.conv.weight"]
    shapes = [_shape(state, name, 3) for name in (names if encodes else names[::-1])]  # from the audio on
    blocks = [name for name, _ in _layers(state, rf"{half}\.layers\.(\d+)\.block\.1\.conv\.weight")]
    block = _shape(state, blocks[0] if blocks else f"{half}.layers.1.block.1.conv.weight", 3)
    slow, fast = (0, 1) if encodes else (1, 0)  # the dimensions of a weight for the latents' side, the audio's side
    kernels, width = [shape[2] for shape in shapes], shapes[-1][slow]
    if width not in OF_POCKET_TTS:
        known = " or ".join(map(str, OF_POCKET_TTS))
        raise InputError(f"without a config.json, the {half} must be {known} wide, as in Pocket TTS, got {width}")
    heads, window = OF_POCKET_TTS[width]
    return pocket_half(
        audio_channels=shapes[0][fast],
        hidden_size=width,
        upsample_groups=width,
        num_filters=shapes[0][slow],
        num_residual_layers=len(blocks) // max(1, len(shapes) - 2),
        upsampling_ratios=[kernel // 2 for kernel in kernels[-2:0:-1]],
        kernel_size=kernels[0] if encodes else kernels[-1],
        last_kernel_size=kernels[-1] if encodes else kernels[0],
        residual_kernel_size=block[2],
        compress=block[1] // block[0],
        num_hidden_layers=len(_layers(state, rf"{half}_transformer\.layers\.(\d+)\.mlp\.fc1\.weight")),
        intermediate_size=_shape(state, f"{half}_transformer.layers.0.mlp.fc1.weight", 2)[0],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        sliding_window=window,
    )


def _shape(state: Mapping[str, Tensor], name: str, rank: int) -> tuple[int, ...]:
    """The shape of a tensor. Raises InputError if it is missing, empty, or of another rank."""
    if name not in state:
        raise InputError(f"this is not a Mimi checkpoint: it has no {name}, and there is no config.json next to it")
    shape = tuple(state[name].shape)
    if len(shape) != rank or 0 in shape:
        raise InputError(f"this is not a Mimi checkpoint: {name} must have {rank} non-empty dimensions, got {shape}")
    return shape


def _layers(state: Mapping[str, Tensor], pattern: str) -> list[tuple[str, int]]:
    """The names that match a pattern, each with the layer index that its group captures, in the order of layers."""
    found = [(name, int(match[1])) for name in state if (match := re.fullmatch(pattern, name)) and len(match[1]) < 5]
    return sorted(found, key=lambda item: item[1])

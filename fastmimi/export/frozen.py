"""A codec as it is exported: with rounded weights, one direction of it, codebooks computed once."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..checkpoints.weights import fill
from ..models.codec import Codec
from ..models.quantizer import ResidualQuantizer, SplitQuantizer
from ..models.registry import build
from ..runtime import quantized

WEIGHTS = ("float32", "float16", "int8")
LAYERS = (nn.Linear, nn.Conv1d, nn.ConvTranspose1d)


@torch.inference_mode(False)  # as in `load`
def rounded(model: Codec, weights: str) -> Codec:
    """A copy on the CPU whose weights are what `weights`, one of `WEIGHTS`, can store; it computes in fp32.

    Only weights of layers are rounded. Codebooks stay exact, so that codes keep their meaning.
    """
    with torch.device("meta"):
        codec = build(model.config)
    fill(codec, {name: tensor.detach().cpu().float() for name, tensor in model.state_dict().items()})
    codec.num_codebooks = model.num_codebooks
    codec = codec.eval().requires_grad_(False)
    for module in codec.modules():
        if parametrize.is_parametrized(module):  # weight norm
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    for layer in _layers(codec):
        if weights == "int8":
            quantized.round_weights(layer)
        elif weights == "float16":
            layer.weight = nn.Parameter(layer.weight.half().float(), requires_grad=False)
    return codec


def _layers(codec: Codec) -> list[nn.Linear | nn.Conv1d | nn.ConvTranspose1d]:
    """The layers of both directions, without the quantizer's projections, which codes depend on."""
    parts = [part for direction in ("encode", "decode") for part in codec.parts(direction) if part is not None]
    return [module for part in parts for module in part.modules() if isinstance(module, LAYERS)]


class FrozenCodec(nn.Module):
    """One direction of a `rounded` codec, "encode" or "decode", whose parameters it takes: the codec is used up.

    codec: with the modules of that direction only. quantizer: with the entries of the codec's `num_codebooks`.
    """

    def __init__(self, codec: Codec, direction: str, weights: str):
        super().__init__()
        self.direction = direction
        split, semantic = codec.quantizer, codec.config.num_semantic_quantizers
        self.quantizer = SplitQuantizer(
            FrozenQuantizer(split.semantic_residual_vector_quantizer, semantic, direction),
            FrozenQuantizer(split.acoustic_residual_vector_quantizer, codec.num_codebooks - semantic, direction),
        )
        for layer in _layers(codec):
            _store(layer, weights)
        kept = [part for part in codec.parts(direction) if part is not None]
        for name, child in list(codec.named_children()):
            if not any(child is part for part in kept):
                setattr(codec, name, None)
        self.codec = codec


class FrozenQuantizer(ResidualQuantizer):
    """The first levels of a quantizer, their entries computed once."""

    table: Tensor

    def __init__(self, quantizer: ResidualQuantizer, levels: int, direction: str):
        super().__init__()
        self.input_proj = quantizer.input_proj if direction == "encode" else None
        self.output_proj = quantizer.output_proj if direction == "decode" else None
        self.register_buffer("table", quantizer.codebooks()[:levels].clone())  # [L, S, D]

    def __len__(self) -> int:
        return len(self.table)

    def codebooks(self, levels: int | None = None) -> Tensor:
        """All entries: how many levels are decoded is open, and a slice would be a copy in each step."""
        return self.table


def _store(layer: nn.Module, weights: str) -> None:
    """Keep the weight as it is to be stored; with "int8", those that lie on a grid."""
    scale = layer._buffers.pop("weight_scale", None)
    if weights == "float16":
        parametrize.register_parametrization(layer, "weight", Half(), unsafe=True)
    elif weights == "int8" and scale is not None:
        channel = 1 if isinstance(layer, nn.ConvTranspose1d) else 0
        parametrize.register_parametrization(layer, "weight", Int8(scale, channel), unsafe=True)


class Half(nn.Module):
    """A weight stored in fp16. A parametrization may change the dtype if its inverse returns a tuple."""

    def forward(self, stored: Tensor) -> Tensor:
        return stored.float()

    def right_inverse(self, weight: Tensor) -> tuple[Tensor]:
        return (weight.half(),)


class Int8(nn.Module):
    """A weight stored as int8 multiples of a scale per output channel (runtime/quantized.py)."""

    def __init__(self, scale: Tensor, channel: int):
        super().__init__()
        self.scale, self.channel = scale, channel

    def forward(self, stored: Tensor, steps: Tensor) -> Tensor:
        return stored.float() * steps

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        whole = quantized.integers(weight, self.scale, self.channel)
        assert whole is not None, "the weight lies on the grid of its scales"
        return whole, self.scale.view([-1 if d == self.channel else 1 for d in range(weight.dim())])

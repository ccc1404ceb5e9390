"""Pocket TTS with our Mimi: `accelerate(tts)` replaces the one inside a loaded `pocket_tts.TTSModel`, in one line.

    tts = fastmimi.compat.pocket_tts.accelerate(pocket_tts.TTSModel.load_model())

Latents and audio equal those of its own Mimi up to fp32 rounding, for every configuration that the package ships, and
parameters are the same objects. What differs:

- Attention keeps the last `context` positions in a ring, where its own Mimi keeps all positions of a generation and
  attends to masked ones too. So a frame takes the same time at any position, and `sequence_length` has no effect.
- States have one entry, under the name "". Those of Mimi that were made before `accelerate` do not fit, nor those made
  with it after `restore`. States of the language model, that is of voices, fit both.
- Parameters have other names in `tts.state_dict()`: `restore` before saving or loading weights of `tts`.
- Invalid arguments raise InputError.

Importing this module imports `pocket_tts`, which sets PyTorch to one thread.
"""

from __future__ import annotations

import torch
from pocket_tts import TTSModel
from pocket_tts.models.mimi import MimiModel
from pocket_tts.modules.stateful_module import StatefulModule
from torch import Tensor, nn

from ..checkpoints import kyutai
from ..errors import InputError, shown
from ..models.config import MimiCodecConfig
from ..models.continuous import ContinuousMimi, ContinuousMimiConfig, pocket_half
from ..models.validation import Json
from ..runtime import packing
from ..runtime.cpu_graphs import MOST_FRAMES
from ..runtime.state import DirectionState

DECODER = ("decoder_seanet", "decoder_transformer")  # sections that are None where they are as the encoder's
State = dict[str, dict[str, Tensor]]  # of a model: the tensors of each stateful module, by its name


def accelerate(tts: TTSModel) -> TTSModel:
    """Replace the Mimi of a loaded `TTSModel` by ours, in place, and return `tts`; nothing if that has been done.

    Weights are packed now, and the steps of 1 to 4 frames recorded for this number of threads. Raises InputError if
    `tts` is no TTSModel or if its configuration is not supported; then nothing has changed.
    """
    if not isinstance(mimi := _mimi_of(tts), AcceleratedMimi):
        tts.mimi = AcceleratedMimi(mimi, codec_config(tts.config.mimi.model_dump()))
    return tts


def restore(tts: TTSModel) -> TTSModel:
    """Undo `accelerate`, in place, and return `tts`. Raises InputError if `tts` is no TTSModel."""
    if isinstance(mimi := _mimi_of(tts), AcceleratedMimi):
        (tts.mimi,) = mimi.original
    return tts


def codec_config(mimi: Json) -> ContinuousMimiConfig:
    """Convert the section `mimi` of a configuration of Pocket TTS, as a dictionary; defaults are filled in already.

    Raises InputError, naming the key, for what is not supported.
    """
    sections = {
        "encoder": ("seanet", "transformer"),
        "decoder": tuple(name if mimi[name] is not None else name.removeprefix("decoder_") for name in DECODER),
    }
    halves = {half: _half(mimi, *names) for half, names in sections.items()}
    width = halves["decoder"].hidden_size
    _require(mimi["quantizer"], "quantizer", output_dimension=width)
    _require(mimi, "", outer_dim=width if mimi["outer_dim"] is not None else None)
    inner = mimi["inner_dim"] if halves["encoder"].latent_stride > 1 else None
    encoded = halves["encoder"].hidden_size if inner is None else inner
    return ContinuousMimiConfig(**halves, encoded_size=encoded, latent_size=mimi["quantizer"]["dimension"])


def _half(mimi: Json, seanet_name: str, transformer_name: str) -> MimiCodecConfig:
    seanet, transformer = mimi[seanet_name], mimi[transformer_name]
    width = seanet["dimension"]
    _require(seanet, seanet_name, channels=mimi["channels"])
    _require(transformer, transformer_name, d_model=width, input_dimension=width, output_dimensions=(width,))
    return pocket_half(
        sampling_rate=mimi["sample_rate"],
        frame_rate=mimi["frame_rate"],
        **kyutai.seanet_fields(seanet),
        upsample_groups=width,
        num_hidden_layers=transformer["num_layers"],
        intermediate_size=transformer["dim_feedforward"],
        num_attention_heads=transformer["num_heads"],
        num_key_value_heads=transformer["num_heads"],
        sliding_window=transformer["context"],
        layer_scale_initial_scale=transformer["layer_scale"],
        rope_parameters={"rope_type": "default", "rope_theta": transformer["max_period"]},
    )


def _require(values: Json, section: str, **required: object) -> None:
    for name, value in required.items():
        if values[name] != value:
            raise InputError(f"mimi.{section}{'.' * bool(section)}{name} must be {value}, got {shown(values[name])}")


def _mimi_of(tts: object) -> nn.Module:
    if not isinstance(tts, TTSModel):
        raise InputError(f"tts must be a pocket_tts.TTSModel, got {type(tts).__name__}")
    if not isinstance(mimi := getattr(tts, "mimi", None), MimiModel | AcceleratedMimi):
        raise InputError(f"tts.mimi must be the Mimi of a loaded TTSModel, got {type(mimi).__name__}")
    return mimi


class Rows(nn.Module):
    """The queries, keys or values ("q", "k" or "v") of a fused projection, with the rows in our order."""

    bias = None

    def __init__(self, fused: nn.Linear, part: str, config: MimiCodecConfig):
        super().__init__()
        self.fused, self.part, self.config = fused, part, config

    @property
    def weight(self) -> Tensor:
        """[width, width]; the same tensor until the fused weight changes."""
        return packing.packed(
            self.fused.weight, f"rows {self.part}", lambda w: kyutai.split_projections(w, self.config)[self.part]
        )


def _core_of(mimi: MimiModel, config: ContinuousMimiConfig) -> ContinuousMimi:
    """Our model over the modules of theirs. Raises InputError if they do not fit the configuration."""
    with torch.device("meta"):
        core = ContinuousMimi(config).train(mimi.training)
    theirs = kyutai.to_flat(dict(mimi.named_parameters()), config)
    shapes = [{(name, tuple(t.shape)) for name, t in named} for named in (theirs.items(), core.named_parameters())]
    if different := sorted(shapes[0] ^ shapes[1]):
        raise InputError(f"tts.mimi must have the layers of its configuration, and {different[0][0]} differs")
    for name, _ in mimi.named_parameters():
        module, flat = mimi.get_submodule(name.rpartition(".")[0]), kyutai.flat_name(name).rpartition(".")[0]
        parent, _, leaf = flat.rpartition(".")
        owner = core.get_submodule(parent.removesuffix(".in_projs"))
        if parent.endswith(".in_projs"):
            owner._modules |= {f"{part}_proj": Rows(module, part, config.half_of(flat)) for part in "qkv"}
        else:
            owner._modules[leaf] = module
    return core


class AcceleratedMimi(StatefulModule):
    """What stands in for the `MimiModel` of Pocket TTS: its methods and attributes, computed by `core`.

    Latents are [B, T, C], audio [B, 1, 1920 T] at 24 kHz. The state of streams is that of one stateful module, "".
    """

    def __init__(self, mimi: MimiModel, config: ContinuousMimiConfig):
        super().__init__()
        self._module_absolute_name = ""
        self.original = (mimi,)  # in a tuple: its parameters are those of `core`
        self.core = _core_of(mimi, config)
        self.training = mimi.training
        self.frame_rate, self.encoder_frame_rate = mimi.frame_rate, mimi.encoder_frame_rate
        self.sample_rate, self.channels, self.dimension = mimi.sample_rate, mimi.channels, mimi.dimension
        self._warm_up(self.core.new_direction("decode", 1))

    @property
    def frame_size(self) -> int:
        """Samples per frame."""
        return self.core.frame_size

    def init_state(self, batch_size: int, sequence_length: int) -> dict[str, Tensor]:
        """The state of `batch_size` fresh streams to decode; `sequence_length` has no effect."""
        with torch.inference_mode(False):
            state = self.core.new_direction("decode", batch_size)
            self._warm_up(state)  # for a number of threads or streams that is new
        return {**state.buffers, "offset": state.offset, "active": state.active}

    def increment_step(self, state: dict[str, Tensor], increment: int = 1) -> None:
        """Count positions that have been decoded, `latent_stride` (16) for each frame."""
        state["offset"] += increment

    @torch.no_grad()
    def decode_from_latent(self, latent: Tensor, mimi_state: State) -> Tensor:
        """Latents [B, T, latent_size] -> audio [B, channels, T * frame_size], a new tensor; the state is updated.

        As in Pocket TTS, `increment_steps` then counts the positions. Raises InputError for another shape or state.
        """
        core = self.core
        if latent.dim() != 3 or latent.shape[-1] != core.config.latent_size or not latent.is_floating_point():
            wanted = f"[batch, frames, {core.config.latent_size}]"
            raise InputError(f"latent must be floating point {wanted}, got {latent.dtype} {tuple(latent.shape)}")
        if "" not in mimi_state:
            raise InputError("the state was not made by init_states(tts.mimi, ...) after accelerate(tts)")
        buffers = dict(self.get_state(mimi_state))
        offset, active = buffers.pop("offset"), buffers.pop("active")
        if len(offset) != len(latent):
            raise InputError(f"latent must hold {len(offset)} streams, as the state does, got {len(latent)}")
        x = latent.transpose(1, 2).to(core.device, core.dtype)
        audio = core.decode_latent_pass().in_tiles(x, DirectionState(buffers, offset, active))
        offset -= x.shape[-1] * core.config.latent_stride  # `increment_step` is who counts
        return audio

    @torch.no_grad()
    def encode_to_latent(self, x: Tensor) -> Tensor:
        """Audio [B, channels, N] -> latents [B, ceil(N / frame_size), encoded_size]; stateless, N may be anything."""
        return self.core.encode_to_latent(x).transpose(1, 2)

    def _warm_up(self, state: DirectionState) -> None:
        """Record the steps of few frames for such states, unless that has been done."""
        for frames in range(1, MOST_FRAMES + 1):
            self.core.decode_latent_pass().warm_up(self.core.config.latent_size, frames, state, threads=1)

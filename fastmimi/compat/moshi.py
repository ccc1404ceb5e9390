"""Drop-in for moshi's Mimi: a thin wrapper around `fastmimi.Mimi` and `StreamState`, which does not need moshi.

`from fastmimi.compat import moshi as loaders` replaces `from moshi.models import loaders`. Codes are identical to
moshi's, audio equals moshi's up to fp32 rounding. Intended differences:

- Streams take chunks of any length, where moshi raises unless they are whole frames. The samples of an incomplete frame
  are kept for the next call, a call that completes no frame returns codes [B, K, 0], and `flush` completes the last
  frame with zeros.
- Every position attends to itself and the 249 before it, in streams as well as offline. In moshi that is so offline.
  In a stream, moshi writes the keys of a whole call into its ring buffer of 250 before the first query reads it. Beyond
  10 s, a position that is followed by n others in the same call therefore attends to 250 - n positions: to 249 or 250
  with one frame (two positions) per call, to 241 ... 250 with five frames per call.
- Rows that `set_exec_mask` deactivates get codes 0, which a language model can embed, and audio 0; in moshi, whatever
  is computed from their samples. An active row that completes no frame where others do, which is possible only with
  chunks that are not whole frames, gets codes -1 there.
- `forward` takes audio of any length, where moshi takes whole frames. It never updates the codebooks: in training mode
  it equals moshi's with `freeze_quantizer`, with penalty 0 and without metrics.
- `get_streaming_state` returns a single `StreamState` under the name "", not one object per module.
- Weights are read from safetensors only. Without a file they are random; in moshi they are as its modules initialize
  them. `state_dict` has fastmimi's names; `fastmimi.checkpoints.weights.save_kyutai(model.core, path)` writes moshi's.
- Invalid arguments raise InputError, and calls out of order RuntimeError; in moshi, AssertionError or nothing.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints import kyutai, shapes, weights
from ..errors import InputError
from ..models import checks
from ..models.config import MimiCodecConfig
from ..models.mimi import Mimi
from ..models.validation import Json
from ..runtime import masks
from ..runtime.packing import Packable
from ..runtime.state import StreamState

SAMPLE_RATE = 24_000  # Hz
FRAME_RATE = 12.5  # Hz
MIMI_NAME = kyutai.FILE_NAME
DEFAULT_REPO = "kyutai/moshiko-pytorch-bf16"  # holds MIMI_NAME

# The defaults of moshi's classes, for what a mimi_config leaves out; `codec_config` says which of those that are None
# must be given. The norm has no effect, since weight norm is folded on loading; neither have the quantizer's dropout,
# decay and ratios, which are for training.
DEFAULTS: dict[str, Json] = {
    "seanet": {
        "channels": 1, "dimension": 128, "n_filters": 32, "n_residual_layers": 3, "ratios": [8, 5, 4, 2],
        "kernel_size": 7, "last_kernel_size": 7, "residual_kernel_size": 3, "dilation_base": 2, "compress": 2,
        "activation": "ELU", "activation_params": {"alpha": 1.0}, "true_skip": True, "causal": False,
        "pad_mode": "reflect", "mask_fn": None, "mask_position": None,
        "norm": "none", "norm_params": {}, "disable_norm_outer_blocks": 0,
    },
    "quantizer": {
        "dimension": 128, "input_dimension": None, "output_dimension": None, "n_q": 8, "n_q_semantic": 1,
        "bins": 1024, "q_dropout": False, "no_quantization_rate": 0.0, "decay": 0.99,
        "threshold_usage_ratio": 0.1, "replaced_usage_ratio": 1.0,
    },
    "transformer": {
        "d_model": None, "input_dimension": None, "output_dimensions": None, "conv_layout": False,
        "num_heads": None, "num_layers": None, "dim_feedforward": 2048, "kv_repeat": 1, "causal": False,
        "context": None, "positional_embedding": "sin", "max_period": 10_000, "norm": "layer_norm",
        "layer_scale": None, "gating": "none", "weights_per_step": 0, "skip_self_attn": False,
        "cross_attention": False, "quantize": False, "checkpointing": False,
    },
}  # fmt: skip


@dataclass
class QuantizedResult:
    """The result of `MimiModel.forward`, with moshi's fields.

    Attributes:
        x: audio [B, channels, N].
        codes: [B, K, T] int64.
        bandwidth: bit rate of the codes in kbit/s, a scalar tensor.
        penalty: the commitment loss, a scalar tensor; always 0 here.
        metrics: metrics of codebook training; always empty here.
    """

    x: Tensor
    codes: Tensor
    bandwidth: Tensor
    penalty: Tensor | None = None
    metrics: dict[str, object] = field(default_factory=dict)


@torch.inference_mode(False)  # inference tensors would be packed at every call (runtime/packing.py)
def get_mimi(
    filename: str | Path | None,
    mimi_config: Json | None = None,
    device: torch.device | str = "cpu",
    num_codebooks: int = 8,
) -> MimiModel:
    """Load a Mimi, in eval mode.

    Args:
        filename: a `.safetensors` file in Kyutai's layout, or None for random weights.
        mimi_config: moshi's configuration, a dict with `seanet`, `quantizer` and `transformer`; None for Kyutai's Mimi.
        device: where the model runs.
        num_codebooks: number of codebooks that `encode` yields.

    Raises InputError if the file is missing, not safetensors or does not fit the configuration, if the configuration is
    not supported, and if the model does not have that many codebooks.
    """
    config = MimiCodecConfig() if mimi_config is None else codec_config(mimi_config)
    where = checks.device(device)
    if filename is None:
        core = weights.random(config)
    else:
        state = weights.to_flat(weights.read_safetensors(filename))
        shapes.check_size(config, state, filename)
        with torch.device("meta"):
            core = Mimi(config)
        weights.fill(core, kyutai.to_flat(state, config) if kyutai.is_kyutai(state) else state)
    core.num_codebooks = num_codebooks
    return MimiModel(core).to(where).eval()


def codec_config(mimi_config: Json) -> MimiCodecConfig:
    """Convert moshi's `mimi_config`. Raises InputError, naming the key, for what is not supported."""
    if not isinstance(mimi_config, dict):
        raise InputError(f"mimi_config must be a dictionary, got {type(mimi_config).__name__}")
    if missing := [key for key in ("sample_rate", "channels", "frame_rate", *DEFAULTS) if key not in mimi_config]:
        raise InputError(f"mimi_config has no {', '.join(missing)}")
    seanet, quantizer, transformer = (_section(mimi_config, name) for name in DEFAULTS)
    hidden, heads = seanet["dimension"], transformer["num_heads"]
    _require("", mimi_config, channels=seanet["channels"])
    _require("seanet", seanet, activation="ELU", activation_params={"alpha": 1.0}, causal=True, mask_fn=None)
    _require("quantizer", quantizer, input_dimension=hidden, output_dimension=hidden)
    _require(
        "transformer", transformer, d_model=hidden, input_dimension=hidden, output_dimensions=[hidden],
        conv_layout=True, causal=True, positional_embedding="rope", norm="layer_norm", gating="none",
        weights_per_step=0, skip_self_attn=False, cross_attention=False, quantize=False,
    )  # fmt: skip
    for name in ("num_heads", "num_layers", "context", "layer_scale"):
        if transformer[name] is None:
            raise InputError(f"mimi_config['transformer'][{name!r}] must be given")
    if seanet["pad_mode"] not in ("constant", "replicate"):
        raise InputError(f"mimi_config['seanet']['pad_mode'] must be constant or replicate, got {seanet['pad_mode']!r}")
    if quantizer["dimension"] == hidden:
        raise InputError(f"mimi_config['quantizer']['dimension'] must differ from seanet's, both are {hidden}")
    for name in ("num_heads", "kv_repeat"):
        if type(transformer[name]) is not int or transformer[name] < 1:
            raise InputError(
                f"mimi_config['transformer'][{name!r}] must be a positive integer, got {transformer[name]!r}"
            )
    if heads % transformer["kv_repeat"]:
        raise InputError(f"num_heads={heads} must be divisible by kv_repeat={transformer['kv_repeat']}")
    return MimiCodecConfig(
        sampling_rate=mimi_config["sample_rate"],
        frame_rate=mimi_config["frame_rate"],
        **kyutai.seanet_fields(seanet),
        use_conv_shortcut=not seanet["true_skip"],
        codebook_size=quantizer["bins"],
        codebook_dim=quantizer["dimension"],
        vector_quantization_hidden_dimension=quantizer["dimension"],
        num_quantizers=quantizer["n_q"],
        num_semantic_quantizers=quantizer["n_q_semantic"],
        upsample_groups=hidden,
        num_hidden_layers=transformer["num_layers"],
        intermediate_size=transformer["dim_feedforward"],
        num_attention_heads=heads,
        num_key_value_heads=heads // transformer["kv_repeat"],
        sliding_window=transformer["context"],
        layer_scale_initial_scale=transformer["layer_scale"],
        rope_parameters={"rope_type": "default", "rope_theta": transformer["max_period"]},
    )


def _section(mimi_config: Json, name: str) -> Json:
    """One section of a mimi_config, completed with moshi's defaults."""
    section = mimi_config[name]
    if not isinstance(section, dict):
        raise InputError(f"mimi_config[{name!r}] must be a dictionary, got {type(section).__name__}")
    if unknown := sorted(section.keys() - DEFAULTS[name].keys()):
        raise InputError(f"mimi_config[{name!r}] has keys that are not supported: {', '.join(unknown)}")
    return DEFAULTS[name] | section


def _require(section: str, values: Json, **required: object) -> None:
    """Raise InputError unless the values of a section ("" for the top level) are the required ones."""
    for name, value in required.items():
        got = list(values[name]) if isinstance(values[name], tuple) else values[name]
        if got != value:
            where = f"[{section!r}][{name!r}]" if section else f"[{name!r}]"
            raise InputError(f"mimi_config{where} must be {value!r}, got {got!r}")


class MimiModel(Packable):
    """A `fastmimi.Mimi`, the `core`, with the methods of moshi's `MimiModel`.

    Audio is float [B, channels, N] at `sample_rate` Hz; codes are int64 [B, K, T] and latents [B, dimension, T], both
    at `frame_rate` Hz. As in moshi, parameters require gradients: use `torch.no_grad()` for inference.
    """

    def __init__(self, core: Mimi):
        super().__init__()
        self.core = core
        self._state: StreamState | None = None

    # Properties of the codec

    @property
    def channels(self) -> int:
        """Number of audio channels."""
        return self.core.config.audio_channels

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.core.sample_rate

    @property
    def frame_rate(self) -> float:
        """Frames of codes per second."""
        return self.core.frame_rate

    @property
    def frame_size(self) -> int:
        """Samples per frame of codes."""
        return self.core.frame_size

    @property
    def total_codebooks(self) -> int:
        """Number of codebooks that the model has."""
        return self.core.total_codebooks

    @property
    def num_codebooks(self) -> int:
        """Number of codebooks that `encode` yields."""
        return self.core.num_codebooks

    def set_num_codebooks(self, n: int) -> None:
        """Set the number of codebooks that `encode` yields.

        Raises InputError unless it is between the number of semantic codebooks and `total_codebooks`.
        """
        self.core.num_codebooks = n

    @property
    def cardinality(self) -> int:
        """Entries of each codebook."""
        return self.core.config.codebook_size

    # Audio to codes and back

    def encode(self, x: Tensor) -> Tensor:
        """Audio [B, channels, N] -> codes [B, K, T].

        Offline, T is ceil(N / frame_size), and an incomplete last frame is completed with zeros. While streaming, T is
        the number of frames that these N samples complete. Raises InputError for a wrong shape or dtype, and if a
        sample is NaN or infinite.
        """
        return self._codes(self.core.encode(x, state=self._state))

    def flush(self) -> Tensor:
        """Complete the incomplete frame of the streams with zeros -> codes [B, K, 1], [B, K, 0] if there is none.

        Raises RuntimeError if the model is not streaming.
        """
        return self._codes(self.core.flush(self._streaming("flush")))

    def _codes(self, codes: Tensor) -> Tensor:
        """The codes, with 0 in inactive rows."""
        return codes if self._state is None else torch.where(self._state.exec_mask[:, None, None], codes, 0)

    def encode_to_latent(self, x: Tensor, quantize: bool = True) -> Tensor:
        """Audio [B, channels, N] -> latents [B, dimension, T], quantized and dequantized with `quantize`."""
        if quantize:
            return self.decode_latent(self.encode(x))
        return self.core.encode_to_latent(x, state=self._state)

    def decode_latent(self, codes: Tensor) -> Tensor:
        """Codes [B, K, T] -> latents [B, dimension, T]."""
        return self.core.dequantize(codes)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, K, T] -> audio [B, channels, T * frame_size]. Raises InputError for codes out of range.

        K may be any number of codebooks that includes the semantic ones, T any number of frames.
        """
        return self.core.decode(codes, state=self._state)

    def forward(self, x: Tensor) -> QuantizedResult:
        """Audio [B, channels, N] -> the decoded audio and the codes; gradients pass the quantizer straight through."""
        if self._state is None:
            codes, latents = self.core.straight_through(x)
            audio = self.core.decode_latent(latents)[..., : x.shape[-1]]
        else:
            codes = self.encode(x)
            audio = self.decode(codes)
        rate = codes.shape[1] * math.log2(self.cardinality) * self.frame_rate / 1000
        return QuantizedResult(audio, codes, torch.tensor(rate).to(audio), torch.zeros((), device=audio.device))

    # Streams

    @property
    def is_streaming(self) -> bool:
        """Whether streams have begun, with `streaming` or `streaming_forever`, and not ended."""
        return self._state is not None

    def streaming(self, batch_size: int) -> ExitStack:
        """Begin `batch_size` streams in both directions; leaving the returned context ends them.

        The streams begin with this call, not only on entering the context. Raises RuntimeError if the model is already
        streaming, InputError for a configuration that cannot stream.
        """
        if self._state is not None:
            raise RuntimeError("this model is already streaming: leave the context of streaming() first")
        self._state = self.core.new_state(batch_size)
        self.core.warm_up(self._state)
        stack = ExitStack()
        stack.callback(self._stop_streaming)
        return stack

    def streaming_forever(self, batch_size: int) -> None:
        """Begin `batch_size` streams that no context ends."""
        self.streaming(batch_size)

    def reset_streaming(self, reset_mask: Tensor | None = None) -> None:
        """Restart the streams where `reset_mask`, [B] bool, is set, or all of them for None; they become active."""
        self._streaming("reset_streaming").reset(reset_mask)

    def set_exec_mask(self, exec_mask: Tensor) -> None:
        """Set which streams, [B] bool, the following calls advance; the others keep their state and give zeros."""
        state = self._streaming("set_exec_mask")
        exec_mask = masks.as_tensor(exec_mask, "exec_mask")
        if exec_mask.shape != state.exec_mask.shape:
            raise InputError(f"exec_mask must have shape ({state.batch_size},), got {tuple(exec_mask.shape)}")
        state.exec_mask.copy_(exec_mask)

    def get_streaming_state(self) -> dict[str, StreamState | None]:
        """The state, under the name "". It changes as the streams go on: take a snapshot with its `clone()`."""
        return {"": self._state}

    def set_streaming_state(self, state: dict[str, StreamState | None]) -> None:
        """Continue from a state that `get_streaming_state` returned; the state None ends streaming.

        Raises RuntimeError if it has other names, InputError if it is of another configuration, device or dtype.
        """
        if not isinstance(state, dict):
            raise InputError(f"state must come from get_streaming_state(), got {type(state).__name__}")
        if state.keys() != {""}:
            raise RuntimeError(f"a streaming state must have the single name '', got {sorted(state)}")
        if (new_state := state[""]) is not None:
            batch = new_state.batch_size if isinstance(new_state, StreamState) else 0
            checks.state(new_state, (batch, self.channels, self.frame_size), self.core)
        self._state = new_state

    def _stop_streaming(self) -> None:
        self._state = None

    def _streaming(self, method: str) -> StreamState:
        """The state. Raises RuntimeError, naming the method that needs it, if the model is not streaming."""
        if self._state is None:
            raise RuntimeError(f"{method} needs a streaming model: call streaming(batch_size) first")
        return self._state

"""moshi's interface to Mimi, thin over `fastmimi.Mimi` and `StreamState`; no moshi needed.

`from fastmimi.compat import moshi as loaders` takes the place of `from moshi.models import loaders`. Codes are
moshi's, audio is moshi's to fp32 rounding. What differs, on purpose:

- Streaming takes chunks of any length (moshi raises on anything but whole frames): the rest waits for the next
  call, a call that completes no frame gives codes [B, K, 0], and `flush` completes the last frame with zeros.
- Every position attends to itself and the 249 before it, streaming as offline. moshi does so offline. Its streaming
  ring of 250 takes the keys of a whole call before the first query looks, so that beyond 10 s a position that has n
  more after it in its call sees 250 - n: one frame (two positions) per call gives 249, 250; five give 241 ... 250.
- Rows that `set_exec_mask` rules out get codes 0 and audio 0 (moshi: whatever came of their samples), which a
  language model can embed. A row that is not ruled out but completes no frame where others do, possible only with
  chunks that are not whole frames, has codes -1 there.
- `forward` takes any length (moshi: whole frames). Its codebooks never move: in training mode too it is moshi's with
  `freeze_quantizer`, penalty 0 and no metrics.
- `get_streaming_state` is one `StreamState` under the name "", not one object for each module.
- Weights come from safetensors only; without a file they are random, not empty. `state_dict` has fastmimi's names;
  `fastmimi.checkpoints.weights.save_kyutai(model.core, path)` writes moshi's.
- Wrong arguments raise InputError, calls out of order RuntimeError (moshi: AssertionError, or none at all).
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints import kyutai, shapes, weights
from ..errors import InputError
from ..models import checks
from ..models.config import CodecConfig
from ..models.mimi import Mimi
from ..runtime import masks
from ..runtime.packing import Packable
from ..runtime.state import StreamState

SAMPLE_RATE = 24_000  # Hz
FRAME_RATE = 12.5  # Hz
MIMI_NAME = kyutai.FILE_NAME
DEFAULT_REPO = "kyutai/moshiko-pytorch-bf16"  # holds MIMI_NAME

# What moshi's classes take where a mimi_config leaves it out, None where it must be given. Weight norm is folded on
# loading; dropout, decay and usage ratios of the quantizer are for training.
DEFAULTS: dict[str, dict[str, Any]] = {
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
    """What `MimiModel.forward` gives, with moshi's fields.

    x: audio [B, channels, N]; codes: [B, K, T] int64; bandwidth: kbit/s of the codes, a scalar tensor;
    penalty: the commitment loss, a scalar tensor; metrics: of the training of codebooks, here always empty.
    """

    x: Tensor
    codes: Tensor
    bandwidth: Tensor
    penalty: Tensor | None = None
    metrics: dict = field(default_factory=dict)


@torch.inference_mode(False)  # inference tensors could not be packed once (runtime/packing.py)
def get_mimi(
    filename: str | Path | None,
    mimi_config: dict | None = None,
    device: torch.device | str = "cpu",
    num_codebooks: int = 8,
) -> MimiModel:
    """A Mimi in eval mode, with the weights of a `.safetensors` file in Kyutai's layout, or random ones for None.

    `mimi_config` is moshi's dict with `seanet`, `quantizer` and `transformer`; by default Kyutai's Mimi.
    Raises InputError for a file that is not there, is not safetensors or does not fit, for a configuration that
    there is no model for, and for a number of codebooks that the model does not have.
    """
    config = CodecConfig() if mimi_config is None else codec_config(mimi_config)
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


def codec_config(mimi_config: dict) -> CodecConfig:
    """moshi's `mimi_config` as ours; raises InputError, naming the key, for what there is no model for."""
    if not isinstance(mimi_config, dict):
        raise InputError(f"mimi_config must be a dictionary, got {type(mimi_config).__name__}")
    if missing := [key for key in ("sample_rate", "channels", "frame_rate", *DEFAULTS) if key not in mimi_config]:
        raise InputError(f"mimi_config has no {', '.join(missing)}")
    seanet, quantizer, transformer = (_part(mimi_config, name) for name in DEFAULTS)
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
        raise InputError(f"{heads} heads cannot be shared by kv_repeat={transformer['kv_repeat']}")
    return CodecConfig(
        sampling_rate=mimi_config["sample_rate"],
        frame_rate=mimi_config["frame_rate"],
        audio_channels=seanet["channels"],
        hidden_size=hidden,
        num_filters=seanet["n_filters"],
        num_residual_layers=seanet["n_residual_layers"],
        upsampling_ratios=seanet["ratios"],
        kernel_size=seanet["kernel_size"],
        last_kernel_size=seanet["last_kernel_size"],
        residual_kernel_size=seanet["residual_kernel_size"],
        dilation_growth_rate=seanet["dilation_base"],
        compress=seanet["compress"],
        pad_mode=seanet["pad_mode"],
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


def _part(mimi_config: dict, part: str) -> dict[str, Any]:
    """One part of a mimi_config, with moshi's defaults for what it leaves out."""
    if not isinstance(mimi_config[part], dict):
        raise InputError(f"mimi_config[{part!r}] must be a dictionary, got {type(mimi_config[part]).__name__}")
    if unknown := sorted(mimi_config[part].keys() - DEFAULTS[part].keys()):
        raise InputError(f"mimi_config[{part!r}] has keys that there is no model for: {', '.join(unknown)}")
    return DEFAULTS[part] | mimi_config[part]


def _require(part: str, values: dict[str, Any], **wanted: Any) -> None:
    for name, value in wanted.items():
        got = list(values[name]) if isinstance(values[name], tuple) else values[name]
        if got != value:
            where = f"[{part!r}][{name!r}]" if part else f"[{name!r}]"
            raise InputError(f"mimi_config{where} must be {value!r}, got {got!r}")


class MimiModel(Packable):
    """The codec behind moshi's methods; `core` is the `fastmimi.Mimi`.

    Audio is [B, channels, N] float at `sample_rate` Hz; codes [B, K, T] int64 and latents [B, dimension, T] are at
    `frame_rate` Hz. As in moshi the parameters require gradients, so wrap inference in `torch.no_grad()`.
    """

    def __init__(self, core: Mimi):
        super().__init__()
        self.core = core
        self._state: StreamState | None = None

    # What the codec is

    @property
    def channels(self) -> int:
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
        """How many codebooks there are."""
        return self.core.total_codebooks

    @property
    def num_codebooks(self) -> int:
        """How many codebooks `encode` yields."""
        return self.core.num_codebooks

    def set_num_codebooks(self, n: int) -> None:
        """Let `encode` yield n codebooks, from the semantic ones up to all. Raises InputError otherwise."""
        self.core.num_codebooks = n

    @property
    def cardinality(self) -> int:
        """Entries of each codebook."""
        return self.core.config.codebook_size

    # Audio to codes and back

    def encode(self, x: Tensor) -> Tensor:
        """Audio [B, channels, N] -> codes [B, K, T].

        Offline T = ceil(N / frame_size), the last frame completed with zeros; streaming it is the number of frames
        that N more samples complete. Raises InputError for a wrong shape or dtype, and for NaN or infinite samples.
        """
        return self._codes(self.core.encode(x, state=self._state))

    def flush(self) -> Tensor:
        """Codes [B, K, 1] of the samples that a stream holds back, completed with zeros; [B, K, 0] without any."""
        return self._codes(self.core.flush(self._streaming("flush")))

    def _codes(self, codes: Tensor) -> Tensor:
        """Codes with 0 in the rows that are ruled out."""
        return codes if self._state is None else torch.where(self._state.exec_mask[:, None, None], codes, 0)

    def encode_to_latent(self, x: Tensor, quantize: bool = True) -> Tensor:
        """Audio [B, channels, N] -> latents [B, dimension, T], quantized and back, or as they reach the quantizer."""
        if quantize:
            return self.decode_latent(self.encode(x))
        return self.core.encode_to_latent(x, state=self._state)

    def decode_latent(self, codes: Tensor) -> Tensor:
        """Codes [B, K, T] -> latents [B, dimension, T]."""
        return self.core.dequantize(codes)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, K, T] -> audio [B, channels, T * frame_size]. Raises InputError for codes out of range.

        K is any number of codebooks from the semantic ones up, T any number of frames.
        """
        return self.core.decode(codes, state=self._state)

    def forward(self, x: Tensor) -> QuantizedResult:
        """Audio [B, channels, N] -> the same through the codec, and codes; gradients pass the quantizer unchanged."""
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
        return self._state is not None

    def streaming(self, batch_size: int) -> ExitStack:
        """Begin `batch_size` streams now, both directions; leaving the context that is returned ends them.

        Raises RuntimeError while streaming, InputError for a configuration that cannot stream.
        """
        if self._state is not None:
            raise RuntimeError("this model is already streaming: leave the context of streaming() first")
        self._state = self.core.new_state(batch_size)
        self.core.warm_up(self._state)
        stack = ExitStack()
        stack.callback(self._stop_streaming)
        return stack

    def streaming_forever(self, batch_size: int) -> None:
        """Begin `batch_size` streams that nothing ends."""
        self.streaming(batch_size)

    def reset_streaming(self, reset_mask: Tensor | None = None) -> None:
        """Start the streams of `reset_mask` [B] bool anew, without it all of them; no mask rules them out then."""
        self._streaming("reset_streaming").reset(reset_mask)

    def set_exec_mask(self, exec_mask: Tensor) -> None:
        """Rows [B] bool that the following calls advance; the others stay as they are and give 0."""
        state = self._streaming("set_exec_mask")
        exec_mask = masks.as_tensor(exec_mask, "exec_mask")
        if exec_mask.shape != state.exec_mask.shape:
            raise InputError(f"exec_mask must have shape ({state.batch_size},), got {tuple(exec_mask.shape)}")
        state.exec_mask.copy_(exec_mask)

    def get_streaming_state(self) -> dict[str, StreamState | None]:
        """Under "" the state itself, which changes as the stream goes on: keep a moment of it with `clone()`."""
        return {"": self._state}

    def set_streaming_state(self, state: dict[str, StreamState | None]) -> None:
        """Go on from what `get_streaming_state` gave; None ends streaming.

        Raises RuntimeError for other names, InputError for a state of another model, device or dtype.
        """
        if not isinstance(state, dict):
            raise InputError(f"state must come from get_streaming_state(), got {type(state).__name__}")
        if state.keys() != {""}:
            raise RuntimeError(f"a streaming state has the one name '', got {sorted(state)}")
        if (new := state[""]) is not None:
            batch = new.batch_size if isinstance(new, StreamState) else 0
            checks.state(new, (batch, self.channels, self.frame_size), self.core)
        self._state = new

    def _stop_streaming(self) -> None:
        self._state = None

    def _streaming(self, method: str) -> StreamState:
        if self._state is None:
            raise RuntimeError(f"{method} needs a streaming model: call streaming(batch_size) first")
        return self._state

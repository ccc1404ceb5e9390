"""Checkpoints in and out, safetensors only: transformers' (flat, and nested as in 5.x state dicts) and Kyutai's.

`load` finds a checkpoint, brings its names to the model's own (which are transformers' flat ones) and fills the model.
What the two families disagree about stands in `kyutai.py`; weight norm, folded or not, is folded here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError, named, one_line, shown
from ..io.files import path_of, replacing
from ..models import checks
from ..models.codec import Codec
from ..models.config import MIMI_TYPES, AnyConfig, CodecConfig, JodioConfig, config_from_json
from ..models.jodio import JodioModel
from ..models.mimi import Mimi
from ..models.validation import read_json
from ..runtime import dispatch, quantized
from . import kyutai, shapes

State = dict[str, Tensor]

NESTED = (  # state dicts of transformers >= 5.20 -> flat
    (r"^encoder\.encoder_seanet\.", "encoder."),
    (r"^decoder\.decoder_seanet\.", "decoder."),
    (r"^encoder\.(encoder_transformer|downsample)\.", r"\1."),
    (r"^decoder\.(decoder_transformer|upsample)\.", r"\1."),
)
DEMO = Path(__file__).parent.parent / "assets" / "demo"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
LISTED = 20  # keys an error names before it only counts


@torch.inference_mode(False)  # tensors of inference mode count no edits: kernels would pack them at every call
def load(
    source: str | Path = "kyutai/mimi",
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    impl: dispatch.Impl = "auto",
    num_codebooks: int | None = None,
    weights: str | None = None,
) -> Codec:
    """A codec ready for inference: in eval mode, its parameters not requiring gradients.

    Args:
        source: a directory or `.safetensors` file of transformers' or Kyutai's, a directory that a JODIO was saved to,
            a hub id ("kyutai/mimi"), "demo" (a small Mimi that comes with the package: speech, but no match for
            Kyutai's), or random weights: "random[:seed]" for a Mimi, "jodio-random[:seed]" for a JODIO (1.5 GB).
        device: where it runs.
        dtype: in what precision; codebooks and their search stay fp32.
        impl: "auto", "reference", "triton", "cpu", "onednn", or a dict per op.
        num_codebooks: codebooks that `encode` yields, by default all of the model's (32 for kyutai/mimi).
        weights: "int8" rounds those of the large layers to 255 levels for each output channel
            (runtime/quantized.py), which changes the codes somewhat; on a CPU, streams then read a quarter of the
            bytes.

    Raises InputError for a source that is not there or not a Mimi, or whose keys do not fit, all listed at once.
    """
    if not isinstance(source, str | os.PathLike):
        raise InputError(f"source must be a path, a hub id, demo or random, got {shown(source)}")
    if weights is not None and not (isinstance(weights, str) and weights == "int8"):
        raise InputError(f"weights must be None or 'int8', got {shown(weights)}")
    dispatch.check_impl(impl)
    device, dtype = checks.device(device), checks.dtype(dtype)
    if weights == "int8" and dtype != torch.float32:
        raise InputError(f"weights='int8' computes in float32, got dtype={dtype}")
    if match := re.fullmatch(r"(jodio-)?random(?::([0-9]{1,18}))?", str(source)):
        model = random(JodioConfig() if match[1] else CodecConfig(), int(match[2] or 0))
    else:
        config, state = read_checkpoint(DEMO if str(source) == "demo" else source)
        model = _unfilled(config)
        fill(model, state)
    model.impl = impl
    if num_codebooks is not None:
        model.num_codebooks = num_codebooks
    if weights == "int8":
        if not isinstance(model, Mimi):
            raise InputError("weights='int8' is for Mimi: the weights of a JODIO are under weight norm")
        for part in model.children():
            if part is not model.quantizer:  # which stays exact, and so does the codes' meaning
                quantized.round_weights(part)
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


def _unfilled(config: AnyConfig) -> Codec:
    with torch.device("meta"):
        return JodioModel(config) if isinstance(config, JodioConfig) else Mimi(config)


def random(config: AnyConfig, seed: int = 0) -> Any:
    """A codec with random weights, the same for the same seed on every machine; its codes vary with the audio."""
    model = _unfilled(config)
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size, std: float) -> Tensor:
        return torch.empty(shape).normal_(std=std, generator=generator)

    state = {}
    for name, tensor in model.state_dict().items():
        kind = name.rsplit(".", 1)[1]
        if kind == "scale":
            state[name] = torch.full(tensor.shape, 0.01)
        elif kind == "original0":  # of weight norm: keeps the power of what SiLU halves
            state[name] = torch.full(tensor.shape, 1.7)
        elif kind in ("cluster_usage", "initialized") or (kind == "weight" and tensor.dim() == 1):
            state[name] = torch.ones(tensor.shape)
        elif kind == "embed_sum":
            state[name] = normal(tensor.shape, 0.05)
        elif kind == "bias":
            state[name] = torch.zeros(tensor.shape)
        else:
            state[name] = normal(tensor.shape, tensor[0].numel() ** -0.5)
    fill(model, state)
    return model


def fill(model: Codec, state: Mapping[str, Tensor]) -> None:
    """Put a flat state into a model (which may stand on the meta device); all misfits are listed in one error."""
    own = model.state_dict()
    dropped = tuple(
        prefix
        for half, prefixes in (
            (model.encoder, ("encoder.", "encoder_transformer.", "downsample.")),
            (model.decoder, ("decoder.", "decoder_transformer.", "upsample.")),
        )
        if half is None
        for prefix in prefixes
    )
    state = {name: tensor for name, tensor in state.items() if not (dropped and name.startswith(dropped))}
    wrong = [f"missing {name}" for name in own if name not in state]
    wrong += [f"unknown {named(name)}" for name in state if name not in own]
    there = {name: tensor for name, tensor in state.items() if name in own}
    wrong += [
        f"{name} must be {tuple(own[name].shape)}, got {tuple(tensor.shape)}"
        for name, tensor in there.items()
        if own[name].shape != tensor.shape
    ]
    wrong += [f"{name} must be of floats, got {t.dtype}" for name, t in there.items() if t.dtype not in FLOATS]
    if wrong:
        more = f"; and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
        raise InputError(f"the checkpoint does not fit the model: {'; '.join(wrong[:LISTED])}{more}")
    wide = {name: tensor.float() if tensor.dtype.itemsize < 4 else tensor for name, tensor in state.items()}
    model.load_state_dict(wide, assign=True)


def read_checkpoint(source: str | Path) -> tuple[AnyConfig, State]:
    """Configuration and flat state dict of a directory, a file, or a hub id; a JODIO's is as the model has it."""
    path, there = Path(source), _exists(source)
    if there and path.is_dir():
        files, config_file = _files_of_directory(path)
    elif there or path.suffix or str(source).count("/") != 1:
        files, config_file = [path], path.parent / "config.json"
    else:
        files, config_file = _files_of_hub(str(source))
    state: State = {}
    for file in files:
        state |= read_safetensors(file)
    kind = _model_type(config_file)
    config = None if kind is None or kind not in ("jodio", *MIMI_TYPES) else config_from_json(config_file)
    if config is not None:
        shapes.check_size(config, state, source)
    if isinstance(config, JodioConfig):
        return config, state
    state = to_flat(state)
    if config is None:
        config = shapes.infer_config(state)
        shapes.check_size(config, state, source)
    if kyutai.is_kyutai(state):
        state = kyutai.to_flat(state, config)
    return config, state


def _exists(source: str | os.PathLike[str]) -> bool:
    try:
        return Path(source).exists()
    except (OSError, ValueError) as error:  # a name too long for a file's, or with a NUL in it
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"source must be a path, a hub id, demo or random, got {shown(source)} ({reason})") from None


def read_safetensors(path: str | Path) -> State:
    """All tensors of a file, memory-mapped. Raises InputError where there is none, or it is cut or of another kind."""
    path = path_of(path, "path")
    if not path.is_file():
        raise InputError(f"no model at {str(path)!r}: pass a directory, a .safetensors file, a hub id or demo")
    if path.suffix != ".safetensors":
        raise InputError(f"{path} is not a .safetensors file; pickled checkpoints can run code and are not read")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, ValueError, RuntimeError) as error:  # the last two: of types that PyTorch has not
        raise InputError(f"{path} is not a complete safetensors file ({one_line(error)})") from None


def to_flat(state: State) -> State:
    """Nested names to flat ones, live weight norm folded. Kyutai's names are left for `kyutai.to_flat`."""
    flat = {}
    for name, tensor in state.items():
        for pattern, replacement in NESTED:
            name = re.sub(pattern, replacement, name)
        flat[name] = tensor
    return fold_weight_norm(flat)


def fold_weight_norm(state: State) -> State:
    """`weight = g * v / |v|` in place of the pair, in PyTorch's old spelling or its new one."""
    spellings = {"parametrizations.weight.original0": "parametrizations.weight.original1", "weight_g": "weight_v"}
    folded = dict(state)
    for name in state:
        for g_name, v_name in spellings.items():
            base = name.removesuffix(g_name)
            if base != name and base + v_name in state:
                g, v = folded.pop(name), folded.pop(base + v_name)
                if not g.is_floating_point() or g.dtype != v.dtype or g.shape != (*v.shape[:1], *[1] * (v.dim() - 1)):
                    raise InputError(
                        f"{named(name)} must hold a number for each row of its {v_name}, {v.dtype} {tuple(v.shape)}, "
                        f"got {g.dtype} {tuple(g.shape)}"
                    )
                folded[base + "weight"] = torch._weight_norm(v, g, 0)
    return folded


def save_pretrained(model: Codec, directory: str | Path) -> None:
    """Write `config.json` and `model.safetensors`; a Mimi's as transformers' `MimiModel.from_pretrained` reads them."""
    _check_model(model)
    directory = path_of(directory, "directory")
    directory.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    _write(fold_weight_norm(state) if isinstance(model, Mimi) else state, directory / "model.safetensors")
    with replacing(directory / "config.json") as part:
        part.write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")


def save_kyutai(model: Codec, path: str | Path) -> None:
    """Write one `.safetensors` file in Kyutai's layout, which moshi and rustymimi read.

    Raises InputError for what that layout cannot hold (attention biases, heads that do not fill the width).
    """
    _check_model(model)
    if not isinstance(model.config, CodecConfig):
        raise InputError(f"Kyutai's layout holds a Mimi, got a {type(model).__name__}")
    _write(kyutai.from_flat(fold_weight_norm(model.state_dict()), model.config), path_of(path, "path"))


def _check_model(model: Any) -> None:
    if not isinstance(model, Codec):
        raise InputError(f"model must be a Mimi or a JodioModel, got {type(model).__name__}")


def fingerprint(model: Codec) -> str:
    """Sixteen hex digits that tell the quantizer's weights: codes are exchangeable between models that share them.

    The encoder and the decoder do not count (a fine-tuned decoder still reads the codes), nor does the precision the
    model runs in, since the codebooks stay fp32.
    """
    _check_model(model)
    digest = hashlib.sha256()
    for name, tensor in sorted(model.quantizer.state_dict().items()):
        if name.endswith(("embed_sum", "cluster_usage", "codebook.weight")):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


def _write(state: State, path: Path) -> None:
    """Whole or not at all."""
    with replacing(path) as part:
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}, part, {"format": "pt"})


def _files_of_directory(path: Path) -> tuple[list[Path], Path]:
    config, index = path / "config.json", path / "model.safetensors.index.json"
    if index.is_file():
        return [path / name for name in _shards(index)], config
    if (path / "model.safetensors").is_file() and _model_type(config) in (None, "jodio", *MIMI_TYPES):
        return [path / "model.safetensors"], config
    found = sorted(path.glob("tokenizer-*.safetensors"))
    if len(found) != 1:
        raise InputError(f"{path} holds no model.safetensors of a Mimi and {len(found)} tokenizer-*.safetensors")
    return found, config


def _shards(index: Path) -> list[str]:
    """The files, beside it, that an index names."""
    listed = read_json(index).get("weight_map")
    names = [*listed.values()] if isinstance(listed, dict) else []
    if not names or not all(isinstance(name, str) and name == os.path.basename(name) for name in names):
        raise InputError(f"{index} must map names of weights to names of files, got weight_map {shown(listed)}")
    return sorted(set(names))


def _files_of_hub(name: str) -> tuple[list[Path], Path]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    def fetch(file: str) -> Path:
        return Path(hf_hub_download(name, file))

    try:
        config = fetch("config.json")
        values = read_json(config)
        if _model_type(config) not in ("jodio", *MIMI_TYPES):  # a repository of Kyutai's
            return [fetch(str(values.get("mimi_name", kyutai.FILE_NAME)))], config
        try:
            return [fetch("model.safetensors")], config
        except EntryNotFoundError:
            return [fetch(part) for part in _shards(fetch("model.safetensors.index.json"))], config
    except (OSError, HfHubHTTPError, ValueError) as error:
        reason = re.split(r"\.\s|\n", str(error).strip())[0]  # the first sentence of what may be a page
        raise InputError(
            f"cannot fetch {name!r} from the hub ({type(error).__name__}: {reason}); offline, pass a local directory, "
            "a .safetensors file, or random:0"
        ) from None


def _model_type(config: Path) -> str | None:
    """What a config.json is for; "mimi" also where it does not say but has Mimi's fields, None where there is none."""
    values = read_json(config) if config.is_file() else {}
    return values.get("model_type", "mimi" if "upsampling_ratios" in values else None)

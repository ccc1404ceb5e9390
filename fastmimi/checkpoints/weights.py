"""Load and save checkpoints, in safetensors only, in transformers' layouts and in Kyutai's.

transformers has two layouts: the flat one of its released checkpoints, whose names the models here use too, and the
nested one of its state dicts since 5.20. `load` finds a checkpoint, converts it to the flat layout and fills a model
with it. Conversion from and to Kyutai's layout is in `kyutai.py`; weight norm, where a checkpoint has it, is folded
into plain weights here.
"""

from __future__ import annotations

import hashlib
import json
import logging
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
from ..models.config import AnyConfig, MimiCodecConfig
from ..models.continuous import ContinuousMimiConfig
from ..models.mimi import Mimi
from ..models.registry import ARCHITECTURES, MODEL_TYPES, architecture_of, build, config_from_json
from ..models.validation import read_json
from ..runtime import dispatch, quantized
from . import int8, kyutai, shapes

State = dict[str, Tensor]

NESTED = (  # names in state dicts of transformers >= 5.20 -> flat names
    (r"^encoder\.encoder_seanet\.", "encoder."),
    (r"^decoder\.decoder_seanet\.", "decoder."),
    (r"^encoder\.(encoder_transformer|downsample)\.", r"\1."),
    (r"^decoder\.(decoder_transformer|upsample)\.", r"\1."),
)
RANDOM = re.compile(rf"(?:({'|'.join(ARCHITECTURES)})-)?random(?::([0-9]{{1,18}}))?")  # sources with random weights
DEMO = Path(__file__).parent.parent / "assets" / "demo"
_log = logging.getLogger(__name__)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
MAX_LISTED = 20  # misfits that an error message lists; it only counts the others


@torch.inference_mode(False)  # inference tensors have no version counter: kernels would pack them at every call
def load(
    source: str | Path = "kyutai/mimi", *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
    impl: dispatch.Impl = "auto", num_codebooks: int | None = None, weights: str | None = None,
) -> Codec:  # fmt: skip
    """Load a codec for inference: in eval mode, with parameters that do not require gradients.

    Args:
        source: one of
            - a directory or a `.safetensors` file with a Mimi in transformers' or Kyutai's layout;
            - a `.safetensors` file of Pocket TTS, whose Mimi is read, a `ContinuousMimi`;
            - a directory that a JODIO or a ContinuousMimi was saved to;
            - a hub id, such as "kyutai/mimi";
            - "demo": a small Mimi that comes with the package; it codes speech, far from Kyutai's quality;
            - "random" or "random:<seed>": a Mimi with random weights;
            - "jodio-random" or "jodio-random:<seed>": a JODIO with random weights, 1.5 GB of them;
            - "continuous-random" or "continuous-random:<seed>": the Mimi of Pocket TTS with random weights.
        device: where the codec runs.
        dtype: the precision it runs in; codebooks and the search in them stay fp32.
        impl: "auto", "reference", "triton", "cpu", "onednn", or a dict from the name of an op to one of these.
        num_codebooks: number of codebooks that `encode` yields; by default all of the model's (32 for kyutai/mimi).
        weights: "int8" rounds the weights of the large layers to 255 levels per output channel
            (runtime/quantized.py). That changes some of the codes; on a CPU, streams then read a quarter of the bytes.

    Raises InputError if there is nothing at `source`, if it is not a supported codec, or if its tensors do not fit the
    configuration; one message lists all that do not fit.
    """
    if not isinstance(source, str | os.PathLike):
        raise InputError(f"source must be a path, a hub id, demo or random, got {shown(source)}")
    if weights is not None and not (isinstance(weights, str) and weights == "int8"):
        raise InputError(f"weights must be None or 'int8', got {shown(weights)}")
    dispatch.check_impl(impl)
    device, dtype = checks.device(device), checks.dtype(dtype)
    if weights == "int8" and dtype != torch.float32:
        raise InputError(f"weights='int8' computes in float32, got dtype={dtype}")
    if match := RANDOM.fullmatch(str(source)):
        model = random(ARCHITECTURES[match[1] or "mimi"].config(), int(match[2] or 0))
    else:
        config, state = read_checkpoint(DEMO if str(source) == "demo" else source)
        model = _without_weights(config)
        fill(model, state)
    model.impl = impl
    if num_codebooks is not None:
        model.num_codebooks = num_codebooks
    if weights == "int8":
        if not isinstance(model, Mimi):
            raise InputError("weights='int8' is only for Mimi: the weights of a JODIO have weight norm")
        for module in model.children():
            if module is not model.quantizer:  # its codebooks stay exact, so that codes keep their meaning
                quantized.round_weights(module)
    model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
    _log.info("loaded a %s from %s: %s on %s", type(model).__name__, source, dtype, device)
    return model


def _without_weights(config: AnyConfig) -> Codec:
    """A codec on the meta device, for `fill`."""
    with torch.device("meta"):
        return build(config)


def random(config: AnyConfig, seed: int = 0) -> Any:
    """A codec with random weights, which depend only on the seed, scaled so that its codes vary with the audio."""
    model = _without_weights(config)
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size, std: float) -> Tensor:
        return torch.empty(shape).normal_(std=std, generator=generator)

    state = {}
    for name, tensor in model.state_dict().items():
        kind = name.rsplit(".", 1)[1]
        if kind == "scale":
            state[name] = torch.full(tensor.shape, 0.01)
        elif kind == "original0":  # magnitude of weight norm: makes up for the power that SiLU takes away
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
    """Load a flat state dict into a model, which may be on the meta device.

    Tensors of fewer than 32 bits become float32. If the model has no encoder or no decoder, the tensors of that half
    are skipped. Raises InputError that lists all missing, unknown and unfitting tensors.
    """
    own = model.state_dict()
    skipped = tuple(
        prefix
        for half, prefixes in (
            (model.encoder, ("encoder.", "encoder_transformer.", "downsample.")),
            (model.decoder, ("decoder.", "decoder_transformer.", "upsample.")),
        )
        if half is None
        for prefix in prefixes
    )
    state = {name: tensor for name, tensor in state.items() if not (skipped and name.startswith(skipped))}
    misfits = [f"missing {name}" for name in own if name not in state]
    misfits += [f"unknown {named(name)}" for name in state if name not in own]
    known = {name: tensor for name, tensor in state.items() if name in own}
    misfits += [
        f"{name} must be {tuple(own[name].shape)}, got {tuple(tensor.shape)}"
        for name, tensor in known.items()
        if own[name].shape != tensor.shape
    ]
    misfits += [
        f"{name} must be floating-point, got {tensor.dtype}"
        for name, tensor in known.items()
        if tensor.dtype not in FLOATS
    ]
    if misfits:
        more = f"; and {len(misfits) - MAX_LISTED} more" if len(misfits) > MAX_LISTED else ""
        raise InputError(f"the checkpoint does not fit the model: {'; '.join(misfits[:MAX_LISTED])}{more}")
    wide = {name: tensor.float() if tensor.dtype.itemsize < 4 else tensor for name, tensor in state.items()}
    model.load_state_dict(wide, assign=True)


def read_checkpoint(source: str | Path) -> tuple[AnyConfig, State]:
    """The configuration and the state dict of a directory, a file, or a hub id.

    A Mimi's state dict is converted to the flat layout, a JODIO's is returned unchanged. Raises InputError if there is
    no checkpoint at `source`, or if it is much larger or smaller than its configuration.
    """
    path, exists = Path(source), _exists(source)
    if exists and path.is_dir():
        files, config_file = _files_in_directory(path)
    elif exists or path.suffix or str(source).count("/") != 1:
        files, config_file = [path], path.parent / "config.json"
    else:
        files, config_file = _files_on_hub(str(source))
    state: State = {}
    for file in files:
        state |= read_safetensors(file)
    state = kyutai.mimi_of(int8.dequantize(state))
    kind = _model_type(config_file)
    config = None if kind is None or kind not in MODEL_TYPES else config_from_json(config_file)
    if config is not None:
        shapes.check_size(config, state, source)
    if config is not None and not architecture_of(config).flat:
        return config, state
    state = to_flat(state)
    if config is None:
        config = shapes.infer_config(state)
        shapes.check_size(config, state, source)
    if kyutai.is_kyutai(state):
        assert isinstance(config, MimiCodecConfig | ContinuousMimiConfig)
        state = kyutai.to_flat(state, config)
    return config, state


def _exists(source: str | os.PathLike[str]) -> bool:
    """Whether a source is an existing path. Raises InputError if it cannot be a path at all."""
    try:
        return Path(source).exists()
    except (OSError, ValueError) as error:  # a name that is too long or contains NUL
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"source must be a path, a hub id, demo or random, got {shown(source)} ({reason})") from None


def read_safetensors(path: str | Path) -> State:
    """All tensors of a file, memory-mapped. Raises InputError if it is missing, truncated, or of another format."""
    path = path_of(path, "path")
    if not path.is_file():
        raise InputError(f"no model at {str(path)!r}: pass a directory, a .safetensors file, a hub id or demo")
    if path.suffix != ".safetensors":
        raise InputError(f"{path} is not a .safetensors file; pickled checkpoints can run code and are not read")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, ValueError, RuntimeError) as error:  # the last two: for types that PyTorch does not have
        raise InputError(f"{path} is not a complete safetensors file ({one_line(error)})") from None


def flat_name(name: str) -> str:
    """The flat name of a module or tensor that may have a nested one."""
    for pattern, flat in NESTED:
        name = re.sub(pattern, flat, f"{name}.")[:-1]
    return name


def to_flat(state: State) -> State:
    """Convert nested names to flat ones and fold weight norm; names in Kyutai's layout are left to `kyutai.to_flat`."""
    return fold_weight_norm({flat_name(name): tensor for name, tensor in state.items()})


def fold_weight_norm(state: State) -> State:
    """Replace each pair (g, v) of weight norm by `weight = g * v / |v|`, with v's norm taken for each row.

    Pairs may have the names of `torch.nn.utils.weight_norm` or those of `torch.nn.utils.parametrizations.weight_norm`.
    Raises InputError if the shapes or dtypes of a pair do not fit each other.
    """
    spellings = {"parametrizations.weight.original0": "parametrizations.weight.original1", "weight_g": "weight_v"}
    folded = dict(state)
    for name in state:
        for g_name, v_name in spellings.items():
            base = name.removesuffix(g_name)
            if base != name and base + v_name in state:
                g, v = folded.pop(name), folded.pop(base + v_name)
                if not g.is_floating_point() or g.dtype != v.dtype or g.shape != (*v.shape[:1], *[1] * (v.dim() - 1)):
                    raise InputError(
                        f"{named(name)} must hold one number per row of its {v_name}, {v.dtype} {tuple(v.shape)}, "
                        f"got {g.dtype} {tuple(g.shape)}"
                    )
                folded[base + "weight"] = torch._weight_norm(v, g, 0)
    return folded


def save_pretrained(model: Codec, directory: str | Path) -> None:
    """Write `config.json` and `model.safetensors` to a directory, which is created if needed; each file atomically.

    transformers' `MimiModel.from_pretrained` reads those of a Mimi. Raises InputError if `model` is not a codec.
    """
    _check_model(model)
    directory = path_of(directory, "directory")
    directory.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    state = fold_weight_norm(state) if architecture_of(model.config).flat else state
    write_safetensors(state, directory / "model.safetensors")
    with replacing(directory / "config.json") as temporary:
        temporary.write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")


def save_kyutai(model: Codec, path: str | Path) -> None:
    """Write one `.safetensors` file in Kyutai's layout, which moshi and rustymimi read.

    Raises InputError for a model that the layout cannot represent: a JODIO, attention biases, or heads whose
    dimensions do not add up to `hidden_size`.
    """
    _check_model(model)
    if not isinstance(model.config, MimiCodecConfig):
        raise InputError(f"only a Mimi can be saved in Kyutai's layout, got a {type(model).__name__}")
    write_safetensors(kyutai.from_flat(fold_weight_norm(model.state_dict()), model.config), path_of(path, "path"))


def _check_model(model: object) -> None:
    if not isinstance(model, Codec):
        raise InputError(f"model must be a Mimi or a JodioModel, got {type(model).__name__}")


def fingerprint(model: Codec) -> str:
    """A hash of the quantizer's weights, 16 hex digits: models with the same fingerprint can decode each other's codes.

    It does not depend on the encoder and the decoder (a fine-tuned decoder still decodes the codes), nor on the
    precision that the model runs in, since codebooks stay fp32. Raises InputError for a codec without codes.
    """
    _check_model(model)
    if not model.total_codebooks:
        raise checks.no_codes()
    wanted = ("embed_sum", "cluster_usage", "codebook.weight")
    return _digest({name: t for name, t in model.quantizer.state_dict().items() if name.endswith(wanted)})


def fingerprint_of_encoder(model: Codec) -> str:
    """A hash of the encoder's weights in the precision that they were loaded in, 16 hex digits.

    Models that are equal in this and in `fingerprint` encode audio to the same codes.
    """
    _check_model(model)
    modules = enumerate(model.parts("encode"))
    return _digest({f"{i}.{name}": t for i, m in modules if m is not None for name, t in m.state_dict().items()})


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


def write_safetensors(state: State, path: Path) -> None:
    """Write a safetensors file atomically, with the permissions of any new file."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, {"format": "pt"})
        temporary.chmod(mode)  # safetensors 0.8 makes files that only their owner can read


def _files_in_directory(path: Path) -> tuple[list[Path], Path]:
    """The safetensors files of a checkpoint in a directory, and its config.json, which may be missing."""
    config, index = path / "config.json", path / "model.safetensors.index.json"
    if index.is_file():
        return [path / name for name in _shards(index)], config
    if (path / "model.safetensors").is_file() and _model_type(config) in (None, *MODEL_TYPES):
        return [path / "model.safetensors"], config
    found = sorted(path.glob("tokenizer-*.safetensors"))
    if len(found) != 1:
        raise InputError(f"{path} holds no model.safetensors of a Mimi and {len(found)} tokenizer-*.safetensors")
    return found, config


def _shards(index: Path) -> list[str]:
    """The file names that an index lists. Raises InputError if one of them has a directory part."""
    listed = read_json(index).get("weight_map")
    names = [*listed.values()] if isinstance(listed, dict) else []
    if not names or not all(isinstance(name, str) and name == os.path.basename(name) for name in names):
        raise InputError(f"{index} must map names of weights to names of files, got weight_map {shown(listed)}")
    return sorted(set(names))


def _files_on_hub(name: str) -> tuple[list[Path], Path]:
    """As `_files_in_directory`, for a hub id; the files are downloaded to huggingface_hub's cache where needed."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    def fetch(file: str) -> Path:
        return Path(hf_hub_download(name, file))

    try:
        config = fetch("config.json")
        values = read_json(config)
        if _model_type(config) not in MODEL_TYPES:  # a repository in Kyutai's layout
            return [fetch(str(values.get("mimi_name", kyutai.FILE_NAME)))], config
        try:
            return [fetch("model.safetensors")], config
        except EntryNotFoundError:
            return [fetch(part) for part in _shards(fetch("model.safetensors.index.json"))], config
    except (OSError, HfHubHTTPError, ValueError) as error:
        reason = re.split(r"\.\s|\n", str(error).strip())[0]  # only the first sentence: it may be a page long
        raise InputError(
            f"cannot fetch {name!r} from the hub ({type(error).__name__}: {reason}); offline, pass a local directory, "
            "a .safetensors file, or random:0"
        ) from None


def _model_type(config: Path) -> str | None:
    """The model type in a config.json; "mimi" if it has none but Mimi's fields; None without a type or a file."""
    values = read_json(config) if config.is_file() else {}
    return values.get("model_type", "mimi" if "upsampling_ratios" in values else None)

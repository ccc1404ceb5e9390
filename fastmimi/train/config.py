"""What a training run is made of: dataclasses whose defaults are the paper's, read from YAML.

Where the paper (arXiv 2410.00037, sections 3.3 and 4.2) gives no number, the default is that of the work it builds on:
EnCodec (arXiv 2210.13438) for the balancer, the discriminators' insides and what the losses weigh against one another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import InputError, named, shown
from ..io.files import check_input, path_of
from ..models.validation import naming

# transformers' `get_scheduler`; those that need no more than a number of steps
SCHEDULES = ["constant_with_warmup", "linear", "cosine", "polynomial"]
# what may be another after a stop; the rest is what makes it the same run
FREE = {"out", "steps", "save_every", "log_every", "listen_every", "data.folder", "data.dataset", "data.workers",
        "model.impl"}  # fmt: skip

MANY, TINY, SHARE = 1e9, 1e-12, (0, 1)
LARGEST = 65_536  # bytes of a configuration
REFUSALS = (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError, OSError)
N_FFTS = (16, 65_536)
LIMITS = {  # least, most
    "steps": (1, MANY),
    "seed": (0, MANY),  # numpy's end at 2**32, and each step of each process has its own
    "save_every": (1, MANY),
    "log_every": (1, MANY),
    "listen_every": (1, MANY),
    "data.seconds": (0.1, 3600),
    "data.batch_size": (1, 65_536),
    "data.workers": (0, 1024),
    "optimizer.lr": (TINY, MANY),
    "optimizer.weight_decay": (0, MANY),
    "optimizer.ema": SHARE,
    "optimizer.clip": (TINY, math.inf),
    "optimizer.warmup_steps": (0, MANY),
    "quantizer.decay": SHARE,
    "quantizer.commitment": (0, MANY),
    "quantizer.begin": (0, MANY),
    "quantizer.kmeans_latents": (1, 1e8),
    "quantizer.kmeans_iterations": (0, 1e5),
    "quantizer.replace_below": SHARE,
    "quantizer.replace_every": (1, MANY),
    "quantizer.raw": SHARE,
    "losses.norm": (TINY, MANY),
    "losses.balancer_decay": SHARE,
    "discriminator.filters": (1, 4096),
    "distillation.weight": (0, MANY),
}


def _check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(map(str, choices))}, got {shown(value)}")


@dataclass
class ModelConfig:
    """What is trained: a checkpoint, or a new codec."""

    load: str | None = None  # whatever `fastmimi.load` takes, to go on from; None begins anew
    architecture: str = "mimi"  # or "jodio"; of a new codec
    changes: dict[str, Any] = field(default_factory=dict)  # of a new codec: fields of its CodecConfig or JodioConfig
    freeze: list[str] = field(default_factory=list)  # modules that stay as they are, by name: encoder, quantizer, ...
    impl: str = "auto"


@dataclass
class DataConfig:
    """Where the audio is from, and how it is cut."""

    folder: str | None = None  # of audio files, searched to the bottom
    dataset: str | None = None  # or what `datasets.load_dataset` takes
    name: str | None = None  # of its configuration, where it has several
    split: str = "train"
    column: str = "audio"
    seconds: float = 12.0  # of a window
    batch_size: int = 128  # windows of a step, over all processes
    workers: int = 4  # processes that read


@dataclass
class OptimizerConfig:
    """AdamW, of the codec and of the discriminators."""

    lr: float = 8e-4
    betas: list[float] = field(default_factory=lambda: [0.5, 0.9])
    weight_decay: float = 5e-2  # of the transformers' parameters only
    ema: float = 0.99  # of the weights that are kept in the end
    clip: float = math.inf  # largest norm of the codec's gradient
    schedule: str = "constant_with_warmup"  # or another of SCHEDULES
    warmup_steps: int = 0


@dataclass
class QuantizerConfig:
    """How codebooks learn."""

    decay: float = 0.99  # of the running means that are the entries
    commitment: float = 1.0  # weight of the latents' distance to their entries
    begin: int = 0  # step before which every sequence passes as it is
    kmeans_latents: int = 20_000  # gathered from then on; k-means of them gives the first entries
    kmeans_iterations: int = 10
    replace_below: float = 0.1  # entries used less than this share of the mean become latents of the batch
    replace_every: int = 5  # steps
    dropout: bool = True  # of levels: how many are added up is drawn for each sequence
    raw: float = 0.5  # share of sequences that pass the quantizer as they are


@dataclass
class LossConfig:
    """What the losses on the audio weigh against one another, as shares of the gradient's norm; 0 leaves one out."""

    adversarial: float = 4.0
    features: float = 4.0
    l1: float = 0.0
    mel: float = 0.0
    norm: float = 1.0  # of their gradient in the audio of each window; commitment and distillation stand beside it
    balancer_decay: float = 0.999


@dataclass
class DiscriminatorConfig:
    """Multi-scale STFT discriminators."""

    n_ffts: list[int] = field(default_factory=lambda: [2048, 1024, 512, 256, 128])
    filters: int = 32


@dataclass
class DistillationConfig:
    """What the first codebook learns from a model that knows words."""

    teacher: str | None = "microsoft/wavlm-large"  # hub id, directory or config.json (random weights); None: without
    weight: float = 1.0
    normalize: bool = True  # the teacher hears audio of mean 0 and variance 1


@dataclass
class TrainConfig:
    """A run. `steps` are of the codec's optimizer; files go to `out`."""

    out: str = "run"
    steps: int = 4_000_000
    seed: int = 0
    mixed_precision: str | None = None  # no, bf16 or fp16; None: as `accelerate launch` says
    save_every: int = 1000
    log_every: int = 10
    listen_every: int = 1000  # steps between samples of audio in the log
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)

    def __post_init__(self) -> None:
        losses, data, optimizer = self.losses, self.data, self.optimizer
        weights = {name: getattr(losses, name) for name in ("adversarial", "features", "l1", "mel")}
        if not all(0 <= weight <= MANY for weight in weights.values()) or not any(weights.values()):
            raise InputError(f"losses must lie in [0, {MANY:g}] and not all be 0, got {weights}")
        if (data.folder is None) == (data.dataset is None):
            raise InputError("data needs either a folder or a dataset")
        _check_choice("model.architecture", self.model.architecture, ["mimi", "jodio"])
        _check_choice("mixed_precision", self.mixed_precision, [None, "no", "bf16", "fp16"])
        _check_choice("optimizer.schedule", optimizer.schedule, SCHEDULES)
        for name, value in self._flat().items():
            if name in LIMITS and not LIMITS[name][0] <= value <= LIMITS[name][1]:
                raise InputError("{} must lie in [{:g}, {:g}], got {}".format(name, *LIMITS[name], value))
        n_ffts, (least, most) = self.discriminator.n_ffts, N_FFTS
        if not 1 <= len(n_ffts) <= 16 or not least <= min(n_ffts) <= max(n_ffts) <= most:
            raise InputError(
                f"discriminator.n_ffts must be 1 to 16 numbers from {least} to {most}, got {shown(n_ffts)}"
            )
        if len(optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in optimizer.betas):
            raise InputError(f"optimizer.betas must be two numbers in [0, 1), got {optimizer.betas}")

    @classmethod
    def read(cls, path: str | Path, changes: Sequence[str] = ()) -> TrainConfig:
        """A YAML file, with `changes` such as "optimizer.lr=1e-4"; InputError names what does not fit."""
        file = check_input(path_of(path, "the path of a configuration"))
        with naming(file), _sentences():
            loaded = OmegaConf.load(StringIO(_text(file)))
            if not isinstance(loaded, DictConfig):
                raise InputError(f"a configuration must be fields and their values, got {shown(loaded)}")
            given = OmegaConf.merge(loaded, OmegaConf.from_dotlist([*changes]))
            return cls.of(OmegaConf.to_container(given))

    @classmethod
    def of(cls, values: Any) -> TrainConfig:
        """Of nested dictionaries; InputError names what does not fit."""
        if not isinstance(values, dict):
            raise InputError(f"a configuration must be fields and their values, got {shown(values)}")
        with _sentences():
            made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), values))
        assert isinstance(made, cls)
        return made

    def check_same_run(self, before: TrainConfig) -> None:
        """Raise InputError where this is another run than the one that began as `before`."""
        was, now = before._flat(), self._flat()
        for name, value in now.items():
            if name not in FREE and was[name] != value:
                raise InputError(f"{self.out} holds a run with {name} {was[name]}, got {value}: choose another `out`")

    def _flat(self) -> dict[str, Any]:
        """Fields by name, those of parts as "part.field"."""
        flat: dict[str, Any] = {}
        for name, value in self.__dict__.items():
            flat |= {f"{name}.{key}": v for key, v in vars(value).items()} if is_dataclass(value) else {name: value}
        return flat

    def write(self, path: Path) -> None:
        """To YAML, whole."""
        path.write_text(OmegaConf.to_yaml(OmegaConf.structured(self)))


def _text(file: Path) -> str:
    """Of a YAML file of sane size, without aliases: they let a few lines stand for gigabytes."""
    if (size := file.stat().st_size) > LARGEST:
        raise InputError(f"a configuration must have at most {LARGEST} bytes, got {size}")
    text = file.read_text(encoding="utf-8")
    for event in yaml.parse(text):
        if isinstance(event, yaml.AliasEvent):
            raise InputError(f"what an alias stands for must be written out, got *{event.anchor}")
    return text


@contextmanager
def _sentences() -> Iterator[None]:
    """OmegaConf's errors, and those of the YAML reader, as one sentence that names the field."""
    try:
        yield
    except InputError:
        raise
    except (
        OmegaConfBaseException,
        yaml.YAMLError,
        ValueError,
        TypeError,
        OverflowError,
        RecursionError,
        OSError,
    ) as error:
        field = getattr(error, "full_key", None)
        message = " ".join(str(getattr(error, "msg", None) or error).split("\n    full_key")[0].split())
        raise InputError(f"{named(field)}: {message}" if field else message) from None

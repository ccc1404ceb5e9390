"""The configuration of a training run: dataclasses with the paper's values as defaults, read from YAML.

Where the Mimi paper (arXiv 2410.00037, sections 3.3 and 4.2) gives no value, the default is that of EnCodec (arXiv
2210.13438): the loss balancer, the architecture of the discriminators and the weights of the losses.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from io import StringIO
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import InputError, named, shown
from ..io.files import check_input, path_of
from ..models.registry import ARCHITECTURES
from ..models.validation import Json, naming

AUDIO_LOSSES = ("adversarial", "features", "l1", "mel", "spectrum")  # fields of LossConfig that are weights
# names for transformers' `get_scheduler`, limited to schedules whose only parameters are numbers of steps
SCHEDULES = ["constant_with_warmup", "linear", "cosine", "polynomial"]
# fields that may differ when a run is resumed; all others must equal those of the run that is resumed
MAY_CHANGE_ON_RESUME = {"out", "steps", "save_every", "log_every", "listen_every", "data.folder", "data.dataset",
                        "data.workers", "model.impl"}  # fmt: skip

MANY, TINY, FRACTION = 1e9, 1e-12, (0, 1)
MAX_CONFIG_BYTES = 65_536
PARSE_ERRORS = (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError, OSError)
FIELD = re.compile(r"[A-Za-z_]\w*(\.\w+|\[\w+\])*")  # its path, such as optimizer.betas[0]
N_FFT_LIMITS = (16, 65_536)
LIMITS = {  # field: (smallest, largest) allowed value
    "steps": (1, MANY),
    "seed": (0, MANY),  # NumPy's limit is 2**32; every step of every process adds its number to the seed
    "save_every": (1, MANY),
    "log_every": (1, MANY),
    "listen_every": (1, MANY),
    "data.seconds": (0.1, 3600),
    "data.batch_size": (1, 65_536),
    "data.workers": (0, 1024),
    "optimizer.lr": (TINY, MANY),
    "optimizer.weight_decay": (0, MANY),
    "optimizer.ema": FRACTION,
    "optimizer.clip": (TINY, math.inf),
    "optimizer.warmup_steps": (0, MANY),
    "quantizer.decay": FRACTION,
    "quantizer.commitment": (0, MANY),
    "quantizer.begin": (0, MANY),
    "quantizer.kmeans_latents": (1, 1e8),
    "quantizer.kmeans_iterations": (0, 1e5),
    "quantizer.replace_below": FRACTION,
    "quantizer.replace_every": (1, MANY),
    "quantizer.raw": FRACTION,
    "quantizer.kept_levels": (1, 65_536),
    "losses.mel_floor": (TINY, 1),
    "losses.norm": (TINY, MANY),
    "losses.balancer_decay": FRACTION,
    "discriminator.filters": (1, 4096),
    "discriminator.lr": (TINY, MANY),
    "discriminator.gain": (1e-3, 1e3),
    "discriminator.head_start": (0, MANY),
    "distillation.weight": (0, MANY),
}


def _check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(map(str, choices))}, got {shown(value)}")


@dataclass
class ModelConfig:
    """The codec to train: loaded from a checkpoint, or new with random weights."""

    load: str | None = None  # initial weights, anything that `fastmimi.load` accepts; None: random weights
    architecture: str = "mimi"  # architecture of a new codec: "mimi" or "jodio"
    changes: Json = field(default_factory=dict)  # fields of a new codec's MimiCodecConfig or JodioConfig
    widen: Json = field(default_factory=dict)  # fields of a loaded Mimi's configuration, with more channels (widen.py)
    freeze: list[str] = field(default_factory=list)  # names of modules that are not trained: encoder, quantizer, ...
    impl: str = "auto"  # implementation of the ops, as for `fastmimi.load`


@dataclass
class DataConfig:
    """Where the training audio comes from, and how it is cut into windows. Set either `folder` or `dataset`."""

    folder: str | None = None  # a directory of audio files, scanned recursively
    dataset: str | None = None  # the `path` argument of `datasets.load_dataset`
    name: str | None = None  # the data set's configuration, if it has several
    split: str = "train"
    column: str = "audio"  # the column that holds the audio
    seconds: float = 12.0  # length of a window
    batch_size: int = 128  # windows per step, summed over all processes
    workers: int = 4  # data loader processes


@dataclass
class OptimizerConfig:
    """The optimizers of the codec and of the discriminators; those of the discriminators are always AdamW."""

    kind: str = "adamw"  # of the codec: adamw, or muon (muon.py), which takes longer for a step and needs fewer
    lr: float = 8e-4  # of both, unless discriminator.lr is set
    betas: list[float] = field(default_factory=lambda: [0.5, 0.9])
    weight_decay: float = 5e-2  # applied to the transformers' parameters only
    ema: float = 0.99  # decay of the exponential moving average of the weights, which becomes the trained model
    clip: float = math.inf  # maximum norm of the codec's gradient
    schedule: str = "constant_with_warmup"  # learning-rate schedule, one of SCHEDULES
    warmup_steps: int = 0


@dataclass
class QuantizerConfig:
    """How the codebooks are trained."""

    decay: float = 0.99  # of the exponential moving averages that the entries are
    commitment: float = 1.0  # weight of the commitment loss
    # From step `begin` on, `kmeans_latents` latents are collected; k-means gives the first entries of a new codec.
    # Until then all latents bypass the quantizer.
    begin: int = 0
    kmeans_latents: int = 20_000
    kmeans_iterations: int = 10
    replace_below: float = 0.1  # replace entries whose count is below this fraction of the mean count
    replace_every: int = 5  # steps between replacements
    dropout: bool = True  # quantizer dropout: decode each sequence from a random number of levels
    kept_levels: int = 1  # the smallest such number; the semantic levels are always kept
    raw: float = 0.5  # fraction of sequences whose latents bypass the quantizer


@dataclass
class LossConfig:
    """Weights of the losses on the audio: each loss's share of the norm of the gradient. 0 disables a loss."""

    adversarial: float = 4.0  # hinge loss of the generator
    features: float = 4.0  # feature matching
    l1: float = 0.0  # of the waveform
    mel: float = 0.0  # multi-scale log-mel distance
    mel_floor: float = 1e-5  # magnitude below which its bands all count as silence
    spectrum: float = 0.0  # of complex spectra with compressed magnitudes, at several scales
    # norm of the balanced gradient with respect to the audio of one window; the commitment and distillation losses are
    # not balanced, and are weighted relative to it
    norm: float = 1.0
    balancer_decay: float = 0.999  # of the exponential moving averages of the gradients' norms


@dataclass
class DiscriminatorConfig:
    """The multi-scale STFT discriminator.

    In short runs, discriminators learn much faster with a higher learning rate than the codec's and with louder audio:
    docs/demo.md has the figures.
    """

    n_ffts: list[int] = field(default_factory=lambda: [2048, 1024, 512, 256, 128])
    filters: int = 32  # channels of each convolution
    lr: float | None = None  # None: optimizer.lr
    gain: float = 1.0  # factor for the discriminators' audio
    # Initial steps in which only the discriminators are trained. The codec's schedule of learning rates and
    # quantizer.begin count from their end, the discriminators' schedule from the beginning of the run.
    head_start: int = 0


@dataclass
class DistillationConfig:
    """Distillation of a self-supervised speech model into the semantic codebook."""

    teacher: str | None = "microsoft/wavlm-large"  # hub id, directory, or config.json for random weights; None: none
    weight: float = 1.0
    normalize: bool = True  # normalize the teacher's input to mean 0 and variance 1


@dataclass
class TrainConfig:
    """A training run, written to the directory `out`."""

    out: str = "run"
    steps: int = 4_000_000  # updates of the codec, plus discriminator.head_start
    seed: int = 0
    mixed_precision: str | None = None  # no, bf16 or fp16; None: as configured for `accelerate launch`
    save_every: int = 1000  # steps between checkpoints
    log_every: int = 10  # steps between logged losses
    listen_every: int = 1000  # steps between logged samples of audio
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)

    def __post_init__(self) -> None:
        losses, data, optimizer = self.losses, self.data, self.optimizer
        weights = {name: getattr(losses, name) for name in AUDIO_LOSSES}
        if not all(0 <= weight <= MANY for weight in weights.values()) or not any(weights.values()):
            raise InputError(f"losses must lie in [0, {MANY:g}] and not all be 0, got {weights}")
        if (data.folder is None) == (data.dataset is None):
            raise InputError("data needs either a folder or a dataset")
        with_codes = [name for name, entry in ARCHITECTURES.items() if entry.codes]
        _check_choice("model.architecture", self.model.architecture, with_codes)
        _check_choice("mixed_precision", self.mixed_precision, [None, "no", "bf16", "fp16"])
        _check_choice("optimizer.kind", optimizer.kind, ["adamw", "muon"])
        _check_choice("optimizer.schedule", optimizer.schedule, SCHEDULES)
        for name, value in self._flat().items():
            if name in LIMITS and value is not None and not LIMITS[name][0] <= value <= LIMITS[name][1]:
                raise InputError("{} must lie in [{:g}, {:g}], got {}".format(name, *LIMITS[name], value))
        n_ffts, (smallest, largest) = self.discriminator.n_ffts, N_FFT_LIMITS
        if not 1 <= len(n_ffts) <= 16 or not smallest <= min(n_ffts) <= max(n_ffts) <= largest:
            raise InputError(
                f"discriminator.n_ffts must be 1 to 16 numbers from {smallest} to {largest}, got {shown(n_ffts)}"
            )
        head_start = self.discriminator.head_start
        if head_start >= self.steps:
            raise InputError(f"discriminator.head_start must be less than steps ({self.steps}), got {head_start}")
        if head_start and not weights["adversarial"] and not weights["features"]:
            raise InputError(
                f"discriminator.head_start is {head_start}, but there are no discriminators: "
                "losses.adversarial and losses.features are 0"
            )
        if len(optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in optimizer.betas):
            raise InputError(f"optimizer.betas must be two numbers in [0, 1), got {optimizer.betas}")

    @classmethod
    def read(cls, path: str | Path, changes: Sequence[str] = ()) -> TrainConfig:
        """Read a YAML file and apply `changes` such as "optimizer.lr=1e-4".

        Raises InputError, which names the file and the field, for a file that cannot be read, an unknown field or an
        invalid value.
        """
        file = check_input(path_of(path, "the path of a configuration"))
        with naming(file), _one_sentence_errors():
            loaded = OmegaConf.load(StringIO(_read_yaml_text(file)))
            if not isinstance(loaded, DictConfig):
                raise InputError(f"a configuration must be fields and their values, got {shown(loaded)}")
            for change in changes:
                if isinstance(change, str) and not FIELD.fullmatch(change.partition("=")[0].strip()):
                    raise InputError(f"a change must be a field and its value, such as steps=1000, got {shown(change)}")
            merged = OmegaConf.merge(loaded, OmegaConf.from_dotlist([*changes]))
            return cls.of(OmegaConf.to_container(merged))

    @classmethod
    def of(cls, values: object) -> TrainConfig:
        """The configuration from nested dictionaries; raises InputError for an unknown field or an invalid value."""
        if not isinstance(values, dict):
            raise InputError(f"a configuration must be fields and their values, got {shown(values)}")
        with _one_sentence_errors():
            config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), values))
        assert isinstance(config, cls)
        return config

    def check_same_run(self, before: TrainConfig) -> None:
        """Raise InputError if a run that was started with configuration `before` cannot be resumed with this one."""
        was, now = before._flat(), self._flat()
        for name, value in now.items():
            if name not in MAY_CHANGE_ON_RESUME and was[name] != value:
                raise InputError(f"{self.out} holds a run with {name} {was[name]}, got {value}: choose another `out`")

    def _flat(self) -> Json:
        """All fields as one flat dictionary; those of a section are named "section.field"."""
        flat: Json = {}
        for name, value in self.__dict__.items():
            flat |= {f"{name}.{key}": v for key, v in vars(value).items()} if is_dataclass(value) else {name: value}
        return flat

    def write(self, path: Path) -> None:
        """Write all fields, defaults included, as YAML."""
        path.write_text(OmegaConf.to_yaml(OmegaConf.structured(self)))


def _read_yaml_text(file: Path) -> str:
    """The text of a YAML file.

    Raises InputError for large files and for aliases, with which a few lines can expand to gigabytes.
    """
    if (size := file.stat().st_size) > MAX_CONFIG_BYTES:
        raise InputError(f"a configuration must have at most {MAX_CONFIG_BYTES} bytes, got {size}")
    text = file.read_text(encoding="utf-8")
    for event in yaml.parse(text):
        if isinstance(event, yaml.AliasEvent):
            raise InputError(f"a configuration must not contain YAML aliases, got *{event.anchor}")
    return text


@contextmanager
def _one_sentence_errors() -> Iterator[None]:
    """Turn errors of OmegaConf and of the YAML parser into an InputError of one sentence that names the field."""
    try:
        yield
    except InputError:
        raise
    except PARSE_ERRORS as error:
        field = getattr(error, "full_key", None)
        message = " ".join(str(getattr(error, "msg", None) or error).split("\n    full_key")[0].split())
        raise InputError(f"{named(field)}: {message}" if field else message) from None

"""The architectures of fastmimi, each one entry: loading, training, costs and the command line read them here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, shown
from ..runtime.dispatch import Impl
from .codec import Codec
from .config import MIMI_TYPES, AnyConfig, JodioConfig, MimiCodecConfig
from .continuous import ContinuousMimi, ContinuousMimiConfig
from .jodio import JodioModel
from .mimi import Mimi
from .validation import naming, read_json


@dataclass(frozen=True)
class Architecture:
    """A configuration class and the codec that is built from it.

    model_types: values of `model_type` in its `config.json`.
    flat: whether its checkpoints come in several layouts, which are converted to the model's own flat names, without
        live weight norm; otherwise they have the model's names.
    codes: whether it has codes; training is for those.
    """

    config: type[AnyConfig]
    model: type[Codec]
    model_types: tuple[str, ...]
    flat: bool
    codes: bool = True


ARCHITECTURES = {
    "mimi": Architecture(MimiCodecConfig, Mimi, MIMI_TYPES, flat=True),
    "jodio": Architecture(JodioConfig, JodioModel, ("jodio",), flat=False),
    "continuous": Architecture(ContinuousMimiConfig, ContinuousMimi, ("mimi_continuous",), flat=True, codes=False),
}
MODEL_TYPES = tuple(kind for architecture in ARCHITECTURES.values() for kind in architecture.model_types)


def architecture_of(config: AnyConfig) -> Architecture:
    """The architecture of a configuration."""
    return next(entry for entry in ARCHITECTURES.values() if isinstance(config, entry.config))


def build(config: AnyConfig, impl: Impl = "auto") -> Codec:
    """A codec with PyTorch's initial weights; `impl` as for `Codec`."""
    return architecture_of(config).model(config, impl=impl)


def config_from_json(path: str | Path) -> AnyConfig:
    """Read a `config.json` of any architecture; one without `model_type` is a Mimi's.

    Raises InputError if it is not JSON or describes another model.
    """
    values = read_json(path)
    kind = values.get("model_type", "mimi")
    for entry in ARCHITECTURES.values():
        if kind in entry.model_types:
            with naming(path):
                return entry.config.from_dict(values)
    raise InputError(f"{path} describes a {shown(kind)} model, not {' or '.join(ARCHITECTURES)}")

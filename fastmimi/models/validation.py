"""The types and ranges of configuration fields, checked by pydantic, and the JSON files that hold them.

The bounds are far above those of any codec: they stop a damaged or hostile file before anything is built from it. Types
are strict: neither "8" nor 8.0 nor true is an integer, neither NaN nor infinity a number.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from ..errors import InputError, one_line, shown

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MOST_PARAMETERS = 1 << 32  # of a codec: 17 GB in fp32
LARGEST_JSON = 10_000_000  # bytes
LONGEST_HISTORY = 1 << 16  # positions or samples that a layer of a stream keeps

Width = Annotated[int, Field(ge=1, le=1 << 16)]  # channels, features, heads
DerivedWidth = Annotated[int, Field(ge=0, le=1 << 16)]  # 0: from other fields
Channels = Annotated[int, Field(ge=1, le=64)]  # of audio
Kernel = Annotated[int, Field(ge=1, le=1024)]  # taps, strides, dilations
Kernels = Annotated[list[Kernel], Field(min_length=1, max_length=16)]
Layers = Annotated[int, Field(ge=0, le=1024)]
Levels = Annotated[int, Field(ge=1, le=1024)]  # codebooks
Entries = Annotated[int, Field(ge=1, le=1 << 20)]  # of a codebook
Window = Annotated[int, Field(ge=1, le=LONGEST_HISTORY)]
Hertz = Annotated[int, Field(ge=1, le=10_000_000)]
Positions = Annotated[int, Field(ge=1, le=1 << 40)]
Count = Annotated[int, Field(ge=1, le=1 << 62)]
Json = dict[str, Any]  # an object of JSON or YAML, whose values are checked by whoever reads them
PadMode = Literal["constant", "replicate", "reflect"]

Finite = Annotated[float, Field(ge=-1e12, le=1e12)]
NotNegative = Annotated[float, Field(ge=0, le=1e12)]
Positive = Annotated[float, Field(gt=0, le=1e12)]
Share = Annotated[float, Field(ge=0, le=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Base = Annotated[float, Field(gt=1, le=1e12)]  # of a logarithm


STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)

# Feed-forward activations that the op knows, by transformers' names for them
ACTIVATIONS = {
    "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu",
    "swish": "silu", "tanh": "tanh",
}  # fmt: skip


class _Rope(BaseModel):
    model_config = STRICT
    rope_type: str
    rope_theta: Positive = 10_000.0


class _LinearRope(_Rope):
    factor: Positive


class _YarnRope(_Rope):
    rope_theta: Base = 10_000.0
    factor: Positive
    original_max_position_embeddings: Positions
    attention_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    mscale: Positive | None = None
    mscale_all_dim: Positive | None = None
    truncate: bool = True


class _Llama3Rope(_Rope):
    factor: Positive
    original_max_position_embeddings: Positions
    low_freq_factor: Positive
    high_freq_factor: Positive


class _ProportionalRope(_Rope):
    factor: Positive = 1.0
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] = 1.0


ROPES: dict[str, type[_Rope]] = {
    "default": _Rope,
    "linear": _LinearRope,
    "yarn": _YarnRope,
    "llama3": _Llama3Rope,
    "proportional": _ProportionalRope,
}


def check_fields(config: DataclassInstance) -> Json:
    """The fields of a dataclass, integers converted to floats where the field is a float.

    Raises InputError, naming the field and its value, unless every field is of its type and in its range.
    """
    return _check(_model_of(type(config)), {f.name: getattr(config, f.name) for f in fields(config)})


def check_rope(parameters: Json) -> None:
    """Raise InputError unless these are the parameters of a rope_type whose frequencies no length changes."""
    kind = parameters.get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise InputError(
            f"rope_type {kind!r} changes the frequencies with the length, so that no chunking equals the whole; "
            "use 'default', 'linear', 'yarn' or 'llama3'"
        )
    if not isinstance(kind, str) or kind not in ROPES:
        raise InputError(f"rope_type must be one of {', '.join(ROPES)}, got {shown(kind)}")
    _check(ROPES[kind], {"rope_type": "default", **parameters}, "rope_parameters.")
    if kind == "llama3" and parameters["low_freq_factor"] >= parameters["high_freq_factor"]:
        raise InputError(
            f"rope_parameters.low_freq_factor must be below high_freq_factor ({parameters['high_freq_factor']}), "
            f"got {parameters['low_freq_factor']}"
        )


def check_activation(name: str) -> None:
    """Raise InputError unless this is an activation of transformers'."""
    if name not in ACTIVATIONS:
        from transformers.activations import ACT2FN

        if name not in ACT2FN:
            raise InputError(f"hidden_act must be one of {', '.join(sorted(ACT2FN))}, got {shown(name)}")


def check_size(parameters: int) -> None:
    """Raise InputError for more parameters than any codec has."""
    if parameters > MOST_PARAMETERS:
        raise InputError(
            f"a configuration must come to at most {MOST_PARAMETERS:,} parameters, got {shown(parameters)}"
        )


@contextmanager
def naming(place: object) -> Iterator[None]:
    """Name the file in errors about its configuration."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from None


@cache
def _model_of(kind: type) -> type[BaseModel]:
    """A pydantic model with the fields of a dataclass, all of them required."""
    hints = get_type_hints(kind, include_extras=True)
    definitions: Json = {f.name: (hints[f.name], ...) for f in fields(kind)}
    return create_model(kind.__name__, __config__=STRICT, **definitions)


def _check(model: type[BaseModel], values: Json, prefix: str = "") -> Json:
    try:
        return vars(model.model_validate(values))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name = prefix + ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise InputError(f"{name} must be given, got {shown(first['input'])}") from None
        wanted = first["msg"].replace("Input should", "must").replace("List should", "must")
        raise InputError(f"{name} {wanted}, got {shown(first['input'])}") from None


def json_object(text: str | bytes) -> Json | None:
    """The object of a JSON text; None if it is not valid, or is another value."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):  # ValueError also for what is not UTF-8, and integers of thousands of digits
        return None
    return values if isinstance(values, dict) else None


def read_json(path: str | Path) -> Json:
    """The object in a JSON file. Raises InputError, naming the file, where there is none."""
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"the path of a JSON file must be a str or a Path, got {shown(path)}")
    if (size := Path(path).stat().st_size) > LARGEST_JSON:
        raise InputError(f"{path} must hold at most {LARGEST_JSON:,} bytes of JSON, got {size:,}")
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also text that is not UTF-8, and integers of thousands of digits
        raise InputError(f"{path} is not valid JSON: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values

"""Whether a codec can decode stored codes."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from ..errors import InputError
from ..models.codec import Codec
from .weights import fingerprint


class Origin(Protocol):
    """What stored codes say about the codec that made them."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def sample_rate(self) -> int: ...
    @property
    def frame_size(self) -> int: ...


def check_fit(origin: Origin, codec: Codec, source: Path, model: str, *, force: bool) -> None:
    """Raise InputError unless the codec can decode the codes in `source`.

    The weights must be those that made the codes (unless `force`), and sample rate and frame size must be equal.
    """
    its = fingerprint(codec)
    if origin.fingerprint != its and not force:
        raise InputError(
            f"{source} was made with {origin.model} (fingerprint {origin.fingerprint}), and {model} has "
            f"other weights (fingerprint {its}): pass --model {origin.model}, or --force to decode anyway"
        )
    made_for, is_for = (origin.sample_rate, origin.frame_size), (codec.sample_rate, codec.frame_size)
    if made_for != is_for:
        raise InputError(
            f"{source} is for frames of {made_for[1]} samples at {made_for[0]} Hz, and {model} decodes to "
            f"frames of {is_for[1]} at {is_for[0]} Hz"
        )

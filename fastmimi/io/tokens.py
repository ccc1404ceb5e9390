"""The token file: the codes of one utterance in a safetensors file, with the metadata that is needed to decode them.

The file holds one tensor, `codes`. In a plain file its shape is [K, T] and its type the smallest integer type that
can represent every entry of a codebook (int16 for 2048 entries). In a packed file it is one-dimensional uint8: the
same K * T codes in the same order, each in as few bits as needed (11 for 2048 entries), least significant bit first,
without gaps; the last byte is filled up with zero bits. Everything else is metadata, stored as text:

    format            "fastmimi.tokens"
    version           "1"
    sample_rate       of the encoded and the decoded audio, in Hz
    frame_rate        frames per second
    frame_size        samples per frame
    num_codebooks     K
    num_frames        T
    codebook_size     entries per codebook
    length            samples per channel before padding to whole frames: T = ceil(length / frame_size)
    packed            "true" or "false"
    fingerprint       of the quantizer's weights (`weights.fingerprint`): only models with the same one can decode
    model             the source that the encoding model was loaded from, as the user gave it
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ..errors import InputError, named, one_line, shown
from ..models.validation import Count, Positive, check_fields
from .files import check_input, path_of, replacing

FORMAT, VERSION = "fastmimi.tokens", "1"  # as in every file so far: no path of a module
MAX_BITS = 16
_FIELDS = {  # name and type of each metadata field; strings are stored as they are, other types as JSON
    "codebook_size": int, "sample_rate": int, "frame_rate": float, "frame_size": int, "length": int, "fingerprint": str,
    "model": str, "packed": bool, "num_codebooks": int, "num_frames": int,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Tokens:
    """The codes of one utterance, [K, T] of any integer type, and the properties of the codec that encoded them.

    The other fields are described in the module's docstring.
    """

    codes: np.ndarray
    codebook_size: Count
    sample_rate: Count
    frame_rate: Positive
    frame_size: Count
    length: Count
    fingerprint: str
    model: str
    packed: bool = False

    def __post_init__(self) -> None:
        """Raises InputError, naming the value, if a field is invalid or contradicts another."""
        check_fields(self)
        codes, size = self.codes, self.codebook_size
        if codes.ndim != 2 or not np.issubdtype(codes.dtype, np.integer):
            raise InputError(f"codes must be integers [codebooks, frames], got {codes.dtype} {codes.shape}")
        if self.num_codebooks == 0 or self.num_frames != -(-self.length // self.frame_size):
            raise InputError(
                f"codes {codes.shape} do not fit {self.length} samples in frames of {self.frame_size}: "
                f"they must be [codebooks, {-(-self.length // self.frame_size)}]"
            )
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= size:
            raise InputError(f"codes must lie in [0, {size}), got {low if low < 0 else high}")

    @property
    def num_codebooks(self) -> int:
        return self.codes.shape[0]

    @property
    def num_frames(self) -> int:
        return self.codes.shape[1]

    @property
    def bits_per_code(self) -> int:
        """Bits that a code takes in a packed file: 11 for codebooks of 2048 entries."""
        return bits_for(self.codebook_size)

    @property
    def stored_type(self) -> np.dtype:
        """The type of the tensor in the file."""
        return np.dtype(np.uint8) if self.packed else smallest_type(self.codebook_size)

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.length / self.sample_rate

    @property
    def kbps(self) -> float:
        """Bit rate of the codes as stored, in kbit/s: 1.1 for 8 packed codebooks of 2048 entries at 12.5 Hz."""
        bits = self.bits_per_code if self.packed else 8 * self.stored_type.itemsize
        return self.num_codebooks * bits * self.frame_rate / 1000

    def first(self, codebooks: int | None) -> Tokens:
        """The same utterance with only its first `codebooks` codebooks, or all of them for None.

        Raises InputError if the utterance does not have that many.
        """
        if codebooks is None:
            return self
        if type(codebooks) is not int or not 1 <= codebooks <= self.num_codebooks:
            raise InputError(f"the number of codebooks must be from 1 to {self.num_codebooks}, got {shown(codebooks)}")
        return replace(self, codes=self.codes[:codebooks])

    def to_bytes(self) -> bytes:
        """The contents of the token file."""
        values = {name: getattr(self, name) for name in _FIELDS}
        text = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
        if self.packed:
            stored = pack(self.codes, self.bits_per_code)
        else:
            stored = np.ascontiguousarray(self.codes, self.stored_type)
        return save({"codes": stored}, {"format": FORMAT, "version": VERSION, **text})

    def save(self, path: str | Path) -> None:
        """Write the token file atomically."""
        with replacing(path_of(path, "a token file")) as temporary:
            temporary.write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> Tokens:
        """Read a token file. Raises InputError if it is missing, truncated, inconsistent, or another kind of file."""
        path = check_input(path_of(path, "a token file"))
        metadata = read_metadata(path)
        if metadata.get("format") != FORMAT:
            raise InputError(f"{path} is a safetensors file, but not a token file")
        if metadata.get("version") != VERSION:
            raise InputError(
                f"{path} is a token file of version {named(metadata.get('version'))}; only {VERSION} can be read"
            )
        try:
            tensors = load(path.read_bytes())
        except SafetensorError as error:
            raise InputError(f"{path} is truncated or damaged ({one_line(error)})") from None
        except KeyError as error:  # a type that numpy does not have
            raise InputError(f"{path} is damaged: codes must be integers, got {error.args[0]}") from None
        try:
            return cls._from_file(tensors, metadata)
        except InputError as error:
            raise InputError(f"{path} is damaged: {error}") from None

    @classmethod
    def _from_file(cls, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> Tokens:
        def field(name: str, kind: type) -> Any:
            if name not in metadata:
                raise InputError(f"its metadata lacks {name}")
            value = metadata[name] if kind is str else _parse_json(metadata[name])
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise InputError(f"{name} must be of type {kind.__name__}, got {shown(metadata[name])}")
            return value

        if tensors.keys() != {"codes"}:
            raise InputError(f"it must hold exactly one tensor, named codes, got {shown(sorted(tensors))}")
        values = {name: field(name, kind) for name, kind in _FIELDS.items()}
        shape = values.pop("num_codebooks"), values.pop("num_frames")
        codes = tensors["codes"]
        if min(shape) < 1:
            raise InputError(f"num_codebooks and num_frames must be positive, got {shape}")
        if values["packed"]:
            codes = unpack(codes, bits_for(values["codebook_size"]), shape)
        elif codes.shape != shape:
            raise InputError(f"codes must have shape {shape}, as the metadata says, got {codes.shape}")
        return cls(codes, **values)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of any safetensors file, {} if it has none; tensors are not read.

    Raises InputError if it is not a safetensors file.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size
        header = file.read(length) if length <= min(size, 100_000_000) else b""  # the format's limit for a header
    values = _parse_json(header.decode("utf-8", "replace"))
    if not isinstance(values, dict):
        raise InputError(f"{path} is not a safetensors file, or is truncated")
    metadata = values.get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def is_tokens(path: str | Path) -> bool:
    """Whether a file is a token file, judged by its metadata, not by its suffix; it may still be truncated."""
    try:
        return read_metadata(path).get("format") == FORMAT
    except InputError:
        return False


def smallest_type(codebook_size: int) -> np.dtype:
    """The smallest integer type that can represent every code, the signed one of two types of the same size.

    Only 8 bits are always unsigned.
    """
    for kind in (np.uint8, np.int16, np.uint16, np.int32):
        if codebook_size - 1 <= np.iinfo(kind).max:
            return np.dtype(kind)
    return np.dtype(np.int64)


def bits_for(codebook_size: int) -> int:
    """Bits that a packed code takes: 11 for a codebook of 2048 entries."""
    return max(1, (codebook_size - 1).bit_length())


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack integers in [0, 2 ** bits), of any shape, into uint8 [ceil(count * bits / 8)].

    The order of the bits is that of the module's docstring. Raises InputError for integers out of range.
    """
    _check_bits(bits)
    if codes.size and not (codes.min() >= 0 and codes.max() < 1 << bits):
        raise InputError(f"codes of {bits} bits must lie in [0, {1 << bits}), got {codes.min()} to {codes.max()}")
    flat = codes.astype("<u2").reshape(-1, 1).view(np.uint8)  # [count, 2], low byte first
    return np.packbits(np.unpackbits(flat, axis=1, count=bits, bitorder="little"), bitorder="little")


def unpack(packed: np.ndarray, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `pack`: uint16 codes of `shape`. Raises InputError if `packed` has another number of bytes."""
    _check_bits(bits)
    count = math.prod(shape)
    size = -(-count * bits // 8)
    if packed.dtype != np.uint8 or packed.shape != (size,):
        raise InputError(f"{shape} codes of {bits} bits must be uint8 {(size,)}, got {packed.dtype} {packed.shape}")
    flat = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    codes = np.zeros((count, 2), np.uint8)
    codes[:, : -(-bits // 8)] = np.packbits(flat, axis=1, bitorder="little")
    return codes.view("<u2").astype(np.uint16).reshape(shape)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise InputError(f"bits must be from 1 to {MAX_BITS}, got {bits}")


def _parse_json(text: str) -> object:
    """The value of a JSON text, None if it is not valid."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # ValueError also for integers of thousands of digits
        return None

"""The native library (native/): finding and loading it, and ctypes declarations of its structures and entry points.

The library does not use Python and is compiled at installation if there is a C++ compiler. It is not linked to an
OpenMP runtime: its OpenMP symbols are resolved to the runtime that PyTorch has loaded, so that both share one thread
pool. It contains variants of every entry point, compiled for different instruction sets; this module chooses one of
them.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch

from ._variants import VARIANTS

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
PAD_MODES = {"constant": 0, "replicate": 1, "reflect": 2}
ACTIVATIONS = {"none": 0, "elu": 1, "silu": 2, "gelu": 3, "gelu_tanh": 4, "relu": 5, "tanh": 6}
KINDS = {"full": 0, "half": 1, "int8": 2, "pairs": 3, "digits": 4}  # of products, native/gemm.h

pointer, integer, long, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float


# The structures repeat their namesakes in native/, which `_abi_differences` checks. A step is a stride in elements.


class Input(ctypes.Structure):
    _fields_ = (
        ("x", pointer), ("dtype", integer), ("batch", long), ("length", long), ("channels", long),
        ("batch_step", long), ("step", long), ("left", long), ("right", long), ("pad_mode", integer),
        ("history", pointer), ("history_step", long), ("first", pointer), ("active", pointer),
    )  # fmt: skip


class Weights(ctypes.Structure):
    _fields_ = (
        ("packed", pointer), ("outputs", long), ("taps", long), ("bias", pointer), ("dequantize", pointer),
        ("bytes_per_weight", long),
    )  # fmt: skip


class Output(ctypes.Structure):
    _fields_ = (
        ("y", pointer), ("dtype", integer), ("row_step", long), ("bias", pointer), ("post", integer),
        ("scale", pointer), ("dequantize", pointer), ("residual", pointer), ("residual_dtype", integer),
        ("residual_row_step", long), ("rows", long), ("tail", pointer),
    )  # fmt: skip


class Attention(ctypes.Structure):
    _fields_ = (
        ("q", pointer), ("k", pointer), ("v", pointer), ("y", pointer), ("dtype", integer),
        ("batch", long), ("heads", long), ("kv_heads", long), ("length", long), ("dim", long),
        ("q_batch", long), ("q_head", long), ("q_step", long), ("k_batch", long), ("k_head", long), ("k_step", long),
        ("v_batch", long), ("v_head", long), ("v_step", long),
        ("inv_freq", pointer), ("rope_scale", real), ("interleaved", ctypes.c_bool), ("window", long),
        ("offset", pointer), ("cache_k", pointer), ("cache_v", pointer), ("active", pointer),
    )  # fmt: skip


class Linear(ctypes.Structure):
    _fields_ = (
        ("packed", pointer), ("bias", pointer), ("dequantize", pointer), ("scale", pointer), ("outputs", long),
    )  # fmt: skip


class Layer(ctypes.Structure):
    _fields_ = (
        ("x", pointer), ("y", pointer), ("dtype", integer), ("rows", long), ("channels", long), ("hidden", long),
        ("norm1_weight", pointer), ("norm1_bias", pointer), ("norm2_weight", pointer), ("norm2_bias", pointer),
        ("epsilon", real), ("rms", ctypes.c_bool),
        ("activation", integer), ("qkv", Linear), ("out", Linear), ("fc1", Linear), ("fc2", Linear),
        ("attention", Attention),
    )  # fmt: skip


NO_TAIL = 2**62  # `rows` of an Output without a tail
STRUCT = ctypes.POINTER
ENTRIES: dict[str, tuple[Any, ...]] = {
    "conv": (STRUCT(Input), STRUCT(Weights), STRUCT(Output), integer, long, long, integer, long, long, long, integer),
    "resblock": (
        STRUCT(Input), STRUCT(Weights), STRUCT(Weights), STRUCT(Output), integer, long, long, long, long, integer,
    ),
    "depthwise": (STRUCT(Input), pointer, pointer, STRUCT(Output), long, long, integer, long, integer),
    "advance": (STRUCT(Input),),
    "overlap": (integer, pointer, pointer, pointer, pointer, *[long] * 8),
    "attention": (STRUCT(Attention), integer),
    "layer": (STRUCT(Layer), integer, integer),
    "rvq_encode": (pointer, integer, *[long] * 5, pointer, pointer, pointer, pointer, integer),
    "rvq_decode": (pointer, long, long, pointer, *[long] * 4, pointer, integer, integer),
}  # fmt: skip
MAX_ARGUMENTS = 13  # of an entry point
ENUMERATIONS: dict[str, Iterable[str]] = {
    "Dtype": ("f32", "bf16"), "PadMode": PAD_MODES, "Activation": ACTIVATIONS, "Kind": KINDS, "Entry": ENTRIES,
}  # fmt: skip


class Declaration(ctypes.Structure):
    """The text of a C declaration in native/, and the size in bytes of what it declares."""

    _fields_ = (("text", ctypes.c_char_p), ("size", long))


Members = list[tuple[str, str]]  # name and type, of fields; the type of an enumerator is ""


def _members(text: str) -> tuple[str, Members]:
    """Name and members of a C declaration such as "struct Rows { const float *x, *y; long count = 0; }"."""
    keyword, name, body = text.split(" ", 2)
    if keyword == "enum":
        return name, [(enumerator, "") for enumerator in body.strip("{}").split(", ")]
    members = []
    for statement in body.strip("{; }").split("; "):
        kind, _, declarators = statement.removeprefix("const ").partition(" ")
        for declarator in declarators.split(", "):
            pointer = "*" in kind + declarator
            members.append((declarator.split(" = ")[0].lstrip("*"), "void_p" if pointer else kind))
    return name, members


def _structures(kinds: Iterable[Any]) -> Iterator[type[ctypes.Structure]]:
    """Those among `kinds`, and those nested in them."""
    for kind in kinds:
        if issubclass(kind, ctypes.Structure):
            yield kind
            yield from _structures(kind for _, kind, *_ in kind._fields_)


def _abi_differences(library: ctypes.CDLL, name: str) -> list[str]:
    """What a variant of the library declares otherwise than this module, such as "Input.step"; empty if they agree."""
    function = getattr(library, f"declarations_{name}", None)
    if function is None:
        return ["abi"]
    function.argtypes, function.restype = (), STRUCT(Declaration)

    def table(name: str, members: Members, size: int) -> dict[str, object]:
        return {name: size} | {f"{name}.{member}": (i, kind) for i, (member, kind) in enumerate(members)}

    theirs: dict[str, object] = {}
    for row in takewhile(lambda row: row.text, map(function().__getitem__, count())):
        theirs |= table(*_members(row.text.decode()), row.size)
    mine: dict[str, object] = {}
    for structure in _structures((Input, Weights, Output, Attention, Layer)):
        members = [(field, kind.__name__.removeprefix("c_")) for field, kind, *_ in structure._fields_]
        mine |= table(structure.__name__, members, ctypes.sizeof(structure))
    for enumeration, enumerators in ENUMERATIONS.items():
        mine |= table(enumeration, [(name.upper(), "") for name in enumerators], ctypes.sizeof(integer))
    return sorted({key for key, _ in mine.items() ^ theirs.items()})


class Variant:
    """The entry points of one variant, and the width of its weight panels, `outputs_per_panel`."""

    def __init__(self, library: ctypes.CDLL, name: str):
        self.name = name
        self.outputs_per_panel = getattr(library, f"outputs_per_panel_{name}")()
        for entry, arguments in ENTRIES.items():
            function = getattr(library, f"{entry}_{name}")
            function.argtypes, function.restype = arguments, None
            setattr(self, entry, function)  # ctypes passes structures by address here
        self.run = getattr(library, f"run_{name}")
        self.run.argtypes, self.run.restype = (pointer, long), None

    def keep(self, *tensors: Any) -> None:
        """Tell a `Recorder` which tensors the calls that follow point to; a variant itself does nothing here."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the native library has no entry {name!r}")


class Recorder:
    """Stands in for a variant: forwards calls to it and records them.

    Tensors passed to `keep` stay alive as long as the recording, whose calls contain their addresses.
    """

    def __init__(self, variant: Variant, calls: list[Any], kept: list[Any]):
        self.name, self.outputs_per_panel = variant.name, variant.outputs_per_panel
        self._variant, self._calls, self._kept = variant, calls, kept

    def keep(self, *tensors: Any) -> None:
        self._kept.extend(tensors)

    def __getattr__(self, entry: str) -> Any:
        function = getattr(self._variant, entry)

        def call(*arguments: Any) -> None:
            self._calls.append((entry, arguments))
            function(*arguments)

        return call


def library_path() -> Path:
    """Path where the installation puts the library."""
    return Path(__file__).parent / "native" / "libfastmimi.so"


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library and "", or None and one sentence that says why there is none."""
    if not library_path().exists():
        return None, (
            "its native library is not built: install fastmimi where there is a C++ compiler (g++ or clang++); "
            "without it PyTorch's own operations run, about 1.4 times slower on a whole clip and 3 times on a stream"
        )
    try:
        library = ctypes.CDLL(str(library_path()))
    except OSError as error:
        return None, f"its native library does not load ({error})"
    if different := _abi_differences(library, "portable"):
        return None, (
            f"its native library was built from other sources ({different[0]} differs): install fastmimi again, "
            "pip install -e . in a checkout"
        )
    return library, ""


@cache
def variants() -> tuple[str, ...]:
    """The variants that are built and that this processor can run, best first."""
    library, _ = _load()
    if library is None:
        return ()
    built = (name for name in VARIANTS if hasattr(library, f"conv_{name}"))
    return tuple(name for name in built if all(library.has(needed.encode()) for needed in VARIANTS[name]))


@cache
def _variant(name: str) -> Variant:
    library, why = _load()
    assert library is not None, why
    return Variant(library, name)


_overrides: list[str] = []
_recorders = threading.local()


def native() -> Any:
    """The variant in use or, inside `recording`, this thread's recorder of it."""
    return getattr(_recorders, "current", None) or _variant(_overrides[-1] if _overrides else variants()[0])


@contextmanager
def recording(variant: Variant, calls: list[Any], kept: list[Any]) -> Iterator[None]:
    """Record this thread's native calls: append each to `calls` as (entry, arguments), and its tensors to `kept`."""
    _recorders.current = Recorder(variant, calls, kept)
    try:
        yield
    finally:
        _recorders.current = None


@contextmanager
def using(name: str) -> Iterator[None]:
    """Run the named variant, in all threads; for tests and comparisons."""
    _overrides.append(name)
    try:
        yield
    finally:
        _overrides.pop()


def unsupported(target: Any) -> str | None:
    """One sentence that says why this backend cannot run on the target (device and dtype), or None if it can."""
    if target.device != "cpu":
        return f"the CPU kernels run on a CPU, not on {target.device}"
    if target.dtype not in DTYPES:
        return f"the CPU kernels compute in float32 and bfloat16, not in {str(target.dtype)[6:]}"
    return None if variants() else _load()[1]

"""The native library: found, loaded, and the structures that its entry points take (native/).

It has no Python in it and is compiled at installation where there is a C++ compiler. Its OpenMP symbols are left open
and bind to the runtime that PyTorch has loaded, so that both share one pool of threads. One of its variants, compiled
for different instruction sets, is chosen here.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

VARIANTS = ("avx512bf16", "avx512", "avx2", "portable")  # the best first
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
PAD_MODES = {"constant": 0, "replicate": 1, "reflect": 2}
ACTIVATIONS = {"none": 0, "elu": 1, "silu": 2, "gelu": 3, "gelu_tanh": 4, "relu": 5, "tanh": 6}
KINDS = {"full": 0, "half": 1, "int8": 2, "pairs": 3, "digits": 4}  # of packed weights, native/gemm.h

pointer, integer, long, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float


class Input(ctypes.Structure):
    _fields_ = (
        ("x", pointer), ("dtype", integer), ("batch", long), ("length", long), ("channels", long),
        ("batch_step", long), ("step", long), ("left", long), ("right", long), ("pad_mode", integer),
        ("history", pointer), ("history_step", long), ("first", pointer), ("active", pointer),
    )  # fmt: skip


class Weights(ctypes.Structure):
    _fields_ = (
        ("packed", pointer), ("outputs", long), ("taps", long), ("bias", pointer), ("dequantize", pointer),
        ("bytes_per_weight", ctypes.c_size_t),
    )  # fmt: skip


class Output(ctypes.Structure):
    _fields_ = (
        ("y", pointer), ("dtype", integer), ("row", long), ("bias", pointer), ("post", integer), ("scale", pointer),
        ("dequantize", pointer), ("residual", pointer), ("residual_dtype", integer), ("residual_row", long),
        ("rows", long), ("tail", pointer),
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


MOST_ROWS = 2**62  # rows of an Output that has no tail
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
MOST_ARGUMENTS = 13  # of an entry, native/variant.cpp


class Variant:
    """The entry points of one variant, and `outputs_per_panel` of its packed weights."""

    def __init__(self, library: ctypes.CDLL, name: str):
        self.name = name
        count = long()
        getattr(library, f"outputs_per_panel_{name}")(ctypes.byref(count))
        self.outputs_per_panel = count.value
        for entry, arguments in ENTRIES.items():
            function = getattr(library, f"{entry}_{name}")
            function.argtypes, function.restype = arguments, None
            setattr(self, entry, function)  # structures go by address
        self.run = getattr(library, f"run_{name}")
        self.run.argtypes, self.run.restype = (pointer, long), None

    def keep(self, *tensors: Any) -> None:
        """What a recorded call points at beside the op's inputs and its result must live as long as the recording."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the native library has no entry {name!r}")


class Recorder:
    """In the place of a variant: calls it, and writes down what was called."""

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
    """Where the installation puts the library."""
    return Path(__file__).parent / "native" / "libfastmimi.so"


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why there is none, in one sentence."""
    if not library_path().exists():
        return None, (
            "its native library is not built: install fastmimi where there is a C++ compiler (g++ or clang++); "
            "without it PyTorch's own operations run, some 1.4 times slower on a whole clip and 3 times on a stream"
        )
    try:
        return ctypes.CDLL(str(library_path())), ""
    except OSError as error:
        return None, f"its native library does not load ({error})"


@cache
def variants() -> tuple[str, ...]:
    """The variants that this processor runs, the best first."""
    library, _ = _load()
    if library is None:
        return ()
    built = (name for name in VARIANTS if hasattr(library, f"conv_{name}"))
    return tuple(name for name in built if library.can_run(name.encode()))


@cache
def _variant(name: str) -> Variant:
    library, why = _load()
    assert library is not None, why
    return Variant(library, name)


_chosen: list[str] = []
_recorders = threading.local()


def native() -> Any:
    """The variant in use, or in its place the recorder of this thread."""
    return getattr(_recorders, "now", None) or _variant(_chosen[-1] if _chosen else variants()[0])


@contextmanager
def recording(variant: Variant, calls: list[Any], kept: list[Any]) -> Iterator[None]:
    """Within, this thread's native calls are appended to `calls` as (entry, arguments), what they need to `kept`."""
    _recorders.now = Recorder(variant, calls, kept)
    try:
        yield
    finally:
        _recorders.now = None


@contextmanager
def using(name: str) -> Iterator[None]:
    """Within, the named variant runs; for tests and comparisons."""
    _chosen.append(name)
    try:
        yield
    finally:
        _chosen.pop()


def unsupported(target: Any) -> str | None:
    """Why no kernel of this room runs on the target, in one sentence; None where they do."""
    if target.device != "cpu":
        return f"the CPU kernels run on a CPU, not on {target.device}"
    if target.dtype not in DTYPES:
        return f"the CPU kernels compute in float32 and bfloat16, not in {str(target.dtype)[6:]}"
    return None if variants() else _load()[1]

"""The native library (native/): finding, checking and loading it, and calling its entry points.

The library does not use Python and is compiled at installation if there is a C++ compiler. It is not linked to an
OpenMP runtime: its OpenMP symbols are resolved to the runtime that PyTorch has loaded, so that both share one thread
pool. It contains variants of every entry point, compiled for different instruction sets; this module chooses one of
them.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from _ctypes import CFuncPtr
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch

from ._abi import DTYPES, ENTRIES, differences
from ._variants import VARIANTS

Call = tuple[CFuncPtr, ctypes.Structure]  # an entry point and its argument


class Declaration(ctypes.Structure):
    """Its namesake in native/abi.h: a C declaration and the size in bytes of what it declares."""

    _fields_ = (("text", ctypes.c_char_p), ("size", ctypes.c_long))


def declarations(library: ctypes.CDLL, name: str) -> list[tuple[str, int]]:
    """What a variant of the library declares (native/abi.h), with sizes; nothing if the library does not say it."""
    function = getattr(library, f"declarations_{name}", None)
    if function is None:
        return []
    function.argtypes, function.restype = (), ctypes.POINTER(Declaration)
    rows = takewhile(lambda row: row.text, map(function().__getitem__, count()))
    return [(row.text.decode(), row.size) for row in rows]


class Variant:
    """The entry points of one variant, and the width of its weight panels, `outputs_per_panel`.

    Every entry of `ENTRIES` is a method, whose arguments are the fields of its structure, in order.
    """

    def __init__(self, library: ctypes.CDLL, name: str):
        self.library, self.name = library, name
        self.outputs_per_panel = getattr(library, f"outputs_per_panel_{name}")()
        for entry, structure in ENTRIES.items():
            function = getattr(library, f"{entry}_{name}")
            function.argtypes, function.restype = (ctypes.POINTER(structure),), None
            setattr(self, entry, partial(self._call, function, structure))
        self.run_program = library.run
        self.run_program.argtypes, self.run_program.restype = (ctypes.c_void_p, ctypes.c_long), None

    def _call(self, function: CFuncPtr, structure: type[ctypes.Structure], *arguments: object) -> None:
        if len(arguments) != len(structure._fields_):  # ctypes would fill up with zeros
            raise TypeError(f"{structure.__name__} has {len(structure._fields_)} fields, got {len(arguments)}")
        self._run(function, structure(*arguments))

    def _run(self, function: CFuncPtr, call: ctypes.Structure) -> None:
        function(call)

    def keep(self, *tensors: object) -> None:
        """Tell a `Recorder` which tensors the calls that follow point to; a variant itself does nothing here."""


class Recorder(Variant):
    """Records the calls that it makes, each as an entry point and its structure.

    Tensors passed to `keep` stay alive as long as the recording, whose calls contain their addresses.
    """

    def __init__(self, variant: Variant, calls: list[Call], kept: list[object]):
        super().__init__(variant.library, variant.name)
        self._calls, self._kept = calls, kept

    def _run(self, function: CFuncPtr, call: ctypes.Structure) -> None:
        self._calls.append((function, call))
        function(call)

    def keep(self, *tensors: object) -> None:
        self._kept.extend(tensors)


def library_path() -> Path:
    """Path where the installation puts the library."""
    return Path(__file__).parent / "native" / "libfastmimi.so"


class SymbolInfo(ctypes.Structure):
    """What dladdr(3) says of an address, its Dl_info."""

    _fields_ = (
        ("file", ctypes.c_char_p), ("base", ctypes.c_void_p), ("symbol", ctypes.c_char_p), ("address", ctypes.c_void_p),
    )  # fmt: skip


def openmp_of_pytorch() -> str | None:
    """Path of the OpenMP runtime that PyTorch's operations run on; None if they run without."""
    operations = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))  # already loaded
    if not hasattr(operations, "GOMP_parallel"):
        return None
    info = SymbolInfo()
    ctypes.CDLL(None).dladdr(ctypes.cast(operations.GOMP_parallel, ctypes.c_void_p), ctypes.byref(info))
    return str(info.file.decode())


def _open(path: Path) -> ctypes.CDLL:
    """Open the native library, after making OpenMP's symbols visible to it: PyTorch's wheels do so on x86-64 alone."""
    if sys.platform == "linux" and not hasattr(ctypes.CDLL(None), "GOMP_parallel") and (runtime := openmp_of_pytorch()):
        ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path))


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library and "", or None and one sentence that says why there is none."""
    if not library_path().exists():
        return None, (
            "its native library is not built: install fastmimi where there is a C++ compiler (g++ or clang++); "
            "without it PyTorch's own operations run, about 1.4 times slower on a whole clip and 3 times on a stream"
        )
    try:
        library = _open(library_path())
    except OSError as error:
        return None, f"its native library does not load ({error})"
    if different := differences(declarations(library, "portable")):
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
def recording(variant: Variant, calls: list[Call], kept: list[object]) -> Iterator[None]:
    """Record this thread's native calls: append each to `calls`, and its tensors to `kept`."""
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

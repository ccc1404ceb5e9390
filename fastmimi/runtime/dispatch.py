"""Chooses the backend of each op and explains the choice; nothing else imports a backend.

The candidates are asked in order of speed. Each says in one sentence why it cannot run the op on a device and dtype, or
is chosen. The choice and the sentences form a table of `Choice` rows, which `fastmimi explain` prints.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, shown
from . import torch_ops
from .ops import OPS, Ops

_log = logging.getLogger(__name__)

CANDIDATES = {  # the fastest first, at every shape of bench/bench_ops.py
    "triton": "fastmimi.kernels.triton",
    "cpu": "fastmimi.kernels.cpu",
    "onednn": "fastmimi.kernels.onednn",
    "reference": "fastmimi.reference",
}
SHARED = {"triton": "_launch", "cpu": "_native", "onednn": "_prepacked"}  # modules of backends, with `unsupported`
ORDER = ", ".join(CANDIDATES)
Impl = str | dict[str, str]


@dataclass(frozen=True)
class Target:
    """The device and dtype that an implementation is to run on."""

    device: str  # device type: "cpu", "cuda", ...
    dtype: torch.dtype


@dataclass(frozen=True)
class Choice:
    """One row of the table: the backend of an op, and why each earlier candidate was passed over.

    inside: the ops that a composed op calls or stands for, and their backends.
    """

    op: str
    chosen: str
    reason: str
    passed_over: tuple[tuple[str, str], ...]
    inside: tuple[tuple[str, str], ...] = ()


def check_impl(impl: Impl) -> None:
    """Raise InputError, naming the value, unless `impl` is 'auto', a candidate, or a dict from ops to those."""
    wanted = impl if isinstance(impl, dict) else dict.fromkeys(OPS, impl)
    for op, name in wanted.items():
        if op not in OPS:
            raise InputError(f"impl names an unknown op {shown(op)}; the ops are {', '.join(OPS)}")
        if not isinstance(name, str) or name not in ("auto", *CANDIDATES):
            raise InputError(
                f"impl must be 'auto', {', '.join(map(repr, CANDIDATES))}, or a dict per op, got {shown(name)}"
            )


def bind(device: str, dtype: torch.dtype, impl: Impl = "auto") -> Ops:
    """The implementation of every op for a device type and a dtype; the same object for the same arguments.

    Raises InputError if `impl` is not a valid choice, or asks for a kernel that cannot run.
    """
    return _tables[_tabled(device, dtype, impl)]


_tables: dict[str, Ops] = {}


def _tabled(device: str, dtype: torch.dtype, impl: Impl) -> str:
    """The key of a table in `_tables`, which is made on first use."""
    key = f"{device} {dtype} {sorted(impl.items()) if isinstance(impl, dict) else impl}"
    if key not in _tables:
        chosen = {row.op: row.chosen for row in explain(device, dtype, impl)}
        ops: dict[str, Any] = {op: implementation(op, backend) for op, backend in chosen.items()}
        if chosen["audio_resblock"] == "reference":
            ops["audio_resblock"] = None
        if ops["transformer_layer"] is implementation("transformer_layer", "reference"):
            ops["transformer_layer"] = partial(ops["transformer_layer"], attention=ops["window_attention"])
        _tables[key] = Ops(**ops)
        _log.debug("ops for %s on %s: %s", dtype, device, chosen)
    return key


# torch.compile must treat the key as a constant and not trace the dispatch. This attribute is all that
# `torch.compiler.assume_constant_result` sets; calling that would import torch._dynamo, which takes a second.
_tabled._dynamo_marked_constant = True  # type: ignore[attr-defined]


def explain(device: str = "cpu", dtype: torch.dtype = torch.float32, impl: Impl = "auto") -> list[Choice]:
    """The dispatch table: for each op what runs, why, and why each earlier candidate does not."""
    check_impl(impl)
    _check_target(device, dtype)
    rows = {op: _choose(op, Target(device, dtype), impl) for op in OPS}
    return [_with_inner(row, rows) for row in rows.values()]


def _with_inner(row: Choice, rows: dict[str, Choice]) -> Choice:
    if row.chosen != "reference":
        return row
    return replace(row, inside=tuple((inner, rows[inner].chosen) for inner in OPS[row.op].composed_of))


def _check_target(device: str, dtype: torch.dtype) -> None:
    try:
        known = isinstance(device, str) and torch.device(device).type == device
    except RuntimeError:
        known = False
    if not known:
        raise InputError(f"device must be a type of device, such as 'cpu' or 'cuda', got {shown(device)}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"dtype must be one of floating point, such as torch.float32, got {shown(dtype)}")


@cache
def implementation(op: str, candidate: str) -> Callable[..., Tensor]:
    """A backend's function for an op; kernels are registered as PyTorch ops (torch_ops.py)."""
    reference, chosen = (
        getattr(importlib.import_module(f"{CANDIDATES[backend]}.{op}"), op) for backend in ("reference", candidate)
    )
    if candidate == "reference":
        return reference
    from ..reference.causal_conv1d import ieee_convolutions

    return torch_ops.register(op, candidate, chosen, reference, ieee_convolutions)


def exportable() -> Ops:
    """The reference for `torch.export` with open lengths: some ops as in reference/_open_lengths.py."""
    from ..reference import _open_lengths as ops

    layer = implementation("transformer_layer", "reference")
    return bind("cpu", torch.float32, "reference")._replace(
        window_attention=ops.window_attention,
        transformer_layer=partial(layer, attention=ops.window_attention),
        rvq_encode=ops.rvq_encode, rvq_decode=ops.rvq_decode,
    )  # fmt: skip


def recorder(ops: Ops) -> ModuleType | None:
    """The module that records steps of these implementations (kernels/cpu/_program.py); None unless all are native.

    An op without a native kernel does not count: a step that runs it is not equal to its recording, which is dropped.
    """
    native = {op: function for op, function in ops._asdict().items() if not is_absent(op, "cpu")}
    if not all(function is implementation(op, "cpu") for op, function in native.items()):
        return None
    from ..kernels.cpu import _program

    return _program


def native_variant() -> str | None:
    """The variant of the native CPU kernels that this processor runs, such as "avx2"; None if they are not built."""
    from ..kernels.cpu import _native

    return next(iter(_native.variants()), None)


def _choose(op: str, target: Target, impl: Impl) -> Choice:
    wanted = impl.get(op, "auto") if isinstance(impl, dict) else impl
    if wanted == "auto":
        return _fastest(op, target)
    sentence = why_not(wanted, op, target)
    if sentence is None:
        return Choice(op, wanted, "asked for by impl=", ())
    if wanted == impl and is_absent(op, wanted):  # asked for as a whole, not for this op by name
        made_of = " and ".join((*OPS[op].composed_of, "PyTorch's own ops"))
        return Choice(op, "reference", f"composed of {made_of}", ((wanted, sentence),))
    raise InputError(f"{op} was asked to run as {wanted!r}, which it cannot: {sentence}")


def _fastest(op: str, target: Target) -> Choice:
    """The first candidate that can run."""
    passed_over: list[tuple[str, str]] = []
    for name in CANDIDATES:
        sentence = why_not(name, op, target)
        if sentence is None and name == "triton" and target.device == "cpu":
            sentence = "Triton's interpreter is for tests; it runs if asked for by impl="
        if sentence is None:
            reason = "no kernel can run here" if name == "reference" else f"first of {ORDER} that can run here"
            return Choice(op, name, reason, tuple(passed_over))
        passed_over.append((name, sentence))
    raise AssertionError("the reference runs everywhere")


def is_absent(op: str, candidate: str) -> bool:
    """Whether this version of fastmimi has no implementation of the op in that backend."""
    return importlib.util.find_spec(f"{CANDIDATES[candidate]}.{op}") is None


def why_not(candidate: str, op: str, target: Target) -> str | None:
    """Why the candidate cannot run the op on the target, in one sentence; None if it can."""
    if candidate == "reference":
        return None
    if is_absent(op, candidate):
        return f"this version of fastmimi has no {candidate} kernel for {op}"
    if candidate == "triton" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    return importlib.import_module(f"{CANDIDATES[candidate]}.{SHARED[candidate]}").unsupported(target)

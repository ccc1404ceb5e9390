"""The files that a program becomes, and how they are run: ONNX, and PyTorch's `.pt2`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, shown
from .programs import Program

OPSET = 18  # what every runtime has had since 2023
State = dict[str, Tensor]
Run = Callable[[Tensor, State], tuple[Tensor, State]]  # the state is empty for whole audio


@dataclass(frozen=True)
class Format:
    """How a format is written and run.

    needs: packages for writing; run_by: those for running. opset: of ONNX.
    """

    suffix: str
    needs: tuple[str, ...]
    run_by: tuple[str, ...]
    write: Callable[[Program, Path], None]
    open: Callable[[Program, Path], Run]
    opset: int | None = None

    @property
    def runs_here(self) -> bool:
        return all(find_spec(name) is not None for name in self.run_by)


def format_of(name: object) -> Format:
    """The format by its name. Raises InputError if there is none of it, or if packages that it needs are missing."""
    if not isinstance(name, str) or name not in FORMATS:
        raise InputError(f"format must be {' or '.join(FORMATS)}, got {shown(name)}")
    missing = [package for package in FORMATS[name].needs if find_spec(package) is None]
    if missing:
        raise InputError(f"format {name!r} needs {', '.join(missing)}: pip install 'fastmimi[onnx]'")
    return FORMATS[name]


def next_of(name: str) -> str:
    """The ONNX output that is the new value of a state's input."""
    return f"{name}.next"


def _write_onnx(traced: Program, path: Path) -> None:
    """One file, weights included."""
    import onnx_ir

    with _quiet_exporter():
        made: Any = torch.onnx.export(
            traced.program, dynamo=True, opset_version=OPSET, external_data=False, verbose=False
        )  # fmt: skip
    model = made.model
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # names files of the machine that exports
        for value in node.outputs:
            value.shape = None  # with names of lengths that are about to change
    inputs, outputs = (traced.input, *traced.state), (traced.output, *traced.state)
    for value, port in zip(model.graph.inputs, inputs, strict=True):
        value.name, value.shape = port.name, onnx_ir.Shape(port.shape)
    for value, port in zip(model.graph.outputs, outputs, strict=True):
        value.name = port.name if port is traced.output else next_of(port.name)
        value.shape = onnx_ir.Shape(port.shape)
    model.graph.name, model.producer_name = traced.name, "fastmimi"
    onnx_ir.save(model, path)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without the exporter's remarks on packages that it could also use."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _open_onnx(traced: Program, path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [port.name for port in traced.state]

    def run(x: Tensor, state: State) -> tuple[Tensor, State]:
        y, *new = session.run(None, {traced.input.name: x.numpy(), **{name: t.numpy() for name, t in state.items()}})
        return torch.from_numpy(y), dict(zip(names, map(torch.from_numpy, new), strict=True))

    return run


def _write_pt2(traced: Program, path: Path) -> None:
    torch.export.save(traced.program, path)


def _open_pt2(traced: Program, path: Path) -> Run:
    module = torch.export.load(path).module()

    def run(x: Tensor, state: State) -> tuple[Tensor, State]:
        return module(x, state) if state else (module(x), {})

    return run


FORMATS = {
    "onnx": Format("onnx", ("onnx", "onnxscript"), ("onnxruntime",), _write_onnx, _open_onnx, OPSET),
    "pt2": Format("pt2", (), (), _write_pt2, _open_pt2),
}

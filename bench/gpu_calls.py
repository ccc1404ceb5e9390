"""The calls of ops that models make: recorded in passes of a model without computing anything, and made again.

A pass is one call of a model, offline or of streams. While it runs, the model's ops are replaced; so all calls are
found, with the shapes, strides and options that the model uses, whatever the ops are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import gpu_report  # noqa: F401  # makes this repository's package importable
import torch
from torch import Tensor

from fastmimi.devtools.workloads import WORKLOADS, Workload
from fastmimi.models.codec import Codec
from fastmimi.runtime import dispatch
from fastmimi.runtime.ops import OPS, Ops

Function = Callable[..., Tensor]
Wrap = Callable[[str, Function], Function]
POSITION = 1_000  # of the streams, in calls that are made again: their ring buffers are full


class TensorSpec(NamedTuple):
    """What a kernel sees of a tensor, except for the values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self, device: str, name: str, entries: int) -> Tensor:
        """A tensor like this; values that are indices lie in [0, entries)."""
        y = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)
        if name == "inv_freq":
            return y.copy_(1.0 / 10_000.0 ** torch.linspace(0, 1, len(y)))
        if name == "offset":
            return y.fill_(POSITION)
        if self.dtype.is_floating_point:
            return y.copy_(torch.randn(self.shape, device=device) * 0.1)
        if self.dtype == torch.bool:
            return y.fill_(name != "first")
        return y.copy_(torch.randint(0, max(1, entries), self.shape, device=device))


@dataclass(frozen=True)
class OpCall:
    """One call of an op; `tensors` by the names of the op's schema, None where there is none."""

    op: str
    tensors: tuple[tuple[str, TensorSpec | None], ...]
    options: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, op: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> OpCall:
        """The call with these arguments."""
        tensors, options = named(op, arguments, keywords)
        specs = {name: None if t is None else TensorSpec(tuple(t.shape), t.stride(), t.dtype)
                 for name, t in tensors.items()}  # fmt: skip
        return cls(op, tuple(specs.items()), tuple(sorted(options.items(), key=lambda item: item[0])))

    @property
    def streams(self) -> bool:
        """Whether it is of a stream."""
        return any(name in OPS[self.op].state_names and spec is not None for name, spec in self.tensors)

    @property
    def bytes(self) -> int:
        """Bytes of all arguments, each once."""
        return sum(torch.Size(s.shape).numel() * s.dtype.itemsize for _, s in self.tensors if s is not None)

    def __str__(self) -> str:
        shapes = {name: "x".join(map(str, spec.shape)) for name, spec in self.tensors if spec is not None}
        kind = next(str(spec.dtype)[6:] for name, spec in self.tensors if name in ("x", "q", "codes") and spec)
        first, *rest = [shapes[name] for name in OPS[self.op].names if name in shapes and "norm" not in name][:3]
        words = [f"{name} {value}" for name, value in self.options if name in ("stride", "dilation", "pre", "post")
                 and value not in (1, "none")]  # fmt: skip
        words += [f"and {name}" for name in ("residual", "shortcut_weight") if name in shapes]
        return " ".join([kind, first, "with", *rest[:1], *words, *(["in streams"] if self.streams else [])])

    def make(self, device: str) -> dict[str, Tensor]:
        """The tensors, with random values."""
        specs = dict(self.tensors)
        books = specs.get("codebooks")
        entries = 1 if books is None else books.shape[1]
        return {name: s.make(device, name, entries) for name, s in self.tensors if s is not None}

    def run(self, function: Function, tensors: dict[str, Tensor]) -> Tensor:
        """function(tensors, options)."""
        return function(**ordered(self.op, tensors), **dict(self.options))

    def result(self) -> Tensor:
        """The result on the meta device."""
        return OPS[self.op].fake(*self._meta(), **dict(self.options), **self._state())

    def flops(self) -> float:
        return OPS[self.op].flops(self.result(), *self._meta(), **dict(self.options))

    def _meta(self) -> list[Tensor | None]:
        specs = dict(self.tensors)
        return [meta(specs.get(name)) for name in OPS[self.op].names if name in specs]

    def _state(self) -> dict[str, Tensor | None]:
        return {name: meta(spec) for name, spec in self.tensors if name in OPS[self.op].state_names}


def meta(spec: TensorSpec | None) -> Tensor | None:
    return None if spec is None else torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device="meta")


def named(op: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of a call by name, and its other options."""
    tensors = dict(zip(OPS[op].names, arguments, strict=False))
    names = {*OPS[op].names, *OPS[op].state_names}
    tensors |= {name: value for name, value in keywords.items() if name in names}
    return tensors, {name: v for name, v in keywords.items() if name not in names and name != "attention"}


def ordered(op: str, tensors: dict[str, Any]) -> dict[str, Any]:
    """Tensors by name, with None for those up to the last one that are not there."""
    names = [*OPS[op].names]
    last = max(i for i, name in enumerate(names) if name in tensors)
    return {name: tensors.get(name) for name in names[: last + 1]} | {
        name: t for name, t in tensors.items() if name not in names
    }


def ops_with(wrap: Wrap, device: str, dtype: torch.dtype) -> Ops:
    """Triton's ops as `dispatch.bind` composes them, each wrapped."""
    chosen = {row.op: row.chosen for row in dispatch.explain(device, dtype, "triton")}
    ops: dict[str, Any] = {op: wrap(op, dispatch.implementation(op, backend)) for op, backend in chosen.items()}
    if chosen["transformer_layer"] == "reference":
        reference = dispatch.implementation("transformer_layer", "reference")
        ops["transformer_layer"] = partial(reference, attention=ops["window_attention"])
    return Ops(**ops)


@contextmanager
def wrapped(wrap: Wrap, device: str, dtype: torch.dtype) -> Iterator[None]:
    """Within the context, all models run Triton's ops, wrapped."""
    with mock.patch.object(Codec, "ops", ops_with(wrap, device, dtype)):
        yield


def recorded(model: Codec, run: Callable[[Codec], object]) -> dict[OpCall, int]:
    """The distinct calls of Triton's ops in run(model), and how often each is made; their results are arbitrary."""
    calls: dict[OpCall, int] = {}

    def wrap(op: str, _: Function) -> Function:
        def record(*arguments: Any, **keywords: Any) -> Tensor:
            keywords = {name: v for name, v in keywords.items() if "dropout" not in name}
            call = OpCall.of(op, arguments, keywords)
            calls[call] = calls.get(call, 0) + 1
            return OPS[op].fake(*arguments, **keywords)

        return record

    with torch.no_grad(), wrapped(wrap, model.device.type, model.dtype):
        run(model)
    return calls


class Pass(NamedTuple):
    """A call of a model: `frames` frames of `batch` rows, offline or as the next chunk of streams."""

    name: str
    batch: int
    frames: int
    stream: bool

    def inputs(self, model: Codec, extra: int = 0) -> tuple[Tensor, Tensor]:
        """Audio and codes; `extra` samples more than whole frames."""
        draw = torch.Generator("cpu").manual_seed(self.batch + self.frames)
        samples = self.frames * model.frame_size + extra
        audio = torch.randn(1, model.config.audio_channels, samples, generator=draw) * 0.1
        codes = torch.randint(model.config.codebook_size, (1, model.num_codebooks, self.frames), generator=draw)
        gains = torch.linspace(1.0, 0.5, self.batch)[:, None, None]  # rows differ; few random numbers are drawn
        return (audio.to(model.device, model.dtype) * gains.to(model.device, model.dtype)).contiguous(), torch.stack(
            [(codes[0] + row) % model.config.codebook_size for row in range(self.batch)]
        ).to(model.device)

    def run(self, model: Codec) -> None:
        """Encode and decode once."""
        audio, codes = self.inputs(model)
        state = model.new_state(self.batch) if self.stream else None
        model.encode(audio, state=state)
        model.decode(codes, state=state)


def runnable() -> list[Workload]:
    """The workloads that Triton has kernels for."""
    return [w for w in WORKLOADS if not dispatch.is_absent(w.op, "triton")]


def smallest() -> list[Workload]:
    """The one with the least work of each op, for dry runs."""
    by_work = sorted(runnable(), key=lambda workload: -workload.flops(100))
    return list({workload.op: workload for workload in by_work}.values())

"""Workloads: the calls of each op that the models make, with inputs, bytes and FLOPs. Shared by tests and benchmarks.

A workload names its op, creates inputs on the default device, and counts its cost. Bytes count each input read once
and each output written once; a multiply-add counts as two FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..runtime import dispatch, layout
from ..runtime.ops import OPS
from ..runtime.tiles import SUBTILE_SAMPLES
from .testing import assert_as_exact, assert_nearest, exact, noise

SECONDS = 10  # of audio
SUBTILE_RATE = 200  # Hz; layers with a higher rate run in subtiles on a CPU (seanet.py)
CPU_FLOPS = 2e9  # take about 10 ms on a CPU
HEAD = 64  # head dimension of the transformers
FREQUENCIES = {"window_attention": 3, "transformer_layer": 13}  # index of RoPE's frequencies among the tensors


@dataclass(frozen=True)
class Workload:
    """One call of an op at shapes of the models."""

    op: str
    name: str
    rows: int  # samples, positions or frames that the op runs over, at full size
    shapes: Callable[[int], list[tuple[int, ...]]]  # of the tensors, from the number of rows
    options: dict[str, Any]
    longest: int  # number of terms of the op's longest sum
    rate: int | None = None  # sample rate of the input in Hz

    @property
    def cpu_rows(self) -> int:
        """Rows for a CPU: what a model passes to one call there (tiles.py), but at most what takes about 10 ms."""
        rows = self.rows
        if self.rate is not None and self.rate > SUBTILE_RATE:
            rows = self.rate * SUBTILE_SAMPLES // 24_000
        affordable = int(rows * CPU_FLOPS / self.flops(rows))
        return rows if rows <= affordable else max(16, affordable // 16 * 16)

    def __str__(self) -> str:
        return self.name

    def tensors(self, dtype: torch.dtype, rows: int | None = None, seed: int = 0) -> list[Tensor]:
        """Random inputs on the default device. Weights are small, so that outputs have a magnitude near 1."""
        shapes = self.shapes(rows or self.rows)
        if self.op.startswith("rvq"):
            dtype = torch.float32
        made = [noise(*shape, seed=seed + i, scale=0.3 if i == 0 else 0.1).to(dtype)
                for i, shape in enumerate(shapes)]  # fmt: skip
        if "conv" in self.op or "resblock" in self.op:
            made[0] = layout.channels_last(made[0])  # as layers return it
        if self.op == "window_attention":
            made = [t.transpose(1, 2) * 5 for t in made]  # the strides that the projections give
        if self.op in FREQUENCIES:
            dim = made[0].shape[-1] if self.op == "window_attention" else HEAD
            made.append(1.0 / 10_000.0 ** (torch.arange(0, dim, 2) / dim))
        if self.op == "rvq_decode":
            made[0] = made[0].mul(1e4).long() % made[1].shape[1]
        return made

    def channels_first(self, tensors: list[Tensor]) -> list[Tensor]:
        """The inputs in PyTorch's own layout, as layers of plain PyTorch hand them to one another."""
        return [tensors[0].contiguous(), *tensors[1:]] if tensors[0].dim() == 3 else tensors

    def bytes(self, dtype: torch.dtype) -> int:
        """Bytes at full size if every tensor is read or written once."""
        inputs = self.meta_tensors(dtype)
        return sum(t.numel() * t.element_size() for t in (*inputs, OPS[self.op].fake(*inputs, **self.options)))

    def flops(self, rows: int) -> float:
        """FLOPs for so many rows; a multiplication and an addition count as two."""
        inputs, op = self.meta_tensors(torch.float32, rows), OPS[self.op]
        return op.flops(op.fake(*inputs, **self.options), *inputs, **self.options)

    def meta_tensors(self, dtype: torch.dtype, rows: int | None = None) -> list[Tensor]:
        """The inputs on the meta device, at full size or for so many rows."""
        kinds = {"rvq_encode": [torch.float32] * 2, "rvq_decode": [torch.int64, torch.float32]}
        shapes = self.shapes(rows or self.rows)
        inputs = [
            torch.empty(shape, dtype=kind, device="meta")
            for shape, kind in zip(shapes, kinds.get(self.op, [dtype] * len(shapes)), strict=True)
        ]
        return [t.transpose(1, 2) for t in inputs] if self.op == "window_attention" else inputs

    def run(self, candidate: str, tensors: list[Tensor]) -> Tensor:
        """The op's output, computed by one of the dispatcher's candidates."""
        return dispatch.implementation(self.op, candidate)(*tensors, **self.options)

    def check(self, candidate: str, dtype: torch.dtype, rows: int | None = None) -> None:
        """Raise AssertionError if the candidate's error is larger than `testing.assert_as_exact` allows."""
        tensors = self.tensors(dtype, rows)
        if self.op == "rvq_encode":
            assert_nearest(self.run(candidate, tensors), *tensors)
        else:
            op, reference = (dispatch.implementation(self.op, name) for name in (candidate, "reference"))
            assert_as_exact(op, reference, tensors, **self.sums, **self.options)

    def exact(self, tensors: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, float]:
        """The result in fp64, and the bound of `testing.assert_as_exact` for computing it in `dtype`."""
        return exact(dispatch.implementation(self.op, "reference"), tensors, dtype, **self.sums, **self.options)

    @property
    def sums(self) -> dict[str, Any]:
        """Arguments for `testing.assert_as_exact`; RoPE's frequencies stay fp32 in every dtype."""
        return {"longest": self.longest, "fixed": [FREQUENCIES[self.op]] if self.op in FREQUENCIES else []}


def _conv(
    name: str, channels: tuple[int, int], kernel: int, rate: int, *, stride: int = 1, dilation: int = 1, **options: Any
) -> Workload:
    (c, o), left = channels, (kernel - 1) * dilation + 1 - stride
    return Workload(
        "causal_conv1d", name, SECONDS * rate, lambda n: [(1, c, n), (o, c, kernel), (o,)],
        {"stride": stride, "dilation": dilation, "pad": (left, 0), **options}, c * kernel, rate,
    )  # fmt: skip


def _upsampling(name: str, channels: tuple[int, int], stride: int, rate: int, groups: int = 1) -> Workload:
    c, o = channels
    return Workload(
        "causal_conv_transpose1d", name, SECONDS * rate,
        lambda n: [(1, c, n), (c, o // groups, 2 * stride), *([] if groups > 1 else [(o,)])],
        {"stride": stride, "groups": groups, "trim": (0, stride)}, 2 * c // groups, rate,
    )  # fmt: skip


def _resblock(channels: int, rate: int) -> Workload:
    c, h = channels, channels // 2
    return Workload(
        "resblock", f"{c} channels at {rate} Hz", SECONDS * rate,
        lambda n: [(1, c, n), (h, c, 3), (h,), (c, h, 1), (c,)], {"pad": (2, 0), "post": "elu"}, 3 * c, rate,
    )  # fmt: skip


def _audio_resblock(name: str, channels: tuple[int, int], kernel: int, unit: int) -> Workload:
    """channels, kernel: of the convolution; it follows the unit if that is what its input comes from."""
    (c, o), h, after = channels, unit // 2, channels[0] == unit
    return Workload(
        "audio_resblock", name, SECONDS * 24_000,
        lambda n: [(1, c, n), (h, unit, 3), (h,), (unit, h, 1), (unit,), (o, c, kernel), (o,)],
        {"after": after, "post": "elu"}, 3 * unit, 24_000,
    )  # fmt: skip


def _attention(positions: int, heads: int = 8, dim: int = 64, window: int = 250) -> Workload:
    return Workload(
        "window_attention", f"{positions} positions, {heads} heads of {dim}", positions,
        lambda n: [(1, n, heads, dim)] * 3, {"window": window}, max(dim, min(positions, window)),
    )  # fmt: skip


def _layer(positions: int, width: int = 512, hidden: int = 2048, window: int = 250) -> Workload:
    square, vector = (width, width), (width,)
    return Workload(
        "transformer_layer", f"{positions} positions of {width}", positions,
        lambda n: [
            (1, n, width), *[vector] * 2, *[square] * 4, *[vector] * 3, (hidden, width), (width, hidden), vector
        ],
        {"window": window, "eps": 1e-5}, hidden,
    )  # fmt: skip


def _rvq(op: str, name: str, frames: int, levels: int, dim: int) -> Workload:
    encode = op == "rvq_encode"
    return Workload(
        op, name, frames, lambda n: [(n, dim) if encode else (levels, n), (levels, 2048, dim)], {},
        dim if encode else levels,
    )  # fmt: skip


WORKLOADS: list[Workload] = [  # for 10 s of audio, unless the name says otherwise
    _conv("first, 1 to 64, k7", (1, 64), 7, 24_000),
    _conv("down, 64 to 128, k8 s4", (64, 128), 8, 24_000, stride=4),
    _conv("last, 64 to 1, k3", (64, 1), 3, 24_000),
    _conv("wide, 896 to 896, k3, SiLU", (896, 896), 3, 2_400, post="silu"),
    _conv("wide, dilated by 4", (896, 896), 3, 2_400, dilation=4, post="silu"),
    _upsampling("128 to 64, stride 4", (128, 64), 4, 6_000),
    _upsampling("1024 to 512, stride 8", (1024, 512), 8, 25),
    _upsampling("depthwise 512, stride 2", (512, 512), 2, 25, groups=512),
    _resblock(64, 24_000),
    _resblock(128, 6_000),
    _resblock(256, 1_200),
    _audio_resblock("first, 1 to 64, k7, and unit", (1, 64), 7, 64),
    _audio_resblock("unit and last, 64 to 1, k3", (64, 1), 3, 64),
    _attention(250),
    _attention(3_000),
    _attention(30_000),
    _layer(2),
    _layer(250),
    _rvq("rvq_encode", "7 levels, 125 frames", 125, 7, 256),
    _rvq("rvq_encode", "8 levels, 100,000 frames", 100_000, 8, 256),
    _rvq("rvq_encode", "8 levels of 1028, 1,000 frames", 1_000, 8, 1028),
    _rvq("rvq_decode", "31 levels, 10,000 frames", 10_000, 31, 256),
]


def distinct() -> list[Workload]:
    """One workload for each op and shape of weights, without those of JODIO's large layers."""
    cases = {(w.op, str(w.shapes(1))): w for w in WORKLOADS if "wide" not in w.name and "1028" not in w.name}
    return list(cases.values())

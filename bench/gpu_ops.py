"""`gpu.py ops`: the time of each op at the models' shapes, beside other implementations of the same.

First all of our kernels, then the launches of whole passes, then the others, those that have to be compiled last.
`of_roofline` is the lower bound that the binding peak rate sets, divided by the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_calls import OpCall, Pass, recorded, runnable, smallest
from gpu_compile import Job, compiled, jobs_of, workload_job
from gpu_models import load
from gpu_report import Report, Row, Step
from gpu_timing import Call, Timer, rotated
from torch import Tensor

from fastmimi.devtools.workloads import WORKLOADS, Workload
from fastmimi.runtime import arrivals, dispatch

BF16, FP32 = torch.bfloat16, torch.float32
PASSES = [
    Pass("8 x 10 s", 8, 125, False), Pass("stream of 1", 1, 1, True), Pass("streams of 64", 64, 1, True),
    Pass("streams of 1024", 1024, 1, True),
]  # fmt: skip
DRY_PASSES = [Pass("streams of 2", 2, 1, True)]
DRY_ROWS = 24
LONGEST_DENSE_MASK = 10_000
COUNTERS = 1 << 16
SMALL_SETS = 8  # of inputs, for implementations that must be compiled
Sets = list[list[Tensor]]


def steps(report: Report, timer: Timer, dry: bool) -> Iterator[Step]:
    """The steps of the command, the most important first."""
    device = "cpu" if dry else "cuda"
    passes, chosen = (DRY_PASSES, smallest()) if dry else (PASSES, runnable())
    pairs = [(w, dtype_of(w, BF16)) for w in chosen]
    both = pairs + [(w, FP32) for w in chosen if dtype_of(w, FP32) != dtype_of(w, BF16)]
    yield Step("compile", partial(compile_all, both, passes, device, dry))
    yield Step("ceilings", lambda: [{"check": "ceilings", **timer.ceilings()}])
    for workload, dtype in both:
        yield Step(f"{_named(workload, dtype)}, fastmimi", partial(ours, report, timer, workload, dtype, device, dry))
    for one in passes:
        yield Step(f"calls of {one.name}", partial(pass_rows, report, timer, one, device))
    for kind in (eager, compiled_reference):
        for workload, dtype in pairs:
            name = f"{_named(workload, dtype)}, {kind.__name__.replace('_', ' ')}"
            yield Step(name, partial(others, kind, timer, workload, dtype, device, dry))


def dtype_of(workload: Workload, dtype: torch.dtype) -> torch.dtype:
    return FP32 if workload.op.startswith("rvq") else dtype


def _named(workload: Workload, dtype: torch.dtype) -> str:
    return f"{workload.op}: {workload.name}, {str(dtype)[6:]}"


def compile_all(
    pairs: list[tuple[Workload, torch.dtype]], passes: list[Pass], device: str, dry: bool
) -> Iterator[Row]:  # fmt: skip
    """Compile our kernels, and what Inductor makes of the references."""
    jobs = [workload_job(w, dtype, DRY_ROWS if dry else w.rows, device) for w, dtype in pairs]
    calls = [call for one in passes for call in recorded(load(device, BF16), one.run)]
    slow = [Job(f"reference of {_named(w, dtype)}", run_compiled, (WORKLOADS.index(w), dtype, device, dry))
            for w, dtype in pairs if dtype_of(w, BF16) == dtype]  # fmt: skip
    yield from compiled(jobs[:2] + slow[:1] if dry else jobs_of(calls, device) + jobs + slow, dry)


def made(workload: Workload, dtype: torch.dtype, device: str, dry: bool) -> list[Tensor]:
    """The workload's tensors, in the layout that models hand over."""
    with torch.device(device):
        return workload.tensors(dtype, min(workload.rows, DRY_ROWS) if dry else workload.rows)


def run_compiled(index: int, dtype: torch.dtype, device: str, dry: bool) -> None:
    workload = WORKLOADS[index]
    for calls in compiled_reference(workload, [made(workload, dtype, device, dry)]).values():
        calls[0]()


# Ours


def bound_of(report: Report, row: Row, dtype: torch.dtype) -> Row:
    """The row with its fraction of the roofline, if both it and the peak rates were measured."""
    peak = report.known(check="ceilings") or {}
    if "ms" not in row or "copy_bytes_s" not in peak:
        return row
    # in fp32, three TF32 products
    rate = peak["bf16_flops_s"] if dtype != FP32 else peak["tf32_flops_s"] / 3
    by_bytes, by_flops = row["bytes"] / peak["copy_bytes_s"] * 1e3, row["flops"] / rate * 1e3
    bound = max(by_bytes, by_flops)
    return row | {"of_roofline": bound / row["ms"], "binds": "bytes" if bound == by_bytes else "flops"}


def ours(
    report: Report, timer: Timer, workload: Workload, dtype: torch.dtype, device: str, dry: bool
) -> Iterator[Row]:  # fmt: skip
    sets = rotated(made(workload, dtype, device, dry), timer.l2_bytes())
    row: Row = {"op": workload.op, "case": workload.name, "dtype": str(dtype)[6:], "who": "fastmimi"}
    row |= {"bytes": workload.bytes(dtype), "flops": workload.flops(workload.rows), "sets": len(sets)}
    with torch.no_grad(), counters(device):
        row |= timer.kernels([lambda s=s: workload.run("triton", s) for s in sets])
    yield bound_of(report, row, dtype)


def pass_rows(report: Report, timer: Timer, one: Pass, device: str) -> Iterator[Row]:
    """Each distinct call of a pass of the model, both ways, and how often it is made."""
    with torch.no_grad(), counters(device):
        for call, count in recorded(load(device, BF16), one.run).items():
            dtype = FP32 if call.op.startswith("rvq") else BF16
            row: Row = {"op": call.op, "case": str(call), "pass": one.name, "calls": count, "who": "fastmimi"}
            row |= {"bytes": call.bytes + call.result().nbytes, "flops": call.flops()}
            row |= timer.kernels(calls_of(call, device, timer.l2_bytes()))
            if "ms" in row:
                row["ms_of_pass"] = count * row["ms"]
            yield bound_of(report, row, dtype)


def counters(device: str) -> AbstractContextManager[None]:
    """Within the context, launches use counters that are there, as in streams, and do not make their own in graphs."""
    return arrivals.owned(arrivals.new(COUNTERS, torch.device(device)))


def calls_of(call: OpCall, device: str, l2_bytes: int) -> list[Call]:
    """The call on rotating tensors."""
    function = dispatch.implementation(call.op, "triton")
    tensors = call.make(device)
    sets = [dict(zip(tensors, values, strict=True)) for values in rotated(list(tensors.values()), l2_bytes)]
    return [lambda s=s: call.run(function, s) for s in sets]


# The others


def others(
    kind: Callable[[Workload, Sets], dict[str, list[Call]]], timer: Timer, workload: Workload, dtype: torch.dtype,
    device: str, dry: bool,
) -> Iterator[Row]:  # fmt: skip
    first = workload.channels_first(made(workload, dtype, device, dry))
    with torch.no_grad():
        for name, calls in kind(workload, rotated(first, timer.l2_bytes())[:SMALL_SETS]).items():
            row: Row = {"op": workload.op, "case": workload.name, "dtype": str(dtype)[6:], "who": name}
            yield row | timer.kernels(calls)


def eager(workload: Workload, sets: Sets) -> dict[str, list[Call]]:
    """The reference, and the library function that does most of it, without what is fused into ours."""
    reference, options = dispatch.implementation(workload.op, "reference"), workload.options
    calls: dict[str, list[Call]] = {"reference": [lambda s=s: reference(*s, **options) for s in sets]}
    if workload.op == "causal_conv1d":
        padded = [F.pad(s[0], options["pad"]) for s in sets]
        stride, dilation = options["stride"], options["dilation"]
        calls["cuDNN, convolution alone"] = [
            lambda x=x, s=s: F.conv1d(x, s[1], s[2], stride, 0, dilation) for x, s in zip(padded, sets, strict=True)
        ]
    elif workload.op == "causal_conv_transpose1d":
        stride, groups = options["stride"], options["groups"]
        calls["cuDNN, convolution alone"] = [
            lambda s=s: F.conv_transpose1d(s[0], s[1], s[2] if len(s) > 2 else None, stride, groups=groups)
            for s in sets
        ]
    elif workload.op == "resblock":
        calls["cuDNN, two convolutions alone"] = [
            lambda s=s: F.conv1d(F.conv1d(s[0], s[1], s[2], padding=1), s[3], s[4]) for s in sets
        ]
    elif workload.op == "audio_resblock":
        calls["cuDNN, three convolutions alone"] = [lambda s=s: convolutions(s, options["after"]) for s in sets]
    elif workload.op == "window_attention" and sets[0][0].shape[2] <= LONGEST_DENSE_MASK:
        length = sets[0][0].shape[2]
        positions = torch.arange(length, device=sets[0][0].device)
        mask = (positions[None] <= positions[:, None]) & (positions[None] > positions[:, None] - options["window"])
        calls["SDPA with a mask, no RoPE"] = [lambda s=s: F.scaled_dot_product_attention(*s[:3], mask) for s in sets]
    elif workload.op == "rvq_encode":
        loops = [transformers_loop(s[1]) for s in sets]
        calls["transformers' loop"] = [lambda s=s, f=f: f(s[0]) for s, f in zip(sets, loops, strict=True)]
    return calls


def convolutions(tensors: list[Tensor], after: bool) -> Tensor:
    """Those of a residual unit and of the convolution before or after it."""
    x, weight1, bias1, weight2, bias2, weight, bias = tensors
    x = x if after else F.conv1d(x, weight, bias, padding=weight.shape[2] // 2)
    x = F.conv1d(F.conv1d(x, weight1, bias1, padding=1), weight2, bias2)
    return F.conv1d(x, weight, bias, padding=weight.shape[2] // 2) if after else x


def transformers_loop(codebooks: Tensor) -> Callable[[Tensor], Tensor]:
    """transformers' search with these codebooks [L, S, D], as a function of rows [N, D]."""
    from transformers import MimiConfig
    from transformers.models.mimi.modeling_mimi import MimiResidualVectorQuantizer

    levels, size, dim = codebooks.shape
    config = MimiConfig(
        codebook_size=size, codebook_dim=dim, vector_quantization_hidden_dimension=dim, hidden_size=dim,
        num_quantizers=max(levels, 2),
    )  # fmt: skip
    quantizer = MimiResidualVectorQuantizer(config, levels).to(codebooks.device)
    for layer, book in zip(quantizer.layers, codebooks, strict=True):
        layer.codebook.embed_sum.copy_(book)
    return lambda x: quantizer.encode(x.T[None])


def compiled_reference(workload: Workload, sets: Sets) -> dict[str, list[Call]]:
    """What `torch.compile` makes of the reference, and FlexAttention."""
    reference, options = dispatch.implementation(workload.op, "reference"), workload.options
    backend = "inductor" if sets[0][0].is_cuda else "eager"  # a dry run has no time for a C++ compiler
    whole = torch.compile(reference, dynamic=False, backend=backend)
    calls: dict[str, list[Call]] = {"torch.compile": [lambda s=s: whole(*s, **options) for s in sets]}
    if workload.op == "window_attention":
        calls["FlexAttention, no RoPE"] = flex_attention(workload, sets, backend)
    return calls


def flex_attention(workload: Workload, sets: Sets, backend: str) -> list[Call]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length, window, device = sets[0][0].shape[2], workload.options["window"], sets[0][0].device.type

    def band(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (j <= i) & (j > i - window)

    mask = create_block_mask(band, None, None, length, length, device=device)
    flex = torch.compile(flex_attention, dynamic=False, backend=backend)
    return [lambda s=s: flex(*s[:3], block_mask=mask) for s in sets]

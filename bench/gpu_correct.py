"""`gpu.py correct`: every launch of the models, every workload and whole models against fp64 and the CPU.

Launches are checked within passes of the models: each distinct call of an op is compared with the reference in fp64,
result and state, when it is first made in fresh streams, and again once ring buffers have wrapped and one stream is
masked. Bounds are those of `testing.assert_as_exact`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any

import torch
from gpu_calls import Function, OpCall, Pass, named, ordered, recorded, runnable, smallest, wrapped
from gpu_compile import compiled, jobs_of, workload_job
from gpu_models import load
from gpu_report import Report, Row, Step, text_of
from torch import Tensor

from fastmimi.devtools import testing
from fastmimi.devtools.workloads import Workload
from fastmimi.models.codec import Codec
from fastmimi.models.config import JodioConfig, JodioTransformerConfig
from fastmimi.models.jodio import JodioModel
from fastmimi.runtime import dispatch

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
PASSES = [
    Pass("stream of 1", 1, 1, True), Pass("streams of 64", 64, 1, True), Pass("chunks of 25 frames", 2, 25, True),
    Pass("1 x 10 s", 1, 125, False), Pass("3 x 1 s", 3, 13, False),
]  # fmt: skip
DRY_PASSES = [Pass("streams of 2", 2, 1, True), Pass("2 x 2 frames", 2, 2, False)]
WARMING_FRAMES = 131  # of streams before their second check: more than the window holds
MUTATED = ("history", "cache_k", "cache_v")
WORKLOAD_ROWS = 24_000  # at most; the reference in fp64 needs memory for each
MANY_STREAMS = 1536  # so that the slow layers, too, have more rows than launch tables tell apart
CHUNKED_S = 10.5  # longer than the attention window


def steps(report: Report, dry: bool) -> Iterator[Step]:
    """The steps of the command, the most important first."""
    device, passes = ("cpu", DRY_PASSES) if dry else ("cuda", PASSES)
    dtypes = DTYPES[:2] if dry else DTYPES
    yield Step("compile", lambda: compile_launches(passes, dtypes, device, dry))
    for dtype in dtypes[:2]:
        for one in passes:
            yield Step(f"launches, {_name(dtype)}, {one.name}", partial(launches, report, one, dtype, device))
    for check in (codes, batches, many_streams, pool, chunks, masked):
        yield Step(f"whole model, {check.__name__}", partial(check, device, dry))
    for dtype in dtypes:
        yield Step(f"NaN, {_name(dtype)}", partial(not_a_number, dtype, device, dry))
    for workload, dtype in workloads(dtypes, dry):
        name = f"workload, {_name(dtype)}, {workload.op}: {workload.name}"
        yield Step(name, partial(check_workload, workload, dtype, device, dry))
    for dtype in [dtype for dtype in dtypes if dtype != torch.float32]:
        yield Step(f"whole model, half precision, {_name(dtype)}", partial(half_precision, dtype, device, dry))
    for dtype in dtypes[2:]:
        for one in passes:
            yield Step(f"launches, {_name(dtype)}, {one.name}", partial(launches, report, one, dtype, device))
    for dtype, one in jodio_passes(passes, dtypes):
        name = f"launches of JODIO, {_name(dtype)}, {one.name}"
        yield Step(name, partial(launches, report, one, dtype, device, jodio))


def workloads(dtypes: Iterable[torch.dtype], dry: bool) -> list[tuple[Workload, torch.dtype]]:
    """Workloads and their dtypes; those of quantizers are fp32."""
    chosen = smallest() if dry else runnable()
    return [(w, dtype) for dtype in dtypes for w in chosen if dtype == torch.float32 or not w.op.startswith("rvq")]


def jodio_passes(passes: list[Pass], dtypes: Iterable[torch.dtype]) -> list[tuple[torch.dtype, Pass]]:
    """A frame of one stream and a short offline pass in bf16 and fp32; without a GPU, the latter in bf16."""
    chosen = [passes[0], passes[-1]] if len(passes) > 2 else passes[1:]
    return [(dtype, one) for dtype in list(dtypes)[: len(chosen)] for one in chosen]


def _name(dtype: torch.dtype) -> str:
    return str(dtype)[6:]


def compile_launches(
    passes: list[Pass], dtypes: Iterable[torch.dtype], device: str, dry: bool
) -> Iterator[Row]:  # fmt: skip
    calls: dict[OpCall, None] = {}
    for dtype in dtypes:
        for one in passes:
            calls |= dict.fromkeys(recorded(load(device, dtype), one.run))
    for dtype, one in jodio_passes(passes, dtypes):
        calls |= dict.fromkeys(recorded(jodio(device, dtype), one.run))
    jobs = jobs_of(list(calls), device)
    jobs += [workload_job(w, dtype, min(w.rows, WORKLOAD_ROWS), device) for w, dtype in workloads(dtypes, dry)]
    yield from compiled(jobs[:4] if dry else jobs, dry)


# Launches


def launches(
    report: Report, one: Pass, dtype: torch.dtype, device: str, model_of: Callable[..., Codec] = load
) -> Iterator[Row]:  # fmt: skip
    """Rows go to the report as they come, since a later launch may end the process."""
    model = model_of(device, dtype)
    audio, codes = one.inputs(model)
    state = model.new_state(one.batch) if one.stream else None
    check = partial(checked, report, report.content["running"])
    with torch.no_grad():
        with wrapped(partial(check, set(), "first"), device, dtype):
            model.encode(audio, state=state)
            model.decode(codes, state=state)
        if state is not None:
            longer = WARMING_FRAMES if one.batch <= 64 and device != "cpu" else 2
            model.encode(audio.repeat(1, 1, longer)[..., : longer * model.frame_size], state=state)
            model.decode(codes.repeat(1, 1, longer)[..., :longer], state=state)
            if one.batch > 1:
                state.exec_mask[one.batch // 2] = False
            with wrapped(partial(check, set(), "later"), device, dtype):
                model.encode(audio, state=state)
                model.decode(codes, state=state)
    yield {"check": "the pass ends", "ok": True}


@cache
def jodio(device: str, dtype: torch.dtype) -> Codec:
    """A JODIO with one transformer layer, since all launch the same kernels."""
    config = (
        JodioConfig.small() if device == "cpu"
        else JodioConfig(encoder_transformer=JodioTransformerConfig(num_hidden_layers=1))
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return JodioModel(config, impl="triton").eval().requires_grad_(False).to(device, dtype)


def checked(report: Report, step: str, seen: set[OpCall], phase: str, op: str, function: Function) -> Function:
    """The op, each distinct call of which is compared with the reference."""

    def run(*arguments: Any, **keywords: Any) -> Tensor:
        keywords = {name: value for name, value in keywords.items() if "dropout" not in name}
        call = OpCall.of(op, arguments, keywords)
        if call in seen:
            return function(*arguments, **keywords)
        seen.add(call)
        report.detail = f"{op} {call}"
        row = {"step": step, "op": op, "check": str(call), "phase": phase, "resumable": True}
        known = report.known_before(**row)  # to a process that ended after this call
        if known is not None:
            chosen = function if known["ok"] else dispatch.implementation(op, "reference")
            return chosen(*arguments, **keywords)
        tensors, options = named(op, arguments, keywords)
        before = {name: t.clone() for name, t in tensors.items() if name in MUTATED and t is not None}
        try:
            result = function(*arguments, **keywords)
            for outcome in compared(op, tensors, options, before, result):
                report.add(row | outcome)
            return result
        except Exception as error:  # the pass goes on with the reference, unless the GPU does not
            report.add(row | {"ok": False, "error_text": text_of(error)})
            for name, tensor in before.items():
                tensors[name].copy_(tensor)
            return dispatch.implementation(op, "reference")(*arguments, **keywords)

    return run


def compared(
    op: str, tensors: dict[str, Any], options: dict[str, Any], before: dict[str, Tensor], result: Tensor
) -> Iterator[Row]:
    """Rows for the result of a call and for each tensor of its state, which held `before`."""
    if op == "rvq_encode":
        testing.assert_nearest(result, tensors["x"], tensors["codebooks"])
        yield {"of": "codes", "ok": True}
        return
    reference = dispatch.implementation(op, "reference")
    present = {name: before.get(name, t) for name, t in tensors.items() if t is not None}

    def part(name: str | None, options: dict[str, Any]) -> Callable[..., Tensor]:
        def run(*operands: Tensor, **_: object) -> Tensor:
            given = dict(zip(present, operands, strict=True))
            given |= {n: given[n].clone() for n in before}
            y = reference(**ordered(op, given), **options)
            return y if name is None else given[name]

        return run

    wide = options | ({"dtype": torch.float64} if "dtype" in options else {})
    fixed = [i for i, name in enumerate(present) if name == "inv_freq"]
    for name in (None, *before):
        mine = result if name is None else tensors[name]
        plain = part(name, options)(*present.values())
        if name == "history":  # inputs, not computed
            error = testing.relative_error(mine, plain)
            yield {"of": name, "error": error, "bound": 0.0, "ok": error == 0.0}
            continue
        truth, bound = testing.exact(
            part(name, wide), list(present.values()), mine.dtype, longest=longest(op, present, options), fixed=fixed
        )
        errors = testing.Errors(
            testing.relative_error(mine, truth), testing.relative_error(plain, truth), bound,
            torch.finfo(mine.dtype).eps,
        )  # fmt: skip
        yield {"of": name or "result", **judged(errors)}


def judged(errors: testing.Errors) -> Row:
    return {"error": errors.mine, "plain_error": errors.plain, "bound": errors.allowed,
            "ok": errors.mine <= errors.allowed}  # fmt: skip


def longest(op: str, tensors: dict[str, Tensor], options: dict[str, Any]) -> int:
    """The number of terms of the longest sum of a call."""
    if op == "causal_conv_transpose1d":
        weight = tensors["weight"]
        return weight.shape[0] // options.get("groups", 1) * -(-weight.shape[2] // options.get("stride", 1))
    if op == "window_attention":
        return max(tensors["q"].shape[3], options["window"])
    if op == "transformer_layer":
        return max(tensors["fc2"].shape[1], options["window"])
    if op == "rvq_decode":
        return tensors["codes"].shape[0]
    return tensors["weight" if op == "causal_conv1d" else "weight1"][0].numel()


# Workloads


def check_workload(workload: Workload, dtype: torch.dtype, device: str, dry: bool) -> Iterator[Row]:
    """One row; tensors have the layout that models hand over, and rows reach beyond one tile."""
    rows = min(workload.rows, 24 if dry else WORKLOAD_ROWS)
    row: Row = {"op": workload.op, "check": workload.name, "rows": rows}
    with torch.device(device), torch.no_grad():
        if workload.op == "rvq_encode":
            workload.check("triton", dtype, rows)
            yield row | {"ok": True}
            return
        op, reference = (dispatch.implementation(workload.op, name) for name in ("triton", "reference"))
        yield row | judged(
            testing.errors(op, reference, workload.tensors(dtype, rows), **workload.sums, **workload.options)
        )


def not_a_number(dtype: torch.dtype, device: str, dry: bool) -> Iterator[Row]:
    """A NaN in the input makes NaN what it makes NaN in the reference, and infinities make no others finite."""
    for workload in smallest() if dry else runnable():
        if workload.op not in ("causal_conv1d", "causal_conv_transpose1d", "resblock"):
            continue
        for value in (float("nan"), float("inf"), float("-inf")):
            with torch.device(device), torch.no_grad():
                tensors = workload.tensors(dtype, 48 if dry else 600)
                tensors[0][0, tensors[0].shape[1] // 2, 20] = value
                mine = workload.run("triton", tensors)
                truth = workload.run("reference", [t.double() for t in tensors])
            # an infinity may turn into NaN: three TF32 products of it are inf - inf
            same = torch.equal(mine.isnan(), truth.isnan()) if value != value else torch.equal(
                mine.isfinite(), truth.isfinite())  # fmt: skip
            yield {"op": workload.op, "check": f"{workload.name}, {value}", "ok": same}


# Whole models


def _frames(seconds: float, dry: bool) -> int:
    return 2 if dry else round(seconds * 12.5)


def codes(device: str, dry: bool) -> Iterator[Row]:
    """Offline at fp32: codes of the reference on the CPU, or ties; audio to 1e-5 of the peak."""
    mine, theirs = load(device, torch.float32), load("cpu", torch.float32, "reference")
    for batch, frames, extra in ((1, _frames(10, dry), 0), (2, _frames(1, dry), 7)):
        audio, _ = Pass("", batch, frames, False).inputs(theirs, extra)
        row = {"check": f"{batch} x {frames} frames and {extra} samples"}
        every = theirs.total_codebooks
        expected, latents = theirs.encode(audio, num_codebooks=every), theirs.encode_to_latent(audio)
        found = mine.encode(audio.to(device), num_codebooks=every).cpu()
        differing = int((found != expected).sum())
        testing.assert_same_codes(found, expected, latents, theirs)
        yield row | {"of": "codes", "differing": differing, "codes": found.numel(), "ok": True}
        error = testing.relative_error(mine.encode_to_latent(audio.to(device)).cpu(), latents)
        yield row | {"of": "latents", "error": error, "bound": 1e-5, "ok": error < 1e-5}
        error = testing.relative_error(mine.decode(expected.to(device)).cpu(), theirs.decode(expected))
        yield row | {"of": "audio", "error": error, "bound": 1e-5, "ok": error < 1e-5}


def batches(device: str, dry: bool) -> Iterator[Row]:
    """Rows of a large batch equal the rows alone."""
    batch = 2 if dry else 64
    model = load(device, torch.float32)
    audio, codes = Pass("", batch, _frames(10, dry), False).inputs(model)
    found, sound = model.encode(audio), model.decode(codes)
    for row in sorted({0, batch // 2, batch - 1}):
        yield from _same(model, f"row {row} of {batch}", audio[row : row + 1], found[row : row + 1],
                         codes[row : row + 1], sound[row : row + 1])  # fmt: skip


def many_streams(device: str, dry: bool) -> Iterator[Row]:
    """Streams of a large batch equal streams alone."""
    batch = 2 if dry else MANY_STREAMS
    model = load(device, torch.float32)
    audio, codes = Pass("", batch, 2, True).inputs(model)
    state, found, sound = model.new_state(batch), [], []
    for part, coded in zip(audio.split(model.frame_size, dim=-1), codes.split(1, dim=-1), strict=True):
        found.append(model.encode(part, state=state).clone())
        sound.append(model.decode(coded, state=state).clone())
    whole, heard = torch.cat(found, dim=-1), torch.cat(sound, dim=-1)
    for row in sorted({0, batch // 2, batch - 1}):
        yield from _same(model, f"stream {row} of {batch}", audio[row : row + 1], whole[row : row + 1],
                         codes[row : row + 1], heard[row : row + 1])  # fmt: skip


def pool(device: str, dry: bool) -> Iterator[Row]:
    """Streams of a pool, which take turns, equal streams alone; with a graph of two of them too."""
    model, streams, ticks = load(device, torch.float32), 4, 4 if dry else 200
    audio, codes = Pass("", streams, ticks, True).inputs(model)
    size, every = model.frame_size, model.num_codebooks
    runs = (("encode", model.encode_pass(every), audio, size), ("decode", model.decode_pass(), codes, 1))
    results = []
    for direction, run, x, unit in runs:
        state = model.new_direction(direction, streams)
        run.warm_up(x.shape[1], 1, state.select(torch.tensor([0, 1], device=device)), threads=1)
        parts: list[list[Tensor]] = [[] for _ in range(streams)]
        for tick in range(ticks):
            rows = [row for row in range(streams) if row == tick % streams or tick % (row + 2)][: 2 + tick % 2]
            chunk = torch.stack([x[row, :, len(parts[row]) * unit : (len(parts[row]) + 1) * unit] for row in rows])
            found = run.in_tiles(chunk, state.select(torch.tensor(rows, device=device)))
            for row, y in zip(rows, found.clone(), strict=True):
                parts[row].append(y)
        results.append([torch.cat(part, dim=-1) for part in parts])
    for row, (found, sound) in enumerate(zip(*results, strict=True)):
        frames = found.shape[-1]
        yield from _same(model, f"stream {row} of a pool, {frames} frames", audio[row : row + 1, :, : frames * size],
                         found[None], codes[row : row + 1, :, :frames], sound[None])  # fmt: skip


def chunks(device: str, dry: bool) -> Iterator[Row]:
    """Chunks of a stream equal the whole: of any length, and of one frame after `warm_up`."""
    model, frames = load(device, torch.float32), _frames(CHUNKED_S, dry)
    audio, codes = Pass("", 3, frames, False).inputs(model)
    size = model.frame_size
    for name, samples, counts in (
        ("any length", testing.chunks(audio.shape[-1] - size // 3, 1, 4 * size), testing.chunks(frames, 2, 5)),
        ("one frame, warmed up", [size] * frames, [1] * frames),
    ):
        state, given = model.new_state(3), audio[..., : sum(samples)]
        if "warmed" in name:
            before = len(model.graph_report())
            model.warm_up(state)  # a graph that differs from the model's own step is not kept
            kept = len(model.graph_report()) - before
            yield {"check": "CUDA graphs, of both directions", "graphs": kept, "ok": device == "cpu" or kept == 2}
        found = [model.encode(part, state=state).clone() for part in given.split(samples, dim=-1)]
        found.append(model.flush(state))
        sound = [model.decode(part, state=state).clone() for part in codes.split(counts, dim=-1)]
        yield from _same(model, name, given, torch.cat(found, dim=-1), codes, torch.cat(sound, dim=-1))


def _same(model: Codec, name: str, audio: Tensor, found: Tensor, codes: Tensor, sound: Tensor) -> Iterator[Row]:
    """Rows that compare codes and audio with one call over the whole."""
    expected, latents = model.encode(audio), model.encode_to_latent(audio)
    differing = int((found != expected).sum())
    testing.assert_same_codes(found, expected, latents, model)
    yield {"check": name, "of": "codes", "differing": differing, "codes": found.numel(), "ok": True}
    error = testing.relative_error(sound, model.decode(codes))
    yield {"check": name, "of": "audio", "error": error, "bound": 1e-5, "ok": error < 1e-5}


def masked(device: str, dry: bool) -> Iterator[Row]:
    """A masked stream does not change, with and without `warm_up`."""
    model = load(device, torch.float32)
    audio, codes = Pass("", 3, 1, True).inputs(model)
    for warm in (False, True):
        state = model.new_state(3)
        if warm:
            model.warm_up(state)
        for _ in range(2):
            model.encode(audio, state=state)
            model.decode(codes, state=state)
        state.exec_mask = torch.tensor([True, False, True], device=device)
        before = {name: tensor.clone() for name, tensor in state.state_dict().items()}
        coded, sound = model.encode(audio, state=state), model.decode(codes, state=state)
        after = state.state_dict()
        layers = [name for name in before if name.partition(".")[0] in ("encode", "decode")]
        moved = [name for name in layers if not torch.equal(before[name][1], after[name][1])]
        still = [name for name in layers if torch.equal(before[name][0], after[name][0])]
        ok = not moved and bool((coded[1] == -1).all()) and not sound[1].any() and len(still) < len(layers) // 2
        yield {"check": "warmed up" if warm else "not warmed up", "moved": moved[:4], "still": still[:4], "ok": ok}


def half_precision(dtype: torch.dtype, device: str, dry: bool) -> Iterator[Row]:
    """Latents and audio against fp64 on the same weights."""
    mine, theirs = load(device, dtype), load(device, dtype, "reference")
    audio, codes = Pass("", 2, _frames(1, dry), False).inputs(mine)
    for method, x in (("encode_to_latent", audio), ("decode", codes)):
        operands = (x, *theirs.parameters())
        call, reference = getattr(mine, method), testing.as_function(theirs, method)
        errors = testing.errors(
            lambda x, *_, call=call: call(x), reference, operands, longest=testing.longest_sum(theirs)
        )
        yield {"check": method, **judged(errors)}

"""`gpu.py models`: whole codecs, offline and in streams, beside transformers' and moshi's with the same weights."""

from __future__ import annotations

import copy
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_calls import Pass, recorded
from gpu_compile import Job, compiled, jobs_of
from gpu_report import Row, Step, free_memory
from gpu_timing import Timer

import fastmimi
from fastmimi.devtools.testing import relative_error, small_model
from fastmimi.models.codec import Codec
from fastmimi.runtime import packing, tiles

BF16, FP32 = torch.bfloat16, torch.float32
CODEBOOKS = 8
OFFLINE = [Pass("64 x 10 s", 64, 125, False), Pass("8 x 10 s", 8, 125, False), Pass("1 x 10 s", 1, 125, False)]
STREAMS = [Pass(f"streams of {batch}", batch, 1, True) for batch in (1, 64, 1024, 4096)]
DRY_OFFLINE, DRY_STREAMS = [Pass("2 x 4 frames", 2, 4, False)], [Pass("streams of 2", 2, 1, True)]
POOLS = [(64, 64), (64, 4), (512, 512), (4096, 4096)]  # capacity, streams with a frame in each tick
DRY_POOLS = [(3, 2)]
COMPILING_S = 90.0  # at most
PROFILED = 12  # kernels listed


@cache
def _weights() -> Codec:
    return fastmimi.load("random:0", num_codebooks=CODEBOOKS)


@cache
def load(device: str, dtype: torch.dtype, impl: str = "triton") -> Codec:
    """A Mimi with random weights; a small one for Triton's interpreter. It is moved outside of inference mode."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        model: Any = small_model(upsampling_ratios=[4, 3, 2], frame_rate=500)  # frames of 48 samples
    else:
        model = copy.deepcopy(_weights())
    model.impl = impl
    return model.to(device, dtype)


def steps(timer: Timer, dry: bool) -> Iterator[Step]:
    """The steps of the command, the most important first: ours, then the others."""
    device = "cpu" if dry else "cuda"
    offline, streams = (DRY_OFFLINE, DRY_STREAMS) if dry else (OFFLINE, STREAMS)
    yield Step("compile", partial(compile_all, offline, streams, device, dry))
    yield Step("ceilings", lambda: [{"check": "ceilings", **timer.ceilings()}])
    for one, dtype in zip(offline, (BF16, FP32, BF16), strict=False):
        yield Step(f"offline, {one.name}, {_name(dtype)}", partial(offline_rows, timer, one, dtype, device))
    for warm, dtype, cases in ((True, BF16, streams), (False, BF16, streams[:2]), (True, FP32, streams[:2])):
        for one in cases:
            name = f"{one.name}, {_name(dtype)}, {'warmed up' if warm else 'not warmed up'}"
            yield Step(name, partial(stream_rows, timer, one, dtype, device, warm))
    for capacity, active in DRY_POOLS if dry else POOLS:
        name = f"pool of {capacity}, {active} active"
        yield Step(name, partial(pool_rows, timer, name, capacity, active, device))
    yield Step(f"short tiles, {offline[0].name}", partial(short_tiles, timer, offline[0], device))
    yield Step(f"transformers, {offline[0].name}", partial(transformers_rows, timer, offline[0], device, False))
    for one in streams[:3]:
        yield Step(f"transformers, {one.name}", partial(transformers_stream_rows, timer, one, device))
    if importlib.util.find_spec("moshi") is not None and not dry:  # its Mimi has one configuration
        for one in (offline[0], *streams[:3]):
            yield Step(f"moshi, {one.name}", partial(moshi_rows, timer, one, device))
    name = f"transformers, compiled, {offline[0].name}"
    yield Step(name, partial(transformers_rows, timer, offline[0], device, True))


def _name(dtype: torch.dtype) -> str:
    return str(dtype)[6:]


def compile_all(offline: list[Pass], streams: list[Pass], device: str, dry: bool) -> Iterator[Row]:
    """Compile what the passes launch, and transformers' model in the dtype and batch that is timed."""
    # the largest batches launch the same kernels as smaller ones, and have too large tensors for many processes
    passes = [(one, BF16) for one in (*offline[1:], *streams[:3])] + [
        (one, FP32) for one in (*offline[1:2], *streams[:2])
    ]
    passes = passes or [(one, BF16) for one in streams]
    calls = [call for one, dtype in passes for call in recorded(load(device, dtype), one.run)]
    slow = [Job(f"transformers, {way}", compile_peer, (offline[0], device, way)) for way in ("encode", "decode")]
    jobs = jobs_of(calls[:3], device) if dry else slow + jobs_of(calls, device)
    yield from compiled(jobs, dry, limit_s=COMPILING_S)


def with_rate(row: Row, one: Pass, model: Codec) -> Row:
    """The row with seconds of audio per second, if it was measured."""
    seconds = one.batch * one.frames * model.frame_size / model.sample_rate
    ms = row.get("wall_ms", row.get("wall_ms_p50"))
    return row if ms is None else row | {"times_real_time": seconds / ms * 1e3}


def ways(model: Codec, one: Pass, **options: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Encode and decode, as functions without arguments."""
    audio, codes = one.inputs(model)
    yield "encode", lambda: model.encode(audio, **options)
    yield "decode", lambda: model.decode(codes, **options)


def offline_rows(timer: Timer, one: Pass, dtype: torch.dtype, device: str) -> Iterator[Row]:
    model = load(device, dtype)
    with torch.inference_mode():
        for way, call in ways(model, one):
            row = {"way": way, "case": one.name, "dtype": _name(dtype), "who": "fastmimi"}
            row |= with_rate(timer.whole(call), one, model)
            before = packing.preparations()
            call()
            yield row | {"packed_again": packing.preparations() - before} | timer.memory(call)
            yield row_of_kernels(timer, way, one, dtype, call)


def row_of_kernels(timer: Timer, way: str, one: Pass, dtype: torch.dtype, call: Callable[[], Any]) -> Row:
    """Kernels of a call, by GPU time; a profiler that cannot run here is no failure."""
    row = {"way": way, "case": one.name, "dtype": _name(dtype), "who": "fastmimi", "what": "kernels"}
    try:
        return row | timer.launches(call, top=PROFILED)
    except RuntimeError as error:
        return row | {"profiler": f"{error}"[:200]}


def stream_rows(timer: Timer, one: Pass, dtype: torch.dtype, device: str, warm: bool) -> Iterator[Row]:
    """A frame of so many streams, each way; memory per stream."""
    model = load(device, dtype)
    with torch.inference_mode():
        state = model.new_state(one.batch)
        refused = warm_up(model, state) if warm else None
        graphs = [graph for graph in model.graph_report() if graph.input[0] == one.batch]
        held = sum(tensor.nbytes for tensor in state.state_dict().values())
        for way, call in ways(model, one, state=state):
            row = {"way": way, "case": one.name, "dtype": _name(dtype), "who": "fastmimi", "warm_up": warm}
            row |= with_rate(timer.frames(call), one, model) | timer.memory(call)
            row |= {"graphs": len(graphs), "graph_bytes": sum(graph.nbytes for graph in graphs)}
            row |= {} if refused is None else {"warm_up_failed": refused}
            yield row | {"state_bytes_per_stream": held // one.batch}
            yield row_of_kernels(timer, way, one, dtype, call) | {"warm_up": warm}


def pool_rows(timer: Timer, name: str, capacity: int, active: int, device: str) -> Iterator[Row]:
    """Ticks of a pool, each way, through `SlotPool`; its graphs, and streams that a tick of 80 ms could hold."""
    model = load(device, BF16)
    with torch.inference_mode():
        before = len(model.graph_report())
        pool = fastmimi.SlotPool(model, capacity)
        pool.warm_up()
        graphs = model.graph_report()[before:]
        slots = torch.arange(active, device=device)
        audio, codes = Pass("", active, 1, True).inputs(model)
        calls = {"encode": lambda: pool.step_encode(audio, slots), "decode": lambda: pool.step_decode(codes, slots)}
        for way, call in calls.items():
            row = {"way": way, "case": name, "dtype": "bfloat16", "who": "fastmimi", "warm_up": True}
            row |= with_rate(timer.frames(call), Pass("", active, 1, True), model)
            row |= {"graphs": len(graphs), "graph_bytes": sum(graph.nbytes for graph in graphs)}
            yield row | {"state_bytes_per_stream": pool.bytes_per_slot}


def warm_up(model: Codec, state: Any) -> str | None:
    """Warm the state up; why not, if its copies do not fit beside it."""
    try:
        model.warm_up(state)
        return None
    except torch.OutOfMemoryError as error:
        reason = f"{error}"[:200]
    free_memory()
    return reason


def short_tiles(timer: Timer, one: Pass, device: str) -> Iterator[Row]:
    """Offline in tiles of the least length, instead of as much as there is memory for."""
    with mock.patch.object(tiles, "SHARE", 0.0):
        for row in offline_rows(timer, one, BF16, device):
            yield row | {"case": f"{one.name}, tiles of {tiles.TILE_SAMPLES_ACCELERATOR} samples"}


# The others


@cache
def transformers_model(device: str, dtype: torch.dtype) -> Any:
    """transformers' model with our weights."""
    from transformers import MimiModel

    with tempfile.TemporaryDirectory() as folder:
        fastmimi.save_pretrained(load("cpu", FP32, "reference"), folder)
        return MimiModel.from_pretrained(folder).eval().to(device, dtype)


def transformers_ways(one: Pass, device: str, compile: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    peer, model = transformers_model(device, BF16), load(device, BF16)
    audio, codes = one.inputs(model)
    encode, decode = peer.encode, peer.decode
    if compile:
        backend = "eager" if device == "cpu" else "inductor"  # a dry run has no time for a C++ compiler
        torch._dynamo.config.recompile_limit = 256  # its layers share code, which is compiled for each of them
        encode, decode = (torch.compile(f, dynamic=False, backend=backend) for f in (encode, decode))
    yield "encode", lambda: encode(audio, num_quantizers=model.num_codebooks).audio_codes
    yield "decode", lambda: decode(codes).audio_values


def compile_peer(one: Pass, device: str, way: str) -> None:
    transformers_model(device, BF16)  # outside of inference mode, as ours
    load(device, BF16)
    with torch.inference_mode():
        dict(transformers_ways(one, device, True))[way]()


def transformers_rows(timer: Timer, one: Pass, device: str, compile: bool) -> Iterator[Row]:
    who, model = f"transformers{', compiled' if compile else ''}", load(device, BF16)
    transformers_model(device, BF16)
    audio, codes = one.inputs(model)
    with torch.inference_mode():
        ours = {"encode": model.encode(audio), "decode": model.decode(codes)}
        for way, call in transformers_ways(one, device, compile):
            row = {"way": way, "case": one.name, "dtype": "bfloat16", "who": who}
            found = call()
            if way == "encode":
                row["equal_codes"] = (found == ours[way]).float().mean().item()
            else:
                row["difference"] = relative_error(found, ours[way])
            yield row | with_rate(timer.whole(call, 5), one, model) | timer.memory(call)


def transformers_stream_rows(timer: Timer, one: Pass, device: str) -> Iterator[Row]:
    """Its encoder's streams; its decoder has no state for convolutions."""
    peer, model = transformers_model(device, BF16), load(device, BF16)
    audio, _ = one.inputs(model)
    held: dict[str, Any] = {}

    def call() -> Any:
        found = peer.encode(audio, num_quantizers=model.num_codebooks, use_streaming=True, **held)
        held["encoder_past_key_values"] = found.encoder_past_key_values
        held["padding_cache"] = found.padding_cache
        return found.audio_codes

    with torch.inference_mode():
        row = {"way": "encode", "case": one.name, "dtype": "bfloat16", "who": "transformers"}
        yield row | with_rate(timer.frames(call, 100), one, model) | timer.memory(call)


def moshi_rows(timer: Timer, one: Pass, device: str) -> Iterator[Row]:
    from moshi.models.loaders import get_mimi

    model = load(device, BF16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kyutai.safetensors"
        fastmimi.save_kyutai(load("cpu", FP32, "reference"), path)
        peer = get_mimi(path, device=device, num_codebooks=model.num_codebooks).to(BF16)
    audio, codes = one.inputs(model)
    calls = {"encode": lambda: peer.encode(audio), "decode": lambda: peer.decode(codes)}
    with torch.inference_mode():
        for way, call in calls.items():
            row = {"way": way, "case": one.name, "dtype": "bfloat16", "who": "moshi"}
            if not one.stream:
                yield row | with_rate(timer.whole(call, 5), one, model) | timer.memory(call)
                continue
            with peer.streaming(one.batch):
                yield row | with_rate(timer.frames(call, 100), one, model) | timer.memory(call)

"""End-to-end time beside its peers (peers.py) with the same weights: offline, streaming, cold start.

The rounds of all codecs alternate in one process, so that other load on the machine affects all alike, and their
results are checked to be equal (if they are not, `bench/report.py` writes no report). Long clips and cold starts run in
processes of their own. The peers' times and ratios are in `extra_info` of the JSON and are printed at the end.
"""

import json
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import peers
import pytest
import torch

from fastmimi.devtools.testing import noise, relative_error

THREADS = torch.get_num_threads()
OFFLINE = {  # batch, seconds, threads, rounds
    "1 x 1 s, 1 thread": (1, 1, 1, 9),
    "1 x 10 s, 1 thread": (1, 10, 1, 3),
    "1 x 1 s": (1, 1, THREADS, 9),
    "1 x 10 s": (1, 10, THREADS, 3),
    "8 x 1 s": (8, 1, THREADS, 3),
    "8 x 10 s": (8, 10, THREADS, 1),
}
PAUSE_S = 0.1  # between codecs: the threads of a runtime go on waiting busily after its call
RUNTIMES = ("onnxruntime", "openvino")
EXACT = (*RUNTIMES, "transformers", "moshi")  # peers that must give the same results
LONG = 60  # seconds
SLOW = {"rustymimi"}  # takes some 2 s for 10 s of audio, and one row only
FRAMES, WARM_UP = 40, 8  # of a stream
STREAMS = {  # batch, threads
    "1 x 80 ms": (1, THREADS),
    "4 x 80 ms": (4, THREADS),
    "16 x 80 ms": (16, THREADS),
    "1 x 80 ms on 1 thread": (1, 1),  # with the runtimes, whose threads would disturb the next codec's frame
}


@pytest.fixture(scope="module")
def loaded(folder):
    """A function that loads all codecs for a number of threads, and lets go of those for another number."""
    found = {}

    def load(threads):
        if threads not in found:
            found.clear()
            torch.set_num_threads(threads)
            codecs = {name: peers.load(name, folder) for name in peers.NAMES}
            for name in [name for name, codec in codecs.items() if codec is None]:
                print(f"{name} is not installed and is left out")
                del codecs[name]
            found[threads] = codecs
        return found[threads]

    return load


@pytest.fixture
def codecs(loaded):
    return loaded(THREADS)


@pytest.fixture(autouse=True)
def all_threads():
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("case", OFFLINE)
@pytest.mark.parametrize("direction", ["encode", "decode"])
def bench_offline(in_turn, loaded, case, direction):
    batch, seconds, threads, rounds = OFFLINE[case]
    codecs = loaded(threads)
    torch.set_num_threads(threads)
    names = [name for name in codecs if case == "1 x 10 s" or name not in SLOW]
    if batch * seconds > LONG:  # runtimes keep the memory of their largest input, here 10 GB
        names = [name for name in names if name not in RUNTIMES]
    frames = -(-seconds * 24_000 // peers.FRAME)  # whole ones: peers complete the last frame in other ways
    audio = noise(batch, 1, frames * peers.FRAME, scale=0.1)
    codes = codecs["fastmimi"].encode(audio)
    inputs = audio if direction == "encode" else codes
    calls = {name: lambda name=name: getattr(codecs[name], direction)(inputs) for name in names}
    for name in names:
        if name.startswith("fastmimi") or name in RUNTIMES:
            calls[name]()  # a warm-up, which packs weights and plans memory
    results = in_turn(f"{direction} {case}", calls, rounds, pause=PAUSE_S)
    for name in EXACT:
        if name in results:
            assert_same(results[name], results["fastmimi"], name)


def assert_same(theirs, mine, name):
    """Assert that more than 99.9% of codes are equal (rounding decides ties), or audio to 1e-5 of its peak."""
    if mine.is_floating_point():
        assert relative_error(theirs, mine) < 1e-5, f"the audio of {name} differs"
    else:
        assert (theirs == mine).float().mean() > 0.999, f"the codes of {name} differ"


@pytest.mark.parametrize("direction", ["encode", "decode"])
def bench_long(benchmark, codecs, folder, direction):
    """Each codec in a process of its own: its time, and its peak memory beyond that of the loaded model."""
    case = f"1 x {LONG} s"

    def run(name):
        script = str(Path(__file__).with_name("long.py"))
        command = [sys.executable, script, name, str(folder), direction, str(LONG), str(folder / name)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            print(f"{name} did not finish {direction} {case}: {done.stderr.strip() or 'killed'}")
        return None if done.returncode else json.loads(done.stdout)

    benchmark.group = f"{direction} {case}"
    mine = benchmark.pedantic(run, args=("fastmimi",), rounds=1)
    runs = {name: result for name in EXACT if name in codecs and (result := run(name)) is not None}
    for name in runs:
        assert_same(torch.load(folder / name), torch.load(folder / "fastmimi"), name)
    benchmark.extra_info["own"] = mine["seconds"]
    benchmark.extra_info["MiB"] = {name: run["MiB"] for name, run in {"fastmimi": mine, **runs}.items()}
    benchmark.extra_info["seconds"] = {name: run["seconds"] for name, run in runs.items()}
    benchmark.extra_info["ratios"] = {name: run["seconds"] / mine["seconds"] for name, run in runs.items()}


@pytest.mark.parametrize("case", STREAMS)
@pytest.mark.parametrize("direction", ["encode", "decode"])
def bench_stream(benchmark, record, loaded, case, direction):
    batch, threads = STREAMS[case]
    codecs = loaded(threads)
    torch.set_num_threads(threads)
    if threads > 1:
        codecs = {name: codec for name, codec in codecs.items() if name not in RUNTIMES}
    audio = noise(batch, 1, peers.FRAME * FRAMES, scale=0.1)
    codes = codecs["fastmimi"].encode(audio)
    inputs = (audio if direction == "encode" else codes).split(peers.FRAME if direction == "encode" else 1, dim=-1)
    streams = {name: codec.stream(batch) for name, codec in codecs.items() if codec.stream is not None}
    with ExitStack() as stack:
        steps = {name: stack.enter_context(stream)[direction == "decode"] for name, stream in streams.items()}
        results, times, frames = {name: [] for name in steps}, {name: [] for name in steps}, iter(inputs)

        def step(name, frame):
            start = time.perf_counter()
            result = steps[name](frame)
            times[name].append(time.perf_counter() - start)
            results[name].append(result)

        def others():
            frame = next(frames)
            for name in steps:
                if name != "fastmimi":
                    step(name, frame)
            return ("fastmimi", frame), {}

        for _ in range(WARM_UP):
            step(*others()[0])
        for taken in times.values():
            taken.clear()
        benchmark.group = f"stream, {case}, {direction}"
        benchmark.pedantic(step, setup=others, rounds=FRAMES - WARM_UP)
    whole = torch.cat(results["fastmimi"], dim=-1)
    if direction == "encode":
        assert torch.equal(whole, codes)
    else:
        assert relative_error(whole, codecs["fastmimi"].decode(codes)) < 1e-5
    for name, taken in times.items():
        ranked = sorted(taken)
        benchmark.extra_info[name] = {f"p{p}": ranked[len(ranked) * p // 100] for p in (50, 95, 99)}
    del times["fastmimi"]
    record(times)


FIRST_CODE = """
import sys, torch
sys.path.insert(0, {here!r})
from pathlib import Path
import peers
with torch.inference_mode():
    codec = peers.load({name!r}, Path({folder!r}))
    codec.encode(torch.zeros(1, 1, peers.FRAME))
"""


def bench_cold_start(in_turn, codecs, folder):
    """Time from the start of the interpreter to the first codes: imports, loading the weights, encoding one frame."""
    here = str(folder.__class__(__file__).parent)

    def start(name):
        code = FIRST_CODE.format(here=here, name=name, folder=str(folder))
        return lambda: subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

    started = ("fastmimi", *(name for name in EXACT if name in codecs))
    in_turn("cold start to the first code", {name: start(name) for name in started}, 2)

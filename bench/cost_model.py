"""Predicts the time of kernel launches on an H100 from their compiled code; nothing here is measured.

A launch takes LAUNCH_S and then the longest of five times, which are assumed to overlap perfectly; one of several
phases takes these for each phase, and WAIT_S between them:

- units: the instructions of the busiest SM, at the rate of the busiest of its functional units;
- tensor: the FLOPs of its tensor-core instructions;
- memory: the launch's tensors, once each, at the rate of a copy;
- L2: the bytes that its programs load and store, at the rate of the L2 cache and of the port of one SM;
- latency: what a program takes alone (its instructions at CLOCKS_PER_INSTRUCTION, its tensor-core instructions, and
  the waits for memory that its pipeline does not hide), times the waves of programs.

How often a loop runs comes from `LOOPS`, the only part that knows the kernels. Not modelled: bank conflicts, loads
that are not coalesced, tensors that an earlier launch left in the L2 cache, and the imbalance of programs. Masked loads
count as if they were not masked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import sass
import torch
from compiled import Usage
from recorded import SMS, Launch, Recording, TorchLaunch, size

# Rates that were measured on an H100 SXM.
BYTES_PER_S = 3.0e12  # of a copy, read and written
FLOPS_PER_S = 798e12  # of a large bf16 matrix product
CLOCK_HZ = 1.755e9
# Of the same GPU by NVIDIA's documents (CUDA C++ Programming Guide, throughput of instructions; H100 white paper).
UNITS = {"issue": 128, "alu": 64, "fp64": 64, "xu": 16}  # threads per clock and SM
SHARED_BYTES_PER_CLOCK = 128  # per SM
REGISTERS, SHARED_BYTES, WARPS, PROGRAMS = 65_536, 227 * 1024, 64, 32  # per SM
# Assumed.
FLOPS_PER_CLOCK = 3_445  # per SM, in bf16; TF32 at half of it. 132 SMs make FLOPS_PER_S
HMMA_SHARE = 0.62  # of that rate, which instructions of single warps reach
L2_BYTES_PER_S = 5.5e12
L2_BYTES_PER_CLOCK = 64  # of one SM
LATENCY_S = 600e-9  # of memory, from the load to the use
LAUNCH_S = 2.5e-6  # of an empty kernel in a CUDA graph
WAIT_S = 1.5e-6  # of all programs of a launch for each other
CLOCKS_PER_INSTRUCTION = 2.0  # of a warp that has a scheduler to itself
TORCH_LATENCIES = 2  # waits for memory in one of PyTorch's kernels

Values = dict[str, Any]
HISTORY_BLOCK = 1024  # elements that `advance_history` moves at once


def _history(v: Values) -> list[float]:
    """Loops of `advance_history`, which one program of each group of batch rows runs."""
    if not v["STREAM"]:
        return []
    groups = math.ceil(v["B"] / v["per_tile"])
    return [v["per_tile"] * groups / v["programs"], math.ceil(v["pad"] * v["C"] / HISTORY_BLOCK)]


def _conv(v: Values, loops: list[sass.Loop]) -> list[float]:
    """The loop that adds the sums of all splits, if the compiler left one, is run by one program of each part."""
    steps, history = math.ceil(math.ceil(v["K"] * v["C"] / v["BLOCK_R"]) / v["SPLITS"]), _history(v)
    if v["SPLITS"] == 1 or len(loops) <= 1 + len(history):
        return [steps, *history]
    return [steps, v["BLOCK_T"] * v["BLOCK_O"] * 4 / (loops[1].counts["read"] * v["num_warps"]), *history]


def _resblock(v: Values, loops: list[sass.Loop]) -> list[float]:
    """With ONCE, channels are one block, and there is no loop over them."""
    channels = math.ceil(v["C"] / v["BLOCK_C"])
    return [*([] if v["ONCE"] else [channels, channels]), *_history(v)]


def _depthwise(v: Values, loops: list[sass.Loop]) -> list[float]:
    """The compiler adds versions of the loops for no taps, which load nothing and do not run."""
    real = iter([v["tiles"], v["stride"], v["taps"], *([v["taps"] - 1] if v["STREAM"] else [])])
    return [next(real) if any(i.counts["load"] for i in (loop, *loop.all_inner())) else 0 for loop in loops]


def _search(v: Values, loops: list[sass.Loop]) -> list[float]:
    """Steps; x, once; the wait for other programs; the next residual; the search, twice; the choice of two."""
    dims, steps = math.ceil(v["units"] * v["UNIT"] / v["BLOCK_D"]), v["last"] - v["first"]
    share = math.ceil(v["share"] / v["BLOCK_S"])
    return [steps, dims / steps, 1, dims * (steps - 1) / steps, share, dims, dims]


def _attention(v: Values, loops: list[sass.Loop]) -> list[float]:
    """On average over the blocks of queries: blocks of keys in the ring, which is full, and in this call."""
    if v["FEW"]:
        return [math.ceil(v["window"] / v["BLOCK_K"])] if v["STREAM"] else []
    starts = range(0, v["T"], v["BLOCK_Q"])
    first = [start - v["window"] + 1 for start in starts]
    last = [min(start + v["BLOCK_Q"], v["T"]) for start in starts]
    new = sum(math.ceil((b - max(a, 0)) / v["BLOCK_K"]) for a, b in zip(first, last, strict=True)) / len(starts)
    share = sum(a < 0 for a in first) / len(starts)
    return [*([share * math.ceil(v["window"] / v["BLOCK_K"])] if v["STREAM"] else []), new]


def _linear(v: Values, loops: list[sass.Loop]) -> list[float]:
    """Where rows are longer than a chunk, their mean and variance have loops of their own."""
    channels = v["units"] * v["UNIT"]
    statistics = 0 if v["WHOLE"] else {"none": 0, "rms": 1, "layer": 2}[v["PRE"]]
    return [*[math.ceil(channels / v["CHUNK"])] * statistics, math.ceil(channels / v["BLOCK_C"])]


def _layer(v: Values) -> list[tuple[str, Values]]:
    """The phases of a whole layer: q, k, v; attention; o; fc1; fc2."""
    width, attended = v["units"] * v["UNIT"], v["H"] * v["D"]
    numbers = {name: value for name, value in v.items() if not isinstance(value, torch.Tensor)}

    def phase(kernel: str, tiles: int, tensors: str, **changed: Any) -> tuple[str, Values]:
        return kernel, numbers | {name: v[name] for name in tensors.split()} | {"programs": tiles} | changed

    def linear(pre: str, channels: int, outputs: int, tensors: str) -> tuple[str, Values]:
        tiles = math.ceil(outputs / v["BLOCK_O"])
        return phase("transformer_layer_linear_kernel", tiles, tensors, PRE=pre, units=channels, UNIT=1)

    return [
        linear(v["NORM"], width, attended + 2 * v["H_kv"] * v["D"], "p_x p_qkv p_q p_k p_v"),
        phase("window_attention_fwd_kernel", v["R"] // v["T"] * v["H_kv"], "p_q p_k p_v p_y p_ring_k p_ring_v"),
        linear("none", attended, width, "p_y p_o p_x p_out"),
        linear(v["NORM"], width, v["hidden"], "p_out p_fc1 p_hidden"),
        linear("none", v["hidden"], width, "p_hidden p_fc2 p_out"),
    ]


def _unrolled(iterations: int, loops: list[sass.Loop]) -> list[float]:
    """One loop, or an unrolled one and one for the rest."""
    if len(loops) == 1:
        return [iterations]
    factor = loops[0].counts["written"] // loops[1].counts["written"]
    return [iterations // factor, iterations % factor]


# For each kernel, from its arguments, its number of `programs`, and the loops found: how often these run each time that
# they are entered, in the order of their addresses in the code, outer before inner.
LOOPS: dict[str, Callable[[Values, list[sass.Loop]], list[float]]] = {
    "causal_conv1d_fwd_kernel": _conv,
    "causal_conv_transpose1d_depthwise_kernel": _depthwise,
    "resblock_fwd_kernel": _resblock,
    "audio_resblock_fwd_kernel": lambda v, loops: [],
    "rvq_encode_fwd_kernel": _search,
    "rvq_decode_fwd_kernel": lambda v, loops: [v["L"]],
    "transformer_layer_linear_kernel": _linear,
    "window_attention_fwd_kernel": _attention,
    "window_attention_ring_kernel": lambda v, loops: [],
    "window_attention_rotate_kernel": lambda v, loops: _unrolled(v["H_kv"], loops),
}
# The phases of kernels that have several, each a loop over tiles: the kernel that computes the same as a launch of its
# own, and that launch's values, `programs` being the tiles.
PHASES: dict[str, Callable[[Values], list[tuple[str, Values]]]] = {"transformer_layer_kernel": _layer}
# Tensors of which a kernel reads only some entries, and how many bytes.
PARTS: dict[str, dict[str, Callable[[Values], int]]] = {
    "rvq_decode_fwd_kernel": {"p_books": lambda v: v["N"] * v["L"] * v["D"] * v["p_books"].element_size()},
}


class Prediction(NamedTuple):
    """Seconds of one launch or several: each bound, and the whole."""

    units: float
    tensor: float
    memory: float
    l2: float
    latency: float
    total: float

    @property
    def bound(self) -> str:
        """The longest of the five, or "launches", with waits in them, if even that is less than half of the time."""
        bounds = dict(zip(self._fields[:-1], self[:-1], strict=True))
        longest = max(bounds, key=lambda name: bounds[name])
        return {"l2": "L2 cache"}.get(longest, longest) if 2 * bounds[longest] >= self.total else "launches"


def values(launch: Launch) -> Values:
    return launch.values | {"programs": math.prod(launch.grid)}


class Phase(NamedTuple):
    """What a launch does between two waits."""

    programs: int  # or tiles, which programs take in turn
    loops: list[tuple[sass.Loop, float]]  # how often each runs in a program or for a tile, and what is around them once
    bytes: int  # of tensors


def phases(launch: Launch, program: sass.Loop) -> list[Phase]:
    """The phases of a launch, mostly one; ValueError if `PHASES` or `LOOPS` give another number than the code has."""
    v, name = values(launch), launch.name
    if name not in PHASES:
        return [Phase(v["programs"], trips(name, v, program), bytes_of(name, v))]
    given = PHASES[name](v)
    found = [loop for loop in program.inner if any(each.counts["flops"] for each in (loop, *loop.all_inner()))]
    if len(found) != len(given):
        raise ValueError(f"{name} has {len(found)} phases in compiled code, PHASES gives {len(given)}")
    return [
        Phase(v["programs"], trips(name, v, tiles), bytes_of(name, v))
        for tiles, (name, v) in zip(found, given, strict=True)
    ]


def trips(name: str, v: Values, program: sass.Loop) -> list[tuple[sass.Loop, float]]:
    """The program and its loops, and how often each runs in all; ValueError if `LOOPS` says another number of loops."""
    found = list(program.all_inner())
    if name not in LOOPS:
        raise ValueError(f"{name} is not in LOOPS (bench/cost_model.py)")
    given = LOOPS[name](v, found)
    if len(found) != len(given):
        raise ValueError(f"{name} has {len(found)} loops in compiled code, LOOPS gives {len(given)}")
    times = dict(zip(map(id, found), given, strict=True))

    def walk(loop: sass.Loop, entered: float) -> Iterator[tuple[sass.Loop, float]]:
        yield loop, entered
        for inner in loop.inner:
            yield from walk(inner, entered * times[id(inner)])

    return list(walk(program, 1.0))


def bytes_of(name: str, v: Values) -> int:
    """The tensors of a launch of a kernel, once each."""
    parts = PARTS.get(name, {})
    whole = size([value for argument, value in v.items() if argument not in (*parts, "p_arrivals")])
    return whole + sum(min(size(v[argument]), part(v)) for argument, part in parts.items())


def resident(usage: Usage, warps: int) -> int:
    """How many programs an SM holds at once."""
    registers = math.ceil(usage.registers / 8) * 8 * 32 * warps
    shared = usage.shared + 1024  # that the system keeps for each
    return max(1, min(REGISTERS // registers, SHARED_BYTES // shared, WARPS // warps, PROGRAMS))


def predict(launch: Launch, usage: Usage) -> Prediction:
    assert usage.program is not None
    found = phases(launch, usage.program)
    at_once = SMS * resident(usage, launch.options["num_warps"]) if len(found) == 1 else math.prod(launch.grid)
    each = [_bounds(phase, launch.options, at_once) for phase in found]
    total = LAUNCH_S + sum(map(max, each)) + (len(found) - 1) * WAIT_S
    return Prediction(*map(sum, zip(*each, strict=True)), total)


def _bounds(phase: Phase, options: Values, at_once: int) -> tuple[float, ...]:
    """The five bounds of a phase, of whose programs so many run at once."""
    programs, warps, stages = phase.programs, options["num_warps"], options.get("num_stages", 1)
    total: dict[str, float] = {}
    alone = 0.0  # s of one program
    for loop, times in phase.loops:
        for name, count in loop.counts.items():
            total[name] = total.get(name, 0.0) + count * warps * times
        waits = LATENCY_S * max(loop.counts["load"] > 0, (loop.counts["async"] > 0) / stages)
        clocks = loop.counts["issue"] * max(CLOCKS_PER_INSTRUCTION, warps / 4) + _tensor_clocks(loop.counts) * warps
        alone += times * (max(waits, clocks / CLOCK_HZ) + LATENCY_S * loop.counts["atomic"])
    per_sm = math.ceil(programs / SMS)
    clocks = max(
        *(32 * total.get(name, 0.0) / rate for name, rate in UNITS.items()),
        total.get("shared", 0.0) / SHARED_BYTES_PER_CLOCK,
    )
    moved = total.get("read", 0.0) + total.get("written", 0.0)
    return (
        per_sm * clocks / CLOCK_HZ,
        per_sm * _tensor_clocks(total) / CLOCK_HZ,
        phase.bytes / BYTES_PER_S,
        max(programs * moved / L2_BYTES_PER_S, per_sm * moved / L2_BYTES_PER_CLOCK / CLOCK_HZ),
        math.ceil(programs / at_once) * alone,
    )


def _tensor_clocks(counts: dict[str, float]) -> float:
    flops, hmma = counts.get("flops", 0.0), counts.get("hmma", 0.0)
    return (flops - hmma + hmma / HMMA_SHARE) / FLOPS_PER_CLOCK


def predict_torch(launch: TorchLaunch) -> Prediction:
    """One of PyTorch's kernels: bytes or FLOPs at full rate, and at least some waits for memory."""
    bounds = 0.0, launch.flops / FLOPS_PER_S, launch.bytes / BYTES_PER_S, 0.0, TORCH_LATENCIES * LATENCY_S
    return Prediction(*bounds, LAUNCH_S + max(bounds))


class Stage(NamedTuple):
    """A row of a case: seconds that its ops take at least, and what is predicted."""

    name: str
    launches: int
    floor: float
    predicted: Prediction


def stages(recording: Recording, usages: dict[tuple[Any, ...], Usage]) -> list[Stage]:
    """The stages of a recorded case in the order in which they begin; `usages` by the variant of a launch."""
    found: dict[str, list[Prediction]] = {}
    for launch in recording.launches:
        known = predict_torch(launch) if isinstance(launch, TorchLaunch) else predict(launch, usages[launch.variant])
        found.setdefault(launch.stage, []).append(known)
    return [
        Stage(name, len(each), floor(recording.needs.get(name, [])), Prediction(*map(sum, zip(*each, strict=True))))
        for name, each in found.items()
    ]


def floor(needs: list[tuple[float, float]]) -> float:
    """Seconds that ops take at least by their bytes or FLOPs, whichever takes longer."""
    return sum(max(bytes_ / BYTES_PER_S, flops / FLOPS_PER_S) for bytes_, flops in needs)

"""The predicted times of the page `results/kernels.md`, beside measured ones where there are any.

Measured times are read from the last `results/gpu-*.json` by name: {"gpu": its name, "ms": {key: milliseconds}}. A key
is a case, as "encode 64 x 10 s, whole", or a case and a stage, as "encode 64 x 10 s, whole: down 4".
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cost_model
from compiled import Usage
from cost_model import Stage
from recorded import CASES, Case, mimi, of_case

RESULTS = Path(__file__).parent / "results"


def measured(folder: Path = RESULTS) -> tuple[str, dict[str, float]]:
    """The GPU's name and its measured times; empty if there are none."""
    files = sorted(folder.glob("gpu-*.json"))
    if not files:
        return "", {}
    found = json.loads(files[-1].read_text(encoding="utf-8"))
    return found["gpu"], found["ms"]


def all_stages(usages: dict[tuple[Any, ...], Usage]) -> list[tuple[Case, list[Stage]]]:
    """What is predicted of every case."""
    model = mimi()
    return [(case, cost_model.stages(of_case(model, case), usages)) for case in CASES]


def faults(cases: list[tuple[Case, list[Stage]]]) -> Iterator[str]:
    """What contradicts itself: a stage that is predicted to take less than its bytes or FLOPs allow."""
    for case, stages in cases:
        for stage in stages:
            if not stage.floor <= stage.predicted.total:
                times = f"{_ms(stage.predicted.total)} ms, less than its floor of {_ms(stage.floor)} ms"
                yield f"{case.name}: {stage.name} is predicted to take {times}"


def section(cases: list[tuple[Case, list[Stage]]], gpu: str, times: dict[str, float]) -> list[str]:
    """The lines of the page about times."""
    source = f"Measured times are of {gpu}." if gpu else "Nothing has been measured yet."
    lines = [
        "## Predicted times",
        "",
        "Predicted by `bench/cost_model.py` from the sm_90 code below, for Mimi in bf16 with 8 codebooks on an H100",
        f"SXM. {source} Launches are those of a pass in its steady state, without the checks of",
        "arguments around it. The floor is the time that the bytes of a stage's ops or their FLOPs take at full rate,",
        "whichever is longer. Bounds are functional units, tensor cores, memory, the L2 cache, latency, and launches.",
        "",
        "| assumption | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in assumptions().items()),
        "",
        "| case | launches | floor, ms | goal, ms | predicted, ms | measured, ms | error | times real time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, stages in cases:
        floor, total = (sum(s) for s in zip(*((s.floor, s.predicted.total) for s in stages), strict=True))
        goal = "" if case.goal is None else f"{case.goal:g}"
        lines.append(
            f"| {case.name} | {sum(s.launches for s in stages)} | {_ms(floor)} | {goal} | {_ms(total)} | "
            f"{_compared(total, times.get(case.name))} | {case.seconds / total:,.0f} |"
        )
    shown: dict[tuple[Stage, ...], str] = {}
    for case, stages in cases:
        lines += ["", f"### {case.name[0].upper()}{case.name[1:]}", ""]
        if (same := shown.setdefault(tuple(stages), case.name)) != case.name:
            lines += [f"The same launches as in {same}."]
            continue
        lines += ["| stage | launches | floor, ms | predicted, ms | bound | measured, ms | error |"]
        lines += ["|---|---|---|---|---|---|---|"]
        lines += [
            f"| {s.name} | {s.launches} | {_ms(s.floor)} | {_ms(s.predicted.total)} | {s.predicted.bound} | "
            f"{_compared(s.predicted.total, times.get(f'{case.name}: {s.name}'))} |"
            for s in sorted(stages, key=lambda s: s.name == "between ops")
        ]
    return lines


def assumptions() -> dict[str, str]:
    """The constants of the model, for the page."""
    return {
        "copy": f"{cost_model.BYTES_PER_S / 1e12:g} TB/s",
        "matrix product in bf16": f"{cost_model.FLOPS_PER_S / 1e12:g} TFLOP/s",
        "L2 cache": f"{cost_model.L2_BYTES_PER_S / 1e12:g} TB/s, {cost_model.L2_BYTES_PER_CLOCK} bytes a clock and SM",
        "SMs and clock": f"{cost_model.SMS} at {cost_model.CLOCK_HZ / 1e9:g} GHz",
        "threads a clock and SM": ", ".join(f"{unit} {rate}" for unit, rate in cost_model.UNITS.items()),
        "bf16 FLOPs a clock and SM": f"{cost_model.FLOPS_PER_CLOCK:,}, half of it in TF32, "
        f"{cost_model.HMMA_SHARE:.0%} of it by instructions of single warps",
        "latency of memory": f"{cost_model.LATENCY_S * 1e9:g} ns, divided by the stages of a pipeline",
        "clocks per instruction of a warp alone": f"{cost_model.CLOCKS_PER_INSTRUCTION:g}",
        "launch in a graph": f"{cost_model.LAUNCH_S * 1e6:g} us",
        "wait of all programs of a launch for each other": f"{cost_model.WAIT_S * 1e6:g} us",
    }


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}" if seconds < 0.01 else f"{seconds * 1e3:.1f}"


def _compared(predicted: float, measured_ms: float | None) -> str:
    """The cells of a measured time and of the error of the prediction."""
    if measured_ms is None:
        return "- | -"
    return f"{measured_ms:.3f} | {predicted * 1e3 / measured_ms - 1:+.0%}"

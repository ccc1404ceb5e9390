"""Compile every Triton kernel launch of the models ahead of time, check its resources, and predict its time.

    python bench/kernels_report.py             # all targets, writes bench/results/kernels.md (`make kernels-report`)
    python bench/kernels_report.py sm_90       # the same for some targets
    python bench/kernels_report.py --check     # the page's list of kernels, and some of them for sm_90 (2 minutes)

No GPU is needed: the launches of Mimi and of JODIO (offline, and for one frame of a stream) are recorded instead of
run (recorded.py), and each distinct one is compiled for each target as at its first launch there (compiled.py). From
the code for sm_90, times are predicted (cost_model.py, predicted.py). The exit code is 1 if a kernel spills registers,
exceeds the shared memory of its target, or multiplies without tensor-core instructions, if it has other loops than
cost_model.py says or cannot be compiled, and if the committed table lacks a kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import cost_model
import predicted
import torch
import triton
from compiled import MODELLED, SAVED, TARGETS, Usage, compile_all
from recorded import Launch, kernels
from rich.progress import track

SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # largest shared memory of a block
TENSOR_CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
SMALL_TILES = "HMMA"  # for tiles of 16 or 32 rows, which are too short for the instructions of a warp group
WITHOUT_PRODUCTS = (
    "rvq_decode_fwd_kernel", "causal_conv_transpose1d_depthwise_kernel", "window_attention_rotate_kernel",
    "window_attention_ring_kernel",
)  # fmt: skip
OUT = Path(__file__).parent / "results" / "kernels.md"


def faults(name: str, launch: Launch, usage: Usage) -> Iterator[str]:
    """What is wrong with a compiled kernel, one sentence each."""
    where = f"{describe(launch)} for {name}"
    if usage.error:
        yield f"{where} cannot be compiled: {usage.error}"
        return
    if usage.spilled:
        yield f"{where} spills {usage.spilled} bytes per thread"
    if usage.shared > SHARED_KIB[name] * 1024:
        yield f"{where} needs {usage.shared} bytes of shared memory, more than {SHARED_KIB[name]} KiB"
    if multiplies(launch) and usage.tensor_cores not in (TENSOR_CORES[name], SMALL_TILES):
        yield f"{where} uses {usage.tensor_cores or 'no tensor-core instruction'}, not {TENSOR_CORES[name]}"
    if usage.program is not None:
        try:
            cost_model.phases(launch, usage.program)
        except ValueError as error:
            yield f"{where}: {error}"
    rows = launch.options.get("BLOCK_T", launch.options.get("BLOCK_Q", launch.options.get("BLOCK_N", 0)))
    if rows >= 64 and multiplies(launch) and usage.tensor_cores != TENSOR_CORES[name]:
        yield f"{where} uses {usage.tensor_cores}, not {TENSOR_CORES[name]}, with {rows} rows per tile"


def multiplies(launch: Launch) -> bool:
    """Whether a kernel has matrix products; a tile of a single row has none."""
    return launch.kernel.__name__ not in WITHOUT_PRODUCTS and launch.options.get("BLOCK_N") != 1


def describe(launch: Launch) -> str:
    options = launch.options
    dtype = next(str(a.dtype)[6:] for a in launch.args if isinstance(a, torch.Tensor) and a.dtype.is_floating_point)
    words = [launch.kernel.__name__, dtype, *(["stream"] if options.get("STREAM") else [])]
    words += ["of a pool"] if options.get("ROWS") else []
    for name, value in options.items():
        if name in ("PRE", "POST", "MODE", "NORM", "ACTIVATION") and value not in ("none", "constant"):
            words.append(f"{name.lower()} {value}")
    return " ".join(words) + " " + tile(launch)


def tile(launch: Launch) -> str:
    names = [name for name in launch.options if name.startswith("BLOCK") or name in ("TAPS", "HALF")]
    return ", ".join(f"{n.removeprefix('BLOCK_')} {launch.options[n]}" for n in names)


def head(launch: Launch) -> str:
    """The first cells of a kernel's row, which identify the launch."""
    name, dtype, *variant = describe(launch).removesuffix(tile(launch)).split()
    warps = f"{launch.options['num_warps']}, {launch.options.get('num_stages', '-')}"
    return f"| {name} | {dtype} | {' '.join(variant)} | {tile(launch)} | {warps} |"


def table(rows: list[tuple[Launch, dict[str, Usage]]], targets: list[str]) -> list[str]:
    """The lines of the page about compiled kernels."""
    lines = [
        "## Compiled code",
        "",
        "Each cell: registers per thread / KiB of shared memory per block / tensor-core instruction. The report fails",
        f"where a kernel spills registers in a loop, or more than {SAVED} bytes a thread outside of loops. Products of",
        "tiles under 64 rows run on `HMMA` by choice, since a warp group needs 64. A cell is empty where the GPU is",
        "given another tile. fp16 compiles as bf16 does. fp32 multiplies as three TF32 products on NVIDIA, in IEEE",
        "fp32 on AMD.",
        "",
        f"| kernel | dtype | variant | tile | warps, stages | {' | '.join(targets)} |",
        f"|---|---|---|---|---|{'---|' * len(targets)}",
    ]
    for launch, usages in rows:
        cells = [cell(usages[target]) if target in usages else "" for target in targets]
        lines.append(f"{head(launch)} {' | '.join(cells)} |")
    return lines


def cell(usage: Usage) -> str:
    if usage.error:
        return "fails"
    return f"{usage.registers} / {usage.shared / 1024:.0f} / {usage.tensor_cores or '-'}"


def page(rows: list[tuple[Launch, dict[str, Usage]]], times: list[str], targets: list[str]) -> str:
    lines = [
        "# Triton kernels, compiled ahead of time",
        "",
        f"Written by `make kernels-report` with Triton {triton.__version__}, without a GPU; nothing was timed here.",
        "",
        *times,
        "",
        *table(rows, targets),
    ]
    return "\n".join(lines) + "\n"


def missing(recorded: list[Launch]) -> list[str]:
    """The kernels that the committed page lacks, one sentence each."""
    committed = OUT.read_text(encoding="utf-8")
    return [f"{describe(k)} is not in {OUT.name}: make kernels-report" for k in recorded if head(k) not in committed]


def check() -> int:
    """Check the committed page's list of kernels, and one kernel of each name, dtype and use for sm_90."""
    recorded = kernels()
    sample = {(k.name, describe(k).split()[1], k.options.get("STREAM")): k for k in recorded if MODELLED in k.targets}
    usages = compile_all(sample.values(), [MODELLED])
    wrong = [
        fault
        for k, found in zip(sample.values(), usages, strict=True)
        for fault in faults(MODELLED, k, found[MODELLED])
    ]
    return report(f"{len(recorded)} kernels, {len(sample)} compiled", missing(recorded) + wrong)


def report(done: str, wrong: list[str]) -> int:
    """Print what was done and what is wrong; the exit code."""
    for sentence in dict.fromkeys(wrong):
        print(sentence, file=sys.stderr)
    print(f"{done}, {len(wrong)} faults")
    return 1 if wrong else 0


def main(targets: list[str]) -> int:
    if targets == ["--check"]:
        return check()
    targets = targets or list(TARGETS)
    recorded = sorted(kernels(), key=describe)
    task = f"compiling {len(recorded)} kernels for {', '.join(targets)}"
    usages = list(track(compile_all(recorded, targets), task, len(recorded)))
    rows = list(zip(recorded, usages, strict=True))
    wrong = [fault for k, found in rows for name, usage in found.items() for fault in faults(name, k, usage)]
    times: list[str] = []
    modelled = {k.variant: found[MODELLED] for k, found in rows if MODELLED in found}
    if modelled and not any(usage.error for usage in modelled.values()):
        try:
            cases = predicted.all_stages(modelled)
            wrong += predicted.faults(cases)
            times = predicted.section(cases, *predicted.measured())
        except ValueError as error:  # loops that the model does not know
            wrong.append(f"no times are predicted: {error}")
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(page(rows, times, targets), encoding="utf-8")
    print(f"wrote {OUT}")
    return report(f"{len(recorded)} kernels compiled", wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

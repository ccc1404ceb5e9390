"""`make bench-report`: the end-to-end benchmarks as data, a table and a picture in bench/results/.

    python bench/report.py [pytest-benchmark's JSON, allocator as it is] [the same, told to keep its memory]

Without arguments it runs them first (two times 10 minutes). Beside the times stand what this machine can do at most,
measured in the same minute (a product of matrices and a copy), and how near bf16 and int8 stay to fp32.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import peers
import torch
from accuracy import accuracy

from fastmimi.devtools.costs import ceilings

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TOP_PAD_": "268435456"}
GFLOP = 5.3  # per second of audio, each way
WEIGHTS_OF_A_FRAME = {"encode": 0.173, "decode": 0.161}  # GB in fp32 that a frame of a stream reads; 8 codebooks
PACKAGES = ("torch", "transformers", "moshi", "rustymimi")


def run(environment: dict[str, str], output: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "bench/bench_end_to_end.py", "--benchmark-only", "-q"]
    done = subprocess.run(
        [*command, "--benchmark-json", str(output)], cwd=ROOT, env={**os.environ, **environment}, check=False
    )
    if done.returncode:
        sys.exit("the benchmarks failed: no report")
    return json.loads(output.read_text())


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per end-to-end case: its name, our median in seconds, and the peers' as multiples of it."""
    return [
        {"case": bench["group"], **info, "seconds": info.get("own", bench["stats"]["median"])}
        for bench in result["benchmarks"]
        if "ratios" in (info := bench["extra_info"])
    ]


def of_floor(case: dict[str, Any], ceilings: dict[str, float]) -> str:
    """What a case takes at least on this machine, as a percentage of what it took; "" where no floor is known."""
    name = case["case"]
    found = re.match(r"(encode|decode) (\d+) x (\d+) (s|min)$", name)
    if found is not None:
        audio = int(found[2]) * int(found[3]) * (60 if found[4] == "min" else 1)
        return f"{audio * GFLOP / ceilings['fp32 GFLOP/s'] / case['seconds']:.0%}"
    if name.startswith("stream, 1 x"):
        return f"{WEIGHTS_OF_A_FRAME[name.split()[-1]] / ceilings['read GB/s'] / case['seconds']:.0%}"
    return ""


def commit() -> str:
    return subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}}


def version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def table(data: dict[str, Any]) -> str:
    text = [
        f"{data['processor']}, {data['threads']} threads; "
        + ", ".join(f"{value:.0f} {name}" for name, value in data["ceilings"].items())
        + "; "
        + ", ".join(f"{name} {value}" for name, value in data["versions"].items())
        + f"; commit {data['commit']}.",
        "",
        "Times of the peers are multiples of ours, medians of rounds taken in turn in one process.",
    ]
    for allocator, cases in data["allocators"].items():
        peers = sorted({name for case in cases for name in case["ratios"]})
        text += ["", f"Allocator: {allocator}.", "", f"| case | fastmimi | of the floor | {' | '.join(peers)} |"]
        text += ["|---" * (len(peers) + 3) + "|"]
        for case in sorted(cases, key=lambda case: case["case"]):
            ratios = (f"{case['ratios'][name]:.2f}" if name in case["ratios"] else "-" for name in peers)
            floor = of_floor(case, data["ceilings"])
            text.append(f"| {case['case']} | {case['seconds'] * 1e3:.1f} ms | {floor} | {' | '.join(ratios)} |")
        for case in cases:
            if "MiB" in case:
                taken = ", ".join(f"{name} {value:.0f} MiB" for name, value in case["MiB"].items())
                text += ["", f"Memory of {case['case']} over the loaded model's: {taken}."]
    text += ["", "How near to fp32, on random weights (encoding, and decoding the fp32 codes):", ""]
    text += [f"- {name}: {', '.join(_told(values))}" for name, values in data["accuracy"].items()]
    return "\n".join(text) + "\n"


def _told(values: dict[str, float]) -> list[str]:
    return [f"{what} {value:.1f}" for what, value in values.items()]


def plot(data: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = sorted(next(iter(data["allocators"].values())), key=lambda case: case["case"], reverse=True)
    peers = sorted({name for case in cases for name in case["ratios"]})
    figure, axes = pyplot.subplots(figsize=(9, 0.7 * len(cases) + 1))
    height = 0.8 / len(peers)
    for i, name in enumerate(peers):
        values = [case["ratios"].get(name, 0) for case in cases]
        axes.barh([y + (i - len(peers) / 2) * height for y in range(len(cases))], values, height, label=name)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(cases)), [case["case"] for case in cases])
    axes.set_xlabel("time as a multiple of fastmimi's in fp32 (1: as fast; more: slower)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main(arguments: list[str]) -> None:
    settings = {"as it is": {}, " ".join(f"{k}={v}" for k, v in TUNED.items()): TUNED}
    if arguments:
        taken = [rows(json.loads(Path(name).read_text())) for name in arguments]
    else:
        (ROOT / "out").mkdir(exist_ok=True)
        taken = [rows(run(env, ROOT / "out" / "bench.json")) for env in settings.values()]
    allocators = dict(zip(settings, taken, strict=False))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        near = accuracy(peers.weights(Path(folder)))
    data = {
        "processor": processor(), "threads": torch.get_num_threads(), "ceilings": ceilings(), "versions": versions(),
        "commit": commit(), "allocators": allocators, "accuracy": near,
    }  # fmt: skip
    (RESULTS / "cpu.json").write_text(json.dumps(data, indent=1) + "\n")
    (RESULTS / "cpu.md").write_text(table(data))
    plot(data, RESULTS / "cpu.png")
    print(table(data))


if __name__ == "__main__":
    main(sys.argv[1:])

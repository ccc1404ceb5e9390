"""`make bench-report`: the end-to-end benchmarks as JSON, a table and a picture in bench/results/.

    python bench/report.py [JSON of pytest-benchmark, default allocator] [JSON, allocator that keeps its memory]

Without arguments it first runs the benchmarks with each allocator setting (two times 5 minutes); the JSON of `make
bench` serves as well. The report also gives peak rates of the machine (a matrix product, a copy, a read), measured at
the same time, and the accuracy of bf16 and int8.
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
GFLOP = 5.3  # per second of audio, in each direction
WEIGHTS_OF_A_FRAME = {"encode": 0.173, "decode": 0.161}  # GB in fp32 that one frame of a stream reads, with 8 codebooks
PACKAGES = ("torch", "onnxruntime", "openvino", "transformers", "moshi", "rustymimi")
ONE_THREAD = re.compile(", 1 thread| on 1 thread")  # in the names of cases


def run(environment: dict[str, str], output: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "bench/bench_end_to_end.py", "--benchmark-only", "-q"]
    done = subprocess.run(
        [*command, "--benchmark-json", str(output)], cwd=ROOT, env={**os.environ, **environment}, check=False
    )
    if done.returncode:
        sys.exit("the benchmarks failed: no report")
    return json.loads(output.read_text())


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each end-to-end case: its name, our median in seconds, and the peers' times as multiples of it."""
    return [
        {"case": bench["group"], **info, "seconds": info.get("own", bench["stats"]["median"])}
        for bench in result["benchmarks"]
        if "bench_end_to_end" in bench["fullname"] and "ratios" in (info := bench["extra_info"])
    ]


def percent_of_roofline(case: dict[str, Any], data: dict[str, Any]) -> str:
    """The lower bound that the measured peak rates set, as a percentage of the time; "" if no bound is known."""
    name = ONE_THREAD.sub("", case["case"])
    peak = data["ceilings" if name == case["case"] else "ceilings of one thread"]
    found = re.match(r"(encode|decode) (\d+) x (\d+) (s|min)$", name)
    if found is not None:
        audio = int(found[2]) * int(found[3]) * (60 if found[4] == "min" else 1)
        return f"{audio * GFLOP / peak['fp32 GFLOP/s'] / case['seconds']:.0%}"
    if name.startswith("stream, 1 x"):
        return f"{WEIGHTS_OF_A_FRAME[name.split()[-1]] / peak['read GB/s'] / case['seconds']:.0%}"
    return ""


def ceilings_of(threads: int) -> dict[str, float]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found = ceilings()
    torch.set_num_threads(before)
    return found


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
        + f" (one thread: {data['ceilings of one thread']['fp32 GFLOP/s']:.0f} fp32 GFLOP/s); "
        + ", ".join(f"{name} {value}" for name, value in data["versions"].items())
        + f"; commit {data['commit']}.",
        "",
        "Times of the peers are multiples of ours; all are medians of alternating rounds in one process.",
    ]
    for allocator, cases in data["allocators"].items():
        peers = sorted({name for case in cases for name in case["ratios"]})
        text += ["", f"Allocator: {allocator}.", "", f"| case | fastmimi | % of roofline | {' | '.join(peers)} |"]
        text += ["|---" * (len(peers) + 3) + "|"]
        for case in sorted(cases, key=lambda case: case["case"]):
            ratios = (f"{case['ratios'][name]:.2f}" if name in case["ratios"] else "-" for name in peers)
            roofline = percent_of_roofline(case, data)
            text.append(f"| {case['case']} | {case['seconds'] * 1e3:.1f} ms | {roofline} | {' | '.join(ratios)} |")
        for case in cases:
            if "MiB" in case:
                taken = ", ".join(f"{name} {value:.0f} MiB" for name, value in case["MiB"].items())
                text += ["", f"Peak memory of {case['case']} beyond that of the loaded model: {taken}."]
    text += ["", "Accuracy relative to fp32, on random weights (encoding, and decoding the fp32 codes):", ""]
    text += [f"- {name}: {', '.join(_format(values))}" for name, values in data["accuracy"].items()]
    return "\n".join(text) + "\n"


def _format(values: dict[str, float]) -> list[str]:
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
    axes.set_xlabel("time relative to fastmimi in fp32 (above 1: slower)")
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
        accuracies = accuracy(peers.weights(Path(folder)))
    data = {
        "processor": processor(), "threads": torch.get_num_threads(), "ceilings": ceilings(),
        "ceilings of one thread": ceilings_of(1), "versions": versions(), "commit": commit(),
        "allocators": allocators, "accuracy": accuracies,
    }  # fmt: skip
    (RESULTS / "cpu.json").write_text(json.dumps(data, indent=1) + "\n")
    (RESULTS / "cpu.md").write_text(table(data))
    plot(data, RESULTS / "cpu.png")
    print(table(data))


if __name__ == "__main__":
    main(sys.argv[1:])

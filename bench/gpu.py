"""Checks and benchmarks on a GPU in one command: every kernel beside the alternatives, and the whole codec.

    python bench/gpu.py          # needs a GPU and some 8 minutes; writes bench/results/<gpu>.json, prints tables
    python bench/gpu.py --dry    # no GPU needed: checks small shapes in Triton's interpreter, measures nothing
    python bench/gpu.py --only rvq    # only the ops or cases whose names contain this; also with --dry

It runs from any folder. The package itself need not be installed, only its dependencies.

It first measures two peak rates of the GPU: memory bandwidth, by a copy, and FLOP/s, by a bf16 matrix product. Each op
is then checked against the reference in fp64 at the models' shapes; an op that fails is not timed. Times are medians of
CUDA events, with rotating inputs so that none is in the L2 cache, beside PyTorch eager, `torch.compile` of the
reference, and for attention also FlexAttention and SDPA with a dense mask. "of_ceiling" is the fraction of roofline:
the lower bound that the binding peak rate sets, divided by the measured time. Last comes the whole codec, beside
transformers' model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

BUDGET_S = 450  # after this time nothing more is measured
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
Timed = Callable[[], Any]
start = time.monotonic()
sys.path.insert(0, str(ROOT))  # this repository's package, wherever another one is installed


def median_ms(calls: list[Timed], repeats: int = 20) -> float:
    """Median time of a call in ms, rotating through `calls`, which do the same on different memory."""
    for call in calls[:2] * 2:
        call()
    torch.cuda.synchronize()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for i, (begin, end) in enumerate(events):
        begin.record()
        calls[i % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def ceilings() -> dict[str, float]:
    """Measured peak rates: bytes/s of a device copy (read + written), and FLOP/s of a bf16 matrix product."""
    pair = [torch.randn(2**28, device="cuda") for _ in range(2)]
    square = [torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    copy_ms, product_ms = (median_ms([f]) for f in (lambda: pair[0].copy_(pair[1]), lambda: square[0] @ square[1]))
    return {"copy_bytes_s": 2 * 2**30 / copy_ms * 1e3, "bf16_flops_s": 2 * 8192**3 / product_ms * 1e3}


def rotated(make: Callable[[], list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    """Copies of the inputs that fill the L2 cache three times: at least two and at most sixteen."""
    first = make()
    size = sum(t.numel() * t.element_size() for t in first)
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return [first, *([t.clone() for t in first] for _ in range(min(15, max(1, 3 * l2 // size))))]


def alternatives(workload: Any, sets: list[list[torch.Tensor]]) -> dict[str, list[Timed]]:
    """Alternative implementations of the workload by name: a list of calls, one for each set of inputs."""
    from fastmimi.runtime import dispatch

    reference = dispatch.implementation(workload.op, "reference")
    calls: dict[str, list[Timed]] = {"eager": [lambda s=s: reference(*s, **workload.options) for s in sets]}
    if sets[0][0].dtype != torch.float32 or workload.op.startswith("rvq"):
        compiled = torch.compile(reference, dynamic=False)
        calls["compile"] = [lambda s=s: compiled(*s, **workload.options) for s in sets]
    if workload.op == "window_attention":
        calls |= attention_alternatives(workload, sets)
    return calls


def attention_alternatives(workload: Any, sets: list[list[torch.Tensor]]) -> dict[str, list[Timed]]:
    """Other attention implementations, without RoPE, which they do not include: they do slightly less work."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from torch.nn.functional import scaled_dot_product_attention

    length, window = sets[0][0].shape[2], workload.options["window"]
    flex = torch.compile(flex_attention, dynamic=False)
    band = create_block_mask(lambda b, h, i, j: (j <= i) & (j > i - window), None, None, length, length)
    calls = {"flex": [lambda s=s: flex(*s[:3], block_mask=band) for s in sets]}
    if length <= 10_000:
        positions = torch.arange(length, device="cuda")
        mask = (positions[None] <= positions[:, None]) & (positions[None] > positions[:, None] - window)
        calls["sdpa, dense mask"] = [lambda s=s: scaled_dot_product_attention(*s[:3], mask) for s in sets]
    return calls


def measure(workload: Any, dtype: torch.dtype, peak: dict[str, float]) -> dict[str, Any]:
    """The result row of one op: failure or times, and the fraction of the roofline that it reaches."""
    row: dict[str, Any] = {"op": workload.op, "case": workload.name, "dtype": str(dtype)[6:]}
    row |= {"bytes": workload.bytes(dtype), "flops": workload.flops(workload.rows)}
    try:
        workload.check("triton", dtype, min(workload.rows, 24_000))
    except Exception as error:  # an op that fails is not timed; the others are
        return row | {"failed": f"{type(error).__name__}: {error}"[:500]}
    sets = rotated(lambda: workload.tensors(dtype))
    row["ms"] = median_ms([lambda s=s: workload.run("triton", s) for s in sets])
    flops_s = peak["bf16_flops_s"] / (6 if dtype == torch.float32 else 1)  # three TF32 products at half the rate
    bound = max(row["bytes"] / peak["copy_bytes_s"], row["flops"] / flops_s) * 1e3
    row["of_ceiling"] = bound / row["ms"]
    row["binds"] = "bytes" if bound == row["bytes"] / peak["copy_bytes_s"] * 1e3 else "flops"
    for name, calls in alternatives(workload, [workload.channels_first(s) for s in sets]).items():
        if time.monotonic() - start > BUDGET_S:
            break
        try:
            row[f"{name}_ms"] = median_ms(calls)
        except Exception as error:  # an alternative that cannot run here does not stop the benchmark
            row[f"{name}_failed"] = f"{type(error).__name__}: {error}"[:200]
    return row


def end_to_end(dtype: torch.dtype, batch: int) -> list[dict[str, Any]]:
    """Encode and decode 10 s beside transformers with the same weights, and one frame of streams."""
    import tempfile

    from transformers import MimiModel

    import fastmimi

    with tempfile.TemporaryDirectory() as folder:
        mimi = fastmimi.load("random:0", num_codebooks=8)
        fastmimi.save_pretrained(mimi, folder)
        peer = MimiModel.from_pretrained(folder).eval().to("cuda", dtype)
    mimi = mimi.to("cuda", dtype)  # outside inference mode, in which weights would be packed at every call
    with torch.inference_mode():
        return encode_and_decode(mimi, peer, dtype, batch)


def encode_and_decode(mimi: Any, peer: Any, dtype: torch.dtype, batch: int) -> list[dict[str, Any]]:
    audio = (torch.randn(batch, 1, 240_000, device="cuda") * 0.1).to(dtype)
    codes = mimi.encode(audio)
    rows = []
    for name, ours, theirs in (
        ("encode 10 s", lambda: mimi.encode(audio), lambda: peer.encode(audio, num_quantizers=8).audio_codes),
        ("decode 10 s", lambda: mimi.decode(codes), lambda: peer.decode(codes).audio_values),
    ):
        row = {"case": name, "batch": batch, "dtype": str(dtype)[6:]}
        row["equal_codes"] = (ours() == theirs()).float().mean().item() if "encode" in name else None
        pairs = [(median_ms([ours], 5), median_ms([theirs], 5)) for _ in range(4)]  # alternating
        row["ms"], row["transformers_ms"] = (statistics.median(p[i] for p in pairs) for i in range(2))
        rows.append(row)
    state, frame, one = mimi.new_state(batch), audio[..., : mimi.frame_size], codes[..., :1]
    for name, call in (("stream: encode a frame", lambda: mimi.encode(frame, state=state)),
                       ("stream: decode a frame", lambda: mimi.decode(one, state=state))):  # fmt: skip
        rows.append({"case": name, "batch": batch, "dtype": str(dtype)[6:], "ms": median_ms([call])})
    return rows


def table(rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("bytes", "flops")))
    cells = [[row.get(name, "") for name in names] for row in rows]
    lines = [names, *([f"{v:.3g}" if isinstance(v, float) else str(v) for v in values] for values in cells)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print("|", " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)), "|")


def workloads(only: str) -> list[Any]:
    """The workloads that Triton has a kernel for and whose op or name contains `only`."""
    from fastmimi.devtools.workloads import WORKLOADS
    from fastmimi.runtime import dispatch

    chosen = [w for w in WORKLOADS if not dispatch.is_absent(w.op, "triton") and (only in w.op or only in w.name)]
    if not chosen:
        raise SystemExit(f"--only {only!r} matches no op and no case")
    return chosen


def dry(only: str) -> int:
    """Check in Triton's interpreter; the number of failures."""
    os.environ["TRITON_INTERPRET"] = "1"
    from fastmimi.devtools.testing import patch_triton_interpreter

    patch_triton_interpreter()
    torch.set_num_threads(1)
    rows = []
    for workload in workloads(only):
        for dtype in (torch.float32, torch.bfloat16)[: 1 if workload.op.startswith("rvq") else 2]:
            row = {"op": workload.op, "case": workload.name, "dtype": str(dtype)[6:], "check": "equal"}
            try:
                workload.check("triton", dtype, min(workload.rows, 24))
            except AssertionError as error:
                row["check"] = str(error)
            rows.append(row | {"ms": "not measured"})
    table(rows)
    return sum(row["check"] != "equal" for row in rows)


def commit() -> str:
    if shutil.which("git") is None:
        return "unknown"
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    return git.stdout.strip() or "unknown"


def measured(out: Path | None, only: str) -> int:
    """Check and measure on the GPU, and write the results; the number of failures."""
    import triton

    gpu = torch.cuda.get_device_name()
    peak = ceilings()
    result: dict[str, Any] = {
        "gpu": gpu, "torch": torch.__version__, "triton": triton.__version__, "commit": commit(), "ceilings": peak,
        "ops": [], "end_to_end": [],
    }  # fmt: skip
    path = out or RESULTS / f"{gpu.lower().replace(' ', '-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"{gpu}: copy {peak['copy_bytes_s'] / 1e12:.2f} TB/s, bf16 {peak['bf16_flops_s'] / 1e12:.0f} TFLOP/s")
    with torch.device("cuda"), torch.no_grad():
        for workload in workloads(only):
            for dtype in (torch.bfloat16, torch.float32)[1 if workload.op.startswith("rvq") else 0 :]:
                result["ops"].append(measure(workload, dtype, peak))
                print(json.dumps(result["ops"][-1]), flush=True)
                path.write_text(json.dumps(result, indent=1) + "\n")  # after each op, in case of an interruption
    for dtype, batch in ((torch.bfloat16, 1), (torch.bfloat16, 32), (torch.float32, 1)):
        if time.monotonic() - start < BUDGET_S:
            try:
                result["end_to_end"] += end_to_end(dtype, batch)
            except Exception as error:  # keep the results of the ops
                result["end_to_end"].append({"batch": batch, "failed": f"{type(error).__name__}: {error}"[:500]})
            path.write_text(json.dumps(result, indent=1) + "\n")
    table(result["ops"])
    table(result["end_to_end"])
    print(f"wrote {path} after {time.monotonic() - start:.0f} s")
    return sum("failed" in row for row in result["ops"] + result["end_to_end"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dry", action="store_true", help="check in Triton's interpreter, measure nothing")
    parser.add_argument("--only", default="", metavar="TEXT", help="only ops or cases whose names contain this")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    arguments = parser.parse_args()
    if arguments.dry:
        return min(1, dry(arguments.only))
    if not torch.cuda.is_available():
        print("no GPU found: pass --dry to run the checks in Triton's interpreter", file=sys.stderr)
        return 2
    return min(1, measured(arguments.out, arguments.only))


if __name__ == "__main__":
    sys.exit(main())

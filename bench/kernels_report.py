"""Compile every Triton kernel launch of the models ahead of time: registers, spills, shared memory, tensor cores.

    python bench/kernels_report.py             # all targets, writes bench/results/kernels.md (`make kernels-report`)
    python bench/kernels_report.py sm_90       # only the checks, for one target

No GPU is needed: the launches of Mimi and of JODIO (offline, and for one frame of a stream) are recorded instead of
run, and each distinct one is compiled for each target as at its first launch there. The exit code is 1 if a kernel
spills registers, exceeds the shared memory of its target, or multiplies without tensor-core instructions, and if the
committed table lacks a kernel.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from rich.progress import track
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastmimi.kernels.triton import (
    _launch,
    causal_conv1d,
    causal_conv_transpose1d,
    resblock,
    rvq_decode,
    rvq_encode,
    transformer_layer,
    window_attention,
)
from fastmimi.models.codec import Codec
from fastmimi.models.config import JodioConfig, JodioTransformerConfig, MimiCodecConfig
from fastmimi.models.jodio import JodioModel
from fastmimi.models.mimi import Mimi
from fastmimi.runtime import tiles
from fastmimi.runtime.ops import Ops

MODULES = (
    causal_conv1d,
    causal_conv_transpose1d,
    resblock,
    rvq_decode,
    rvq_encode,
    transformer_layer,
    window_attention,
)
KERNELS = {module.__name__.rpartition(".")[2]: module for module in MODULES}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # largest shared memory of a block
TENSOR_CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
SMALL_TILES = "HMMA"  # for tiles of 16 or 32 rows, which are too short for the instructions of a warp group
WITHOUT_PRODUCTS = (
    "rvq_decode_fwd_kernel", "causal_conv_transpose1d_depthwise_kernel", "window_attention_rotate_kernel",
    "window_attention_ring_kernel",
)  # fmt: skip
OUT = Path(__file__).parent / "results" / "kernels.md"


class Launch(NamedTuple):
    """One kernel launch."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def key(self) -> tuple[Any, ...]:
        """What Triton specializes a kernel for: dtypes, divisibility by 16, arguments that are 1, and constants."""
        parameters = zip(self.args, self.kernel.params, strict=False)
        kinds = [
            str(a.dtype) if isinstance(a, torch.Tensor) else p.do_not_specialize or (a == 1, a % 16 == 0)
            for a, p in parameters
        ]
        return (self.kernel.__name__, *map(str, kinds), str(sorted(self.options.items())))


class Usage(NamedTuple):
    """Resources of a compiled kernel."""

    registers: int  # per thread
    spilled: int  # bytes per thread
    shared: int  # bytes per block
    tensor_cores: str  # the tensor-core instruction, or ""


class AbsentGPU:
    """A Triton driver for a GPU that the machine does not have."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target.arch)  # Triton caches compiled kernels by device

    def get_current_stream(self, device: Any) -> int:
        return 0


def launches() -> list[Launch]:
    """The distinct kernel launches of the models."""
    recorded: dict[tuple[Any, ...], Launch] = {}

    def record(op: str, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        launch = Launch(kernel, grid, args, options)
        recorded.setdefault(launch.key, launch)

    _launch.launch = record
    kernels = {op: getattr(module, op) for op, module in KERNELS.items()}
    kernels["transformer_layer"] = _without_dropout
    ops = Ops(**kernels)
    for dtype in (torch.float32, torch.bfloat16):
        few_layers = JodioTransformerConfig(num_hidden_layers=1)  # all layers launch the same kernels
        for model in (Mimi(MimiCodecConfig()), JodioModel(JodioConfig(encoder_transformer=few_layers))):
            _run(model.to(dtype).eval(), ops)
        _run_other_shapes(dtype)
    return list(recorded.values())


def _without_dropout(*tensors: Any, dropout: float = 0.0, residual_dropout: float = 0.0, **options: Any) -> Any:
    return transformer_layer.transformer_layer(*tensors, **options)


@torch.no_grad()
def _run(model: Codec, ops: Ops) -> None:
    audio = torch.zeros(1, 1, 96_000, dtype=model.dtype)
    codes = torch.zeros(1, model.total_codebooks, 50, dtype=torch.int64)
    whole = mock.patch.object(tiles.Tiling, "positions_per_subtile", return_value=None)  # no subtiles, as on a GPU
    with whole, mock.patch.object(Codec, "ops", ops):
        model.encode(audio)
        model.decode(codes)
        for batch, frames in ((1, 1), (32, 1), (2, 25)):
            state = model.new_state(batch)
            model.encode(audio[..., : 1920 * frames].expand(batch, -1, -1), state=state)
            model.decode(codes[..., :frames].expand(batch, -1, -1), state=state)


def _run_other_shapes(dtype: torch.dtype) -> None:
    for dim in (16, 128):
        q = torch.zeros(1, 250, 4, dim, dtype=dtype).transpose(1, 2)
        window_attention.window_attention(q, q, q, torch.zeros(dim // 2), window=250)
    for dim in (256, 1028):
        rvq_encode.rvq_encode(torch.zeros(1000, dim, dtype=dtype), torch.zeros(2, 2048, dim))
    vector, square, tall = (torch.zeros(*shape, dtype=dtype) for shape in ((512,), (512, 512), (2048, 512)))
    transformer_layer.transformer_layer(
        torch.zeros(1, 300, 512, dtype=dtype), vector, vector, *[square] * 4, vector, vector, vector,
        tall, tall.t().contiguous(), vector, torch.zeros(32), window=250, eps=1e-5,
    )  # fmt: skip


def compile_for(name: str, launch: Launch) -> Usage:
    target = TARGETS[name]
    options = _launch.for_amd(launch.options) if target.backend == "hip" else launch.options
    driver.set_active(AbsentGPU(target))
    compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **options)
    shared = compiled.metadata.shared
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.{n}:\s+(\d+)", text)[1]) for n in ("vgpr_count", "vgpr_spill_count"))
        return Usage(registers, spilled * 4, shared, "v_mfma" if "v_mfma" in text else "")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        resources, code = (_cuobjdump(flag, file.name) for flag in ("-res-usage", "-sass"))
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", resources).groups())
    found = re.search(r"\b(HGMMA|UTCHMMA|HMMA)\b", code)
    return Usage(registers, stack, shared, found[1] if found else "")


def _cuobjdump(flag: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, flag, path], capture_output=True, text=True, check=True).stdout


def faults(name: str, launch: Launch, usage: Usage) -> Iterator[str]:
    """What is wrong with a compiled kernel, one sentence each."""
    where = f"{describe(launch)} for {name}"
    if usage.spilled:
        yield f"{where} spills {usage.spilled} bytes per thread"
    if usage.shared > SHARED_KIB[name] * 1024:
        yield f"{where} needs {usage.shared} bytes of shared memory, more than {SHARED_KIB[name]} KiB"
    if multiplies(launch) and usage.tensor_cores not in (TENSOR_CORES[name], SMALL_TILES):
        yield f"{where} uses {usage.tensor_cores or 'no tensor-core instruction'}, not {TENSOR_CORES[name]}"
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
    for name, value in options.items():
        if name in ("PRE", "POST", "MODE") and value not in ("none", "constant"):
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


def table(rows: list[tuple[Launch, dict[str, Usage]]], targets: list[str]) -> str:
    lines = [
        "# Triton kernels, compiled ahead of time",
        "",
        f"Written by `make kernels-report` with Triton {triton.__version__}, without a GPU; nothing was timed here.",
        "Each cell: registers per thread / KiB of shared memory per block / tensor-core instruction. No kernel spills",
        "registers: the report fails where one does. Products of tiles under 64 rows run on `HMMA` by choice, since a",
        "warp group needs 64. fp16 compiles as bf16 does. fp32 multiplies as three TF32 products on NVIDIA, in IEEE",
        "fp32 on AMD.",
        "",
        f"| kernel | dtype | variant | tile | warps, stages | {' | '.join(targets)} |",
        f"|---|---|---|---|---|{'---|' * len(targets)}",
    ]
    for launch, usages in rows:
        cells = [
            f"{u.registers} / {u.shared / 1024:.0f} / {u.tensor_cores or '-'}" for u in (usages[t] for t in targets)
        ]
        lines.append(f"{head(launch)} {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(targets: list[str]) -> int:
    recorded = sorted(launches(), key=lambda launch: describe(launch))
    rows, wrong = [], []
    for launch in track(recorded, f"compiling {len(recorded)} kernels for {', '.join(targets or TARGETS)}"):
        usages = {name: compile_for(name, launch) for name in targets or TARGETS}
        rows.append((launch, usages))
        wrong += [fault for name, usage in usages.items() for fault in faults(name, launch, usage)]
    if targets:
        committed = OUT.read_text(encoding="utf-8")
        wrong += [
            f"{describe(k)} is not in {OUT.name}: make kernels-report" for k in recorded if head(k) not in committed
        ]
    for sentence in dict.fromkeys(wrong):
        print(sentence, file=sys.stderr)
    if not targets and not wrong:
        OUT.parent.mkdir(exist_ok=True)
        OUT.write_text(table(rows, list(TARGETS)), encoding="utf-8")
        print(f"wrote {OUT}")
    print(f"{len(recorded)} kernels compiled, {len(wrong)} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Every kernel launch of the models compiles ahead of time, without a GPU: no spills, page up to date, loops known."""

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import sass
import torch
from packaging.version import Version

TRITON = Version(version("triton")) if importlib.util.find_spec("triton") is not None else Version("0")
FREE_OF_SPILLS = Version("3.6") <= TRITON < Version("3.9")
BENCH = Path(__file__).resolve().parents[2] / "bench"
REPORT = BENCH / "kernels_report.py"
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="ptxas and cuobjdump come with Triton for Linux")

KERNEL = """
import json
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def product(p_x, p_w, p_y, K, steps):
    i = tl.arange(0, 64)
    acc = tl.zeros([64, 64], dtype=tl.float32)
    for step in range(steps):
        for k in range(0, K, 32):
            j = k + tl.arange(0, 32)
            x = tl.load(p_x + step * 64 * K + i[:, None] * K + j[None, :])
            acc = tl.dot(x, tl.load(p_w + j[:, None] * 64 + i[None, :]), acc)
        tl.store(p_y + step * 4096 + i[:, None] * 64 + i[None, :], acc)


if __name__ == "__main__":
    from compiled import Job, compile_for

    bf16 = torch.bfloat16
    job = Job("product", "product", (bf16, bf16, torch.float32, 256, 1000), {"num_warps": 4})
    top = compile_for(job, ["sm_90"])["sm_90"].program
    print(json.dumps([[len(loop.inner), loop.counts] for loop in (top, *top.all_inner())]))
"""


def without_interpreter(*command):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(BENCH), str(BENCH.parent)])
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)


@pytest.mark.kernels
@pytest.mark.slow
@ON_LINUX
@pytest.mark.skipif(not FREE_OF_SPILLS, reason="Triton 3.4 and 3.9 spill 8 to 24 bytes in some kernels")
def test_the_page_lists_every_launch_and_some_compile_without_spills():
    """`make kernels-report` compiles all of them, for all GPUs, which takes too long here."""
    run = without_interpreter(REPORT, "--check")
    assert run.returncode == 0, run.stderr[-3000:]
    assert "0 faults" in run.stdout
    table = REPORT.with_name("results") / "kernels.md"
    rows = sum(line.startswith("| ") and "_kernel |" in line for line in table.read_text().splitlines())
    assert f"{rows} kernels, " in run.stdout, "make kernels-report: the set of launches has changed"


@ON_LINUX
@pytest.mark.slow
@pytest.mark.skipif(Version("3.6") > TRITON, reason="the model is of the code of Triton 3.6 and later")
def test_loops_and_instructions_of_a_small_kernel(tmp_path):
    (tmp_path / "product.py").write_text(KERNEL)
    run = without_interpreter(tmp_path / "product.py")
    assert run.returncode == 0, run.stderr[-3000:]
    (tops, _), (outer_loops, outer), (inner_loops, inner) = json.loads(run.stdout)
    assert (tops, outer_loops, inner_loops) == (1, 1, 0)
    assert inner["flops"] * 4 == 2 * 64 * 64 * 32  # of four warps
    assert "flops" not in outer
    assert outer["written"] * 4 == 64 * 64 * 4
    assert inner["read"] * 4 == 64 * 32 * 2 * 2
    assert inner["issue"] > 8


def listing(*lines):
    return "\n".join(f"        /*{16 * i:04x}*/   {line} ;   /* 0x0 */" for i, line in enumerate(lines))


def test_a_jump_back_to_code_that_does_not_dominate_it_is_no_loop():
    out_of_line = listing(
        "MOV R0, R1",
        "@P0 BRA 0x50",  # moved behind the end
        "FADD R0, R0, R0",
        "EXIT",
        "NOP",
        "MUFU.RCP R1, R1",
        "BRA 0x20",
        "BRA 0x70",  # ends every program
    )
    top = sass.program(out_of_line)
    assert not top.inner
    assert top.counts["issue"] == 6  # neither NOP nor what is not reached
    assert top.counts["xu"] == 1


def test_loops_in_loops_and_their_conditional_blocks():
    nested = listing(
        "S2R R0, SR_TID.X",
        "LDG.E.128 R4, [R2.64]",  # 0x10: the outer loop
        "LDGSTS.E.BYPASS.64 [R1], [R2.64]",  # 0x20: the inner loop
        "@P1 BRA 0x50",
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4]",
        "ISETP.GE.AND P0, PT, R0, R1, PT",
        "@!P0 BRA 0x20",
        "STG.E.U16 [R2.64], R4",
        "BRA P2, 0x10",
        "EXIT",
    )
    top = sass.program(nested)
    (outer,) = top.inner
    (inner,) = outer.inner
    assert (outer.head, inner.head) == (0x10, 0x20)
    assert (top.counts["issue"], outer.counts["issue"], inner.counts["issue"]) == (2, 3, 5)
    assert (outer.counts["load"], outer.counts["read"], outer.counts["written"]) == (1, 512, 64)
    assert (inner.counts["async"], inner.counts["read"]) == (1, 256)
    assert inner.counts["flops"] == 2 * 64 * 128 * 16 // 4


def test_bytes_that_are_saved_outside_of_loops_are_no_spill():
    compiled = pytest.importorskip("compiled", reason="there is no Triton for this platform")
    lines = ["MOV R0, R1", "LDG.E R4, [R2.64]", "@P0 BRA 0x10", "EXIT"]
    outside = sass.program(listing("STL [R1], R0", *lines))
    inside = sass.program(listing(lines[0], "STL [R1], R0", *lines[1:]))
    assert compiled._spilled(24, outside) == 0
    assert compiled._spilled(24, inside) == 24
    assert compiled._spilled(100, outside) == 100


@pytest.fixture
def launch():
    """A launch of the RVQ decoder on 264 rows, as recorded, and a program with one load in its loop."""
    cost_model = pytest.importorskip("cost_model", reason="there is no Triton for this platform")
    from compiled import Usage
    from recorded import Launch

    kernel = SimpleNamespace(__name__="rvq_decode_fwd_kernel", arg_names=["p_books", "p_y", "N", "L", "D"])
    books, y = torch.empty(8, 2048, 256, device="meta"), torch.empty(264, 256, device="meta")
    program = sass.program(listing("MOV R0, R1", "LDG.E.128 R4, [R2.64]", "@P0 BRA 0x10", "STG.E.128 [R2], R4", "EXIT"))
    usage = Usage(registers=64, spilled=0, shared=0, tensor_cores="", program=program)
    return cost_model, Launch(kernel, (264,), (books, y, 264, 8, 256), {"num_warps": 4}), usage


def test_bounds_of_a_launch(launch):
    cost_model, launch, usage = launch
    found = cost_model.predict(launch, usage)
    assert found.units == pytest.approx(2 * 4 * (3 + 8 * 2) * 32 / 128 / 1.755e9)  # two programs of four warps an SM
    assert found.memory == pytest.approx(4 * 256 * (8 * 264 + 264) / 3.0e12)  # the chosen entries, and the result
    assert found.l2 == pytest.approx(264 * 4 * 512 * (8 + 1) / 5.5e12)
    assert found.latency == pytest.approx(8 * 600e-9 + 3 * 2 / 1.755e9)
    assert found.total == pytest.approx(2.5e-6 + found.latency)
    assert found.bound == "latency"


def test_another_number_of_loops_than_the_model_says_is_an_error(launch):
    cost_model, launch, usage = launch
    straight = usage._replace(program=sass.program(listing("MOV R0, R1", "EXIT")))
    with pytest.raises(ValueError, match="has 0 loops in compiled code, LOOPS gives 1"):
        cost_model.predict(launch, straight)


def test_phases_of_a_launch():
    """Each as a launch of its own, without its 2.5 us; between them, all wait 1.5 us."""
    cost_model = pytest.importorskip("cost_model", reason="there is no Triton for this platform")
    from compiled import Usage
    from recorded import Case, mimi, of_case

    model = mimi()
    layer = next(k for k in of_case(model, Case("encode", 1, "stream")).launches if k.stage == "transformer")
    lines = ["MOV R0, R1"]
    for _ in range(5):
        tile, inner, wait = (f"0x{16 * (len(lines) + i):x}" for i in (0, 1, 4))
        lines += ["MOV R2, R1", "HMMA.16816.F32.BF16 R4, R4, R8, R4", f"@P0 BRA {inner}", f"@P1 BRA {tile}"]
        lines += ["LDG.E.STRONG.GPU R10, [R2.64]", f"@P0 BRA {wait}"]
    usage = Usage(128, 0, 0, "HMMA", sass.program(listing(*lines, "EXIT")))
    found = cost_model.phases(layer, usage.program)
    assert [phase.programs for phase in found] == [96, 8, 32, 128, 32]  # tiles
    assert [[times for _, times in phase.loops] for phase in found] == [[1, 2], [1, 2], [1, 2], [1, 2], [1, 8]]
    rows, square = 2 * 512 * 2, 512 * 512 * 2
    assert found[0].bytes == 3 * square + 4 * rows
    assert found[1].bytes == 2 * 250 * 512 * 2 + 4 * rows
    assert [phase.bytes for phase in found[2:]] == [square + 3 * rows, 4 * square + 5 * rows, 4 * square + 5 * rows]
    each = [max(cost_model._bounds(phase, layer.options, 128)) for phase in found]
    assert cost_model.predict(layer, usage).total == pytest.approx(2.5e-6 + 4 * 1.5e-6 + sum(each))
    with pytest.raises(ValueError, match="has 0 phases in compiled code, PHASES gives 5"):
        cost_model.phases(layer, sass.program(listing("MOV R0, R1", "EXIT")))


def test_stages_of_a_recorded_frame():
    recorded = pytest.importorskip("recorded", reason="there is no Triton for this platform")
    found = recorded.of_case(recorded.mimi(), recorded.Case("encode", 1, "stream"))
    stages = list(dict.fromkeys(launch.stage for launch in found.launches if launch.stage != "between ops"))
    assert stages == [
        "conv 1 to 64", "residual unit 64", "down 4", "residual unit 128", "down 5", "residual unit 256", "down 6",
        "residual unit 512", "down 8", "conv 1024 to 512", "transformer", "down 2", "conv 512 to 256", "RVQ search",
    ]  # fmt: skip
    layers = found.needs["transformer"]
    weights, rings = (4 * 512 * 512 + 2 * 512 * 2048) * 2, 2 * 250 * 512 * 2
    assert len(layers) == 8
    assert all(weights + rings < read < 1.01 * (weights + rings) for read, _ in layers)


def test_the_page_compares_with_what_was_measured(tmp_path):
    predicted = pytest.importorskip("predicted", reason="there is no Triton for this platform")
    stage = predicted.Stage("down 4", 1, 0.001, predicted.cost_model.Prediction(0.002, 0, 0, 0, 0, 0.002))
    cases = [(predicted.CASES[0], [stage])]
    page = predicted.section(cases, *predicted.measured(tmp_path))
    assert "| down 4 | 1 | 1.000 | 2.000 | units | - | - |" in page
    assert any("Nothing has been measured yet" in line for line in page)
    times = {"encode 64 x 10 s, whole": 4.0, "encode 64 x 10 s, whole: down 4": 1.6}
    (tmp_path / "gpu-h100.json").write_text(json.dumps({"gpu": "NVIDIA H100", "ms": times}))
    page = predicted.section(cases, *predicted.measured(tmp_path))
    assert "| down 4 | 1 | 1.000 | 2.000 | units | 1.600 | +25% |" in page
    assert "| encode 64 x 10 s, whole | 1 | 1.000 | 16 | 2.000 | 4.000 | -50% | 320,000 |" in page
    assert any("Measured times are of NVIDIA H100" in line for line in page)


def test_a_stage_faster_than_its_floor_is_a_fault():
    predicted = pytest.importorskip("predicted", reason="there is no Triton for this platform")
    stage = predicted.Stage("down 4", 1, 0.003, predicted.cost_model.Prediction(0.002, 0, 0, 0, 0, 0.002))
    (fault,) = predicted.faults([(predicted.CASES[0], [stage])])
    assert "down 4 is predicted to take 2.000 ms, less than its floor of 3.000 ms" in fault


def test_a_loop_that_waits_for_a_barrier_is_no_loop():
    waiting = listing("MOV R0, R1", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1], R0", "@!P0 BRA 0x10", "EXIT")
    top = sass.program(waiting)
    assert not top.inner
    assert top.counts["issue"] == 4


@pytest.mark.parametrize(
    "name, flops",
    [
        ("HMMA.16816.F32.BF16", 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 2 * 2 * 16 * 8 * 8),  # TF32 takes twice as long
        ("HGMMA.64x64x8.F32.TF32", 2 * 2 * 64 * 64 * 8 // 4),
    ],
)
def test_flops_of_tensor_core_instructions(name, flops):
    assert sass.counts(name)["flops"] == flops
    assert sass.counts(name)["hmma"] == (flops if name.startswith("HMMA") else 0)

"""bench/gpu.py without a GPU: dry runs from another folder, budgets, runs that are killed, fail or hang, and timers."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import gpu_calls
import gpu_correct
import gpu_report
import gpu_timing
import pytest
import torch

from fastmimi.devtools.testing import noise, small_model
from fastmimi.reference.causal_conv1d import causal_conv1d
from fastmimi.reference.resblock import resblock
from fastmimi.runtime import dispatch, packing
from fastmimi.runtime.ops import OPS, Ops

BENCH = Path(gpu_report.__file__).parent
MINUTES_3 = 180


def command(*arguments, **environment):
    """A process of bench/gpu.py's interpreter in an environment without git and without settings of this one."""
    kept = {"PATH": "/nowhere", **environment}
    return {"args": [sys.executable, *map(str, arguments)], "env": kept, "text": True, "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT}  # fmt: skip


def dry(tmp_path, name, *arguments):
    """The report of a dry run that starts in another folder."""
    out = tmp_path / f"{name}.json"
    done = subprocess.run(**command(BENCH / "gpu.py", name, "--dry", "--out", out, *arguments), cwd=tmp_path)
    return done, json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.kernels
@pytest.mark.parametrize("name, only, wanted", [
    ("correct", "launches, float32, 2 x 2", {"op": "resblock", "phase": "first", "of": "result", "ok": True}),
    ("models", "offline", {"way": "decode", "who": "fastmimi", "packed_again": 0}),
    ("ops", "resblock", {"op": "resblock", "who": "cuDNN, two convolutions alone"}),
])  # fmt: skip
def test_dry_runs_measure_nothing(tmp_path, name, only, wanted):
    done, report = dry(tmp_path, name, "--only", only)
    assert done.returncode == 0, done.stdout
    assert report["dry"] and report["finished"] and report["command"] == name
    assert report["machine"]["commit"] is None  # there is no git
    assert any(wanted.items() <= row.items() for row in report["rows"]), report["rows"]
    numbers = {key for row in report["rows"] for key, value in row.items() if isinstance(value, float)}
    assert numbers <= {"error", "plain_error", "bound", "flops"}
    assert not report["step_seconds"] and all(row.get("measured") is not True for row in report["rows"])


@pytest.mark.slow
@pytest.mark.kernels
def test_kernels_are_compiled_in_processes(tmp_path):
    done, report = dry(tmp_path, "ops", "--only", "compile")
    assert done.returncode == 0, done.stdout
    row = report["rows"][0]
    assert row["ok"] and row["compiled"] == row["jobs"] == 3 and row["left"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["correct", "models", "ops"])
def test_after_the_budget_nothing_starts(tmp_path, name):
    done, report = dry(tmp_path, name, "--budget", "-1")
    assert done.returncode == 0, done.stdout
    assert report["rows"] == [] and report["done"] == [] and report["finished"]
    assert report["skipped"][0] == "compile" and len(report["skipped"]) > 5


@pytest.mark.slow
def test_bad_usage(tmp_path):
    done = subprocess.run(**command(BENCH / "gpu.py", "ops", "--dry", "--only", "nothing", "--out", tmp_path))
    assert done.returncode == 1 and "'nothing' matches no step" in done.stdout
    if not torch.cuda.is_available():
        done = subprocess.run(**command(BENCH / "gpu.py", "ops", "--out", tmp_path))
        assert done.returncode == 2 and "no GPU found" in done.stdout


STEPS = """
import sys, time
sys.path.insert(0, {bench!r})
import gpu_report
gpu_report.HANGS_AFTER_S = 1.5
again = "--resume" in sys.argv
make = gpu_report.Report.resume if again else gpu_report.Report
report = make(gpu_report.Path({out!r}), "test", False, 60)

def good(): yield {{"ok": True, "again": again}}
def bad(): yield {{"ok": True}}; raise ValueError("wrong")
def fatal(): yield from good(); raise RuntimeError("CUDA error: an illegal memory access was encountered")
def hangs(): yield from good(); time.sleep(60)
def goes_on():
    for check in "abc":
        if report.known_before(check=check) is None:
            error = {{"error_text": "CUDA error: x"}} if check == "b" else {{}}
            yield {{"check": check, "ok": not error, "again": again, "resumable": True, **error}}

functions = {{f.__name__: f for f in (good, bad, fatal, hangs, goes_on)}}
names = {names!r}
report.run([gpu_report.Step(f"{{i}} {{name}}", functions[name]) for i, name in enumerate(names)])
"""


def script(tmp_path, *names):
    path = tmp_path / "steps.py"
    path.write_text(STEPS.format(bench=str(BENCH), out=str(tmp_path / "out.json"), names=names))
    return path


@pytest.mark.slow
def test_a_step_that_fails_ends_neither_the_run_nor_the_report(tmp_path):
    """An exception is a row; after an error of the CUDA context or a hang another process goes on."""
    path = script(tmp_path, "bad", "fatal", "good", "hangs", "good", "goes_on")
    done = subprocess.run(**command(path), timeout=MINUTES_3)
    assert done.returncode == 0, done.stdout
    report = json.loads((tmp_path / "out.json").read_text())
    rows = [(row["step"], row["ok"], row.get("again"), row.get("error_text", "")[:18]) for row in report["rows"]]
    assert rows == [
        ("0 bad", True, None, ""), ("0 bad", False, None, "ValueError: wrong"),
        ("1 fatal", True, False, ""), ("1 fatal", False, None, "RuntimeError: CUDA"),
        ("2 good", True, True, ""),
        ("3 hangs", True, True, ""), ("3 hangs", False, None, "nothing happened f"),
        ("4 good", True, True, ""),
        ("5 goes_on", True, True, ""), ("5 goes_on", False, True, "CUDA error: x"), ("5 goes_on", True, True, ""),
    ]  # fmt: skip
    assert report["finished"] and len(report["done"]) == 6


@pytest.mark.slow
def test_a_killed_run_leaves_what_it_had(tmp_path):
    process = subprocess.Popen(**command(script(tmp_path, "good", "bad", "hangs")))
    out, until = tmp_path / "out.json", time.monotonic() + MINUTES_3
    report = {"running": None}
    try:
        while report["running"] != "2 hangs" and time.monotonic() < until:
            with suppress(FileNotFoundError):
                report = json.loads(out.read_text())  # valid at every moment
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    report = json.loads(out.read_text())
    assert not report["finished"] and report["running"] == "2 hangs" and report["done"] == ["0 good", "1 bad"]
    assert len(report["rows"]) >= 3


def test_numbers_that_json_lacks_become_text(tmp_path):
    report = gpu_report.Report(tmp_path / "new" / "out.json", "test", True, 60)
    report.add({"error": float("nan"), "ok": False})
    text = report.path.read_text()
    assert json.loads(text, parse_constant=pytest.fail)["rows"] == [{"error": "nan", "ok": False}]


def test_the_commit_is_unknown_without_git():
    with mock.patch.dict(os.environ, {"PATH": "/nowhere"}):
        assert gpu_report.commit() is None and gpu_report.clocks() is None


# Checks of launches


def resblock_rows(tmp_path, function):
    """The rows of a call of a residual unit in streams."""
    report = gpu_report.Report(tmp_path / "out.json", "test", True, 60)
    x, history = noise(2, 8, 5), noise(2, 2, 8)
    weights = [noise(*shape, seed=i) for i, shape in enumerate([(4, 8, 3), (4,), (8, 4, 1), (8,)])]
    call = gpu_correct.checked(report, "step", set(), "first", "resblock", function)
    state = {"history": history, "first": torch.zeros(2, dtype=torch.bool), "active": torch.tensor([True, False])}
    y = call(x, *weights, pad=(2, 0), **state)
    assert y.shape == x.shape
    return [{"op": row["op"], "of": row.get("of"), "ok": row["ok"]} for row in report.rows]


def test_a_right_launch_is_accepted(tmp_path):
    rows = resblock_rows(tmp_path, resblock)
    assert rows == [{"op": "resblock", "of": of, "ok": True} for of in ("result", "history")]


def test_a_wrong_result_a_wrong_history_and_an_exception_are_found(tmp_path):
    def wrong(*tensors, **options):
        return resblock(*tensors, **options) * 1.0001

    def forgetful(*tensors, history, **options):
        return resblock(*tensors, history=history.clone(), **options)

    def broken(*tensors, **options):
        raise RuntimeError("out of resources")

    assert [row["ok"] for row in resblock_rows(tmp_path, wrong)] == [False, True]
    assert [row["ok"] for row in resblock_rows(tmp_path, forgetful)] == [True, False]
    assert resblock_rows(tmp_path, broken) == [{"op": "resblock", "of": None, "ok": False}]


def test_calls_that_read_alike_are_both_checked(tmp_path):
    """With and without a bias, say; but each of them once."""
    report, seen = gpu_report.Report(tmp_path / "out.json", "test", True, 60), set()
    call = gpu_correct.checked(report, "step", seen, "first", "causal_conv1d", causal_conv1d)
    x, weight = noise(1, 4, 9), noise(5, 4, 3)
    for bias in (None, noise(5), noise(5, seed=1)):
        call(x, weight, bias, pad=(2, 0))
    assert len(report.rows) == 2 and report.rows[0]["check"] == report.rows[1]["check"]


@pytest.mark.parametrize("stream", [False, True])
def test_recorded_calls_are_those_of_the_model(stream):
    """Made again on random tensors, each gives a result of the shape that the model got."""
    model = small_model(upsampling_ratios=[4, 3, 2], frame_rate=500)
    model.impl = "reference"
    with mock.patch.object(gpu_calls, "ops_with", wrapped_references):
        calls = gpu_calls.recorded(model, gpu_calls.Pass("", 2, 3, stream).run)
    inside = {"window_attention", *(["audio_resblock"] if stream else [])}  # of a layer; of streams, two ops
    assert {call.op for call in calls} == set(OPS) - inside
    assert sum(count for call, count in calls.items() if call.op == "transformer_layer") == 4  # two each way
    for call in calls:
        y = call.run(dispatch.implementation(call.op, "reference"), call.make("cpu"))
        assert y.shape == call.result().shape and y.dtype == call.result().dtype, str(call)
        assert call.flops() > 0
        assert call.streams == (stream and any(name in ("history", "cache_k") for name, _ in call.tensors))


def wrapped_references(wrap, device, dtype):
    return Ops(**{op: wrap(op, dispatch.implementation(op, "reference")) for op in OPS})


# Timers, on a GPU that is made up: each call takes as long as it says, the host none


class MadeUp:
    """A clock that calls advance, and what torch.cuda offers to read it."""

    def __init__(self):
        self.now = 0.0
        self.recording = None
        self.launched = []

    def call(self, ms):
        def run():
            if self.recording is not None:
                self.recording.append(ms)
            else:
                self.now += ms

        return run

    @contextmanager
    def graph(self, graph):
        self.recording = graph.calls
        yield
        self.recording = None

    def cuda(self):
        clock = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = clock.now

            def synchronize(self):
                pass

            def elapsed_time(self, other):
                return other.at - self.at

        class Graph:
            def __init__(self):
                self.calls = []

            def replay(self):
                clock.now += sum(self.calls)

        return mock.patch.multiple(
            torch.cuda, Event=Event, CUDAGraph=Graph, graph=self.graph, synchronize=lambda: None,
            _sleep=lambda cycles: None, get_sync_debug_mode=lambda: 0, set_sync_debug_mode=lambda mode: None,
            stream=nullcontext, current_stream=lambda: None,
        )  # fmt: skip


def test_kernels_are_timed_in_graphs():
    gpu = MadeUp()
    with gpu.cuda():
        row = gpu_timing.Timer().kernels([gpu.call(0.25), gpu.call(0.75)])
        assert row["ms"] == pytest.approx(0.5) and row["timed_by"] == "graph" and row["measured"]
        row = gpu_timing.Timer().kernels([gpu.call(80.0)])
        assert row["ms"] == pytest.approx(80.0)


def test_calls_that_pack_weights_are_not_timed_in_graphs():
    gpu = MadeUp()

    def packs():
        packing.count_preparation()
        gpu.call(0.5)()

    with gpu.cuda():
        row = gpu_timing.Timer().kernels([packs])
    assert row["ms"] == pytest.approx(0.5) and row["timed_by"].startswith("queue, no graph: weights are packed")


def test_frames_and_long_calls():
    gpu = MadeUp()
    with gpu.cuda():
        row = gpu_timing.Timer().frames(gpu.call(2.0), repeats=50)
        assert row["gpu_ms"] == pytest.approx(2.0) and row["frames"] == 50
        assert 0 < row["wall_ms_p50"] <= row["wall_ms_p99"]
        assert gpu_timing.Timer().whole(gpu.call(30.0))["gpu_ms"] == pytest.approx(30.0)


def test_inputs_rotate_until_they_exceed_the_cache():
    tensors = [torch.zeros(1 << 10), torch.zeros(1 << 10).view(32, 32).t()]  # 8 KiB
    sets = gpu_timing.rotated(tensors, 16 << 10)
    assert len(sets) == 7 and sets[6][1].stride() == (1, 32)
    assert len(gpu_timing.rotated(tensors, 1 << 30)) == gpu_timing.MOST_SETS


def test_the_bound_is_that_of_the_binding_peak(tmp_path):
    import gpu_ops

    report = SimpleNamespace(known=lambda **_: {"copy_bytes_s": 1e12, "bf16_flops_s": 1e14, "tf32_flops_s": 6e13})
    row = {"ms": 4.0, "bytes": 2e9, "flops": 1e11}
    assert gpu_ops.bound_of(report, row, torch.bfloat16)["of_roofline"] == pytest.approx(0.5)  # 2 ms of bytes
    found = gpu_ops.bound_of(report, row, torch.float32)
    assert found["of_roofline"] == pytest.approx(1.25) and found["binds"] == "flops"  # 5 ms at a third of 6e13

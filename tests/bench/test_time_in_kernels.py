"""bench/time_in_kernels.py: the time of kernels and of Python adds up to that of the pass, and recorded steps count."""

import sys
import time

import pytest
import time_in_kernels
import torch

import fastmimi
from fastmimi.devtools.testing import noise
from fastmimi.kernels.cpu import _native

pytestmark = pytest.mark.skipif(not _native.variants(), reason="the native library is not built here")


@pytest.fixture
def stopwatch(monkeypatch):
    """A stopwatch of a variant that no other test uses, with passes of 0.1 s."""
    variant = _native.Variant(_native._load()[0], _native.variants()[0])
    monkeypatch.setattr(time_in_kernels, "native", lambda: variant)
    monkeypatch.setattr(_native, "_variant", lambda _: variant)
    monkeypatch.setattr(time_in_kernels, "SECONDS", 0.1)
    threads = torch.get_num_threads()
    yield time_in_kernels.Stopwatch()
    torch.set_num_threads(threads)


def test_times_add_up(stopwatch):
    mimi = fastmimi.load("demo")
    state = mimi.new_state()
    mimi.warm_up(state)

    def call():
        time.sleep(0.005)
        mimi.encode(noise(1, 1, 1920), state=state)

    row = time_in_kernels.measure(stopwatch, call)
    parts = [row.pop(name) for name in ("a recorded step", "Python")]
    assert row.pop("in all") == pytest.approx(sum(parts), rel=0.2)
    assert parts[0] > 0 and parts[1] > 5 and row.keys() == {"page faults"}
    offline = time_in_kernels.measure(stopwatch, lambda: mimi.encode(noise(1, 1, 3840)))
    assert {"conv", "resblock", "layer", "rvq_encode", "Python"} < offline.keys()


def test_the_table_has_a_row_for_each_pass(stopwatch, monkeypatch, capsys):
    monkeypatch.setattr(time_in_kernels, "Stopwatch", lambda: stopwatch)
    monkeypatch.setattr(time_in_kernels, "MODEL", "demo")
    monkeypatch.setattr(sys, "argv", ["", "--threads", "1", "--seconds", "0.3", "--dtype", "float32"])
    time_in_kernels.main()
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.startswith("| |in all|conv|") and header.endswith("|Python|page faults|")
    assert [row.split("|")[1].strip().removesuffix(", float32, threads: 1") for row in rows] == [
        "encode 0.3 s", "decode 0.3 s", "encode a frame", "decode a frame",
    ]  # fmt: skip
    assert all(row.count("|") == header.count("|") for row in rows)

"""Memory of streams, and the measured number of streams that a machine sustains."""

import pytest

from fastmimi import InputError
from fastmimi.serve import sizing


def test_memory(model):
    both, one = (sizing.state_bytes_per_stream(model, d) for d in (("encode", "decode"), ("encode",)))
    states = [model.new_direction(name, 1) for name in ("encode", "decode")]
    assert both == sum(buffer.nbytes for state in states for buffer in state.buffers.values()) > one
    assert sizing.streams_in(model, 10 * both + 1) == 10
    with pytest.raises(InputError, match="nbytes must be positive, got 0"):
        sizing.streams_in(model, 0)


def test_streams_are_measured_until_a_tick_is_too_long(model, monkeypatch):
    clock = iter(i * 0.0005 * (1 + i // (2 * sizing.TICKS) * 4) for i in range(10_000))
    monkeypatch.setattr(sizing.time, "perf_counter", lambda: next(clock))
    seen = []
    found = sizing.measure(model, progress=seen.append)
    assert found == seen and [row.streams for row in found] == list(sizing.SIZES[: len(found)])
    assert all(row.seconds <= 1 / model.frame_rate for row in found[:-1]) and found[-1].share > 1
    assert all(row.share == pytest.approx(row.seconds * model.frame_rate) for row in found)


def test_the_largest_number_of_streams_is_bounded(model):
    assert [row.streams for row in sizing.measure(model, directions=("encode",), most=2)] == [1, 2]

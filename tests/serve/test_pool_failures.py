"""What goes wrong in a tick ends the streams that it concerns, and no others."""

import pytest
import torch

from fastmimi.devtools.testing import noise
from fastmimi.serve.pool import StreamPool
from fastmimi.serve.slots import PoolFull
from fastmimi.serve.stream import StreamFailed


@pytest.fixture
def pool(model):
    return StreamPool(model, 4, warm_up=False)


def all_codes(stream):
    """What a stream encodes until nothing waits."""
    while stream.pool.step():
        pass
    return stream.read_codes()


def test_a_step_that_raises_ends_the_streams_of_its_batch_alone(model, pool, monkeypatch):
    audio = noise(3, 1, 48 * 8)
    good, bad, worse = (pool.open("encode") for _ in range(3))
    good.push_audio(audio[0, :, :40])  # not a frame yet: it is in no step
    for stream, x in ((bad, audio[1]), (worse, audio[2])):
        stream.push_audio(x[:, :48])
    step = pool.slots.step_encode

    def failing(x, slots, **options):
        if bad.slot in slots:
            raise RuntimeError("out of memory")
        return step(x, slots, **options)

    monkeypatch.setattr(pool.slots, "step_encode", failing)
    pool.step()
    monkeypatch.undo()
    for stream in (bad, worse):
        with pytest.raises(StreamFailed, match="the stream failed: out of memory"):
            stream.read_codes()
        with pytest.raises(StreamFailed):
            stream.push_audio([0.0])
    good.push_audio(audio[0, :, 40:])
    assert torch.equal(all_codes(good), model.encode(audio[:1])[0])
    assert (pool.stats().free, pool.stats().failed_streams) == (3, 2)
    fresh = pool.open("encode")
    fresh.push_audio(audio[1])
    assert torch.equal(all_codes(fresh), model.encode(audio[1:2])[0])


def test_an_interrupted_tick_leaks_nothing(pool, monkeypatch):
    streams = [pool.open() for _ in range(2)]
    streams[0].push_audio(noise(48 * 2))
    streams[1].push_audio(noise(48))

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pool.slots, "step_encode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pool.step()
    assert pool.stats().free == 4 and pool._queued == 0


def test_a_stream_that_is_closed_during_its_step(model, pool, monkeypatch):
    stream, other, audio = pool.open("encode"), pool.open("encode"), noise(2, 1, 48 * 2)
    stream.push_audio(audio[0])
    other.push_audio(audio[1])
    step = pool.slots.step_encode

    def closing(x, slots, **options):
        stream.close()
        assert pool.slots.free == 2, "its slot is in the step"
        return step(x, slots, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pool.slots, "step_encode", closing)
        pool.step()
    assert pool.slots.free == 3 and stream.read_codes().shape[-1] == 0
    assert torch.equal(all_codes(other), model.encode(audio[1:])[0])
    assert pool.open("encode").slot == stream.slot


def test_a_slot_that_cannot_be_reset_is_not_used_again(pool, monkeypatch, caplog):
    stream = pool.open()

    def fail(*_):
        raise RuntimeError("device lost")

    with monkeypatch.context() as patch:
        patch.setattr(pool.slots, "reset", fail)
        stream.close()
    assert "cannot be reset and is not used any more" in caplog.text
    assert (pool.stats().free, pool.stats().quarantined) == (3, 1)
    assert stream.slot not in {pool.open().slot for _ in range(3)}
    with pytest.raises(PoolFull):
        pool.open()


def test_a_callback_that_fails_disturbs_nobody(model, pool, caplog):
    streams, audio, called = [pool.open("encode") for _ in range(2)], noise(2, 1, 48 * 3), []

    def fail(stream):
        raise ValueError("mine")

    streams[0].on_results, streams[1].on_results = fail, called.append
    for stream, x in zip(streams, audio, strict=True):
        stream.push_audio(x)
    pool.step()
    assert called and "on_results of the stream in slot" in caplog.text
    for stream, x in zip(streams, audio, strict=True):
        assert torch.equal(all_codes(stream), model.encode(x[None])[0])


def while_stepping(pool, monkeypatch, action):
    """Run one tick, and `action` in the middle of its step."""
    step = pool.slots.step_encode

    def acting(x, slots, **options):
        action()
        return step(x, slots, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pool.slots, "step_encode", acting)
        pool.step()


def test_a_stream_that_is_reset_and_finished_during_its_step_gives_its_slot_back(pool, monkeypatch):
    stream = pool.open("encode")
    stream.push_audio(noise(48))
    while_stepping(pool, monkeypatch, lambda: (stream.reset(), stream.finish()))
    assert stream.done and pool.stats().free == 4


def test_a_reset_that_fails_after_a_step_ends_its_stream_alone(model, pool, monkeypatch):
    stream, other, audio = pool.open("encode"), pool.open("encode"), noise(2, 1, 48)
    stream.push_audio(audio[0])
    other.push_audio(audio[1])

    def fail(*_):
        raise RuntimeError("device lost")

    with monkeypatch.context() as patch:
        while_stepping(pool, monkeypatch, lambda: (stream.reset(), patch.setattr(pool.slots, "reset", fail)))
    with pytest.raises(StreamFailed, match="device lost"):
        stream.read_codes()
    assert torch.equal(all_codes(other), model.encode(audio[1:])[0])
    assert (pool.stats().free, pool.stats().quarantined, pool.stats().failed_streams) == (2, 1, 1)

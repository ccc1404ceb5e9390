"""StreamPool: each stream gets what it would get alone, whatever the others do; queues are bounded; slots come back."""

import threading
import time

import numpy as np
import pytest
import torch

from fastmimi import InputError
from fastmimi.devtools.testing import chunks, noise, relative_error
from fastmimi.serve.pool import Limits, StreamPool
from fastmimi.serve.slots import PoolFull
from fastmimi.serve.stream import StreamClosed, StreamFull

RATE = 24_000


def run_until_idle(pool):
    while pool.step():
        pass


def drained(stream, read):
    """All results of one kind; reads also where `num_codebooks` changes."""
    parts = []
    while (part := getattr(stream, f"read_{read}")()).shape[-1]:
        parts.append(part)
    return parts


@pytest.fixture
def pool(model):
    return StreamPool(model, 4, warm_up=False)


def test_streams_of_any_chunks_equal_the_whole(model):
    pool = StreamPool(model, 5)
    audio = [noise(1, 1, 48 * (6 + i) + 7 * i, seed=i) for i in range(5)]
    streams = [pool.open("encode", num_codebooks=1 + i) for i in range(5)]
    pieces = [list(x[0, 0].split(chunks(x.shape[-1], seed=i, longest=130))) for i, x in enumerate(audio)]
    while any(pieces):
        for stream, waiting in zip(streams, pieces, strict=True):
            if waiting:
                stream.push_audio(waiting.pop(0))
                if not waiting:
                    stream.finish()
        pool.step()
    run_until_idle(pool)
    for i, (stream, x) in enumerate(zip(streams, audio, strict=True)):
        codes = torch.cat(drained(stream, "codes"), dim=-1)
        assert torch.equal(codes, model.encode(x, num_codebooks=1 + i)[0])
        assert stream.done
    assert pool.stats().open == 0 and pool.stats().free == 5


def test_duplex_streams_and_codes_of_different_numbers_of_codebooks(model, pool):
    audio = noise(3, 1, 48 * 9)
    streams = [pool.open() for _ in range(3)]
    codes = model.encode(audio)
    counts = [2, 6, 4]
    for stream, x, coded, count in zip(streams, audio, codes, counts, strict=True):
        stream.push_audio(x)
        for t in range(9):
            stream.push_codes(coded[: count if t < 5 else 6, t])  # changes in the middle
    run_until_idle(pool)
    for stream, coded, count in zip(streams, codes, counts, strict=True):
        assert torch.equal(torch.cat(drained(stream, "codes"), dim=-1), coded)
        state = model.new_state(1)
        frames = [model.decode(coded[None, : count if t < 5 else 6, t : t + 1], state=state) for t in range(9)]
        assert relative_error(stream.read_audio(), torch.cat(frames, dim=-1)[0]) < 1e-6


def test_the_number_of_codebooks_may_change(model, pool):
    stream, audio = pool.open("encode"), noise(1, 1, 48 * 6)
    for count, half in zip((6, 2), audio[0].split(48 * 3, dim=-1), strict=True):
        stream.num_codebooks = count
        stream.push_audio(half)
        run_until_idle(pool)
    first, second = drained(stream, "codes")
    whole = model.encode(audio)[0]
    assert torch.equal(first, whole[:, :3]) and torch.equal(second, whole[:2, 3:])
    with pytest.raises(InputError, match=r"from 1 to 6, got 7"):
        stream.num_codebooks = 7
    with pytest.raises(InputError, match="the pool encodes 4 codebooks, got 6"):
        StreamPool(model, 1, num_codebooks=4, warm_up=False).open(num_codebooks=6)


@pytest.mark.parametrize("convert", [
    lambda x: x, lambda x: x.numpy(), lambda x: x[None], lambda x: x.double(), lambda x: x.tolist(),
    lambda x: (x * 32768).round().to(torch.int16), lambda x: (x * 32768).round().to(torch.int16).numpy(),
])  # fmt: skip
def test_kinds_of_audio(model, pool, convert):
    x = (noise(48 * 4) * 32768).round().clamp(-32768, 32767) / 32768
    stream = pool.open("encode")
    stream.push_audio(convert(x))
    run_until_idle(pool)
    assert torch.equal(stream.read_codes(), model.encode(x[None, None])[0])


def test_pushed_memory_may_be_reused(model, pool):
    stream, buffer = pool.open("encode"), np.zeros(48, dtype=np.float32)
    whole = noise(48 * 3)
    for part in whole.split(48):
        buffer[:] = part.numpy()
        stream.push_audio(buffer)
    run_until_idle(pool)
    assert torch.equal(stream.read_codes(), model.encode(whole[None, None])[0])


@pytest.mark.parametrize("push, sentence", [
    (lambda s: s.push_audio(torch.tensor([0.0, float("nan")])), "audio must be finite"),
    (lambda s: s.push_audio(torch.zeros(2, 5)), r"audio must be \[1, samples\], got \(2, 5\)"),
    (lambda s: s.push_audio(np.zeros(3, dtype=np.int64)), "floating point in .*, or int16, got int64"),
    (lambda s: s.push_audio("hello"), "audio must be an array of numbers, got str"),
    (lambda s: s.push_audio(None), "audio must be an array of numbers, got NoneType"),
    (lambda s: s.push_codes([0, 64]), r"codes must lie in \[0, 64\), got 64"),
    (lambda s: s.push_codes([0] * 7), "the number of codebooks must be from 1 to 6, got 7"),
    (lambda s: s.push_codes([0.5]), "codes must be integers"),
    (lambda s: s.push_codes(torch.zeros(1, 1, 1, dtype=torch.int64)), r"codes must be \[codebooks, frames\]"),
])  # fmt: skip
def test_bad_input_is_named_and_changes_nothing(model, pool, push, sentence):
    stream, good = pool.open(), noise(1, 1, 48 * 2)
    stream.push_audio(good[0, 0, :60])
    with pytest.raises(InputError, match=sentence):
        push(stream)
    stream.push_audio(good[0, 0, 60:])
    run_until_idle(pool)
    assert torch.equal(stream.read_codes(), model.encode(good)[0])


def test_streams_do_only_what_they_were_opened_for(model):
    pool = StreamPool(model, 2, directions=("encode",), warm_up=False)
    with pytest.raises(InputError, match="directions must be among encode, got"):
        pool.open("decode")
    both = StreamPool(model, 1, warm_up=False)
    with pytest.raises(InputError, match="this stream does not encode: it was opened to decode"):
        both.open("decode").push_audio([0.0])
    with pytest.raises(InputError, match="frames_per_tick must be a positive integer, got 0"):
        StreamPool(model, 1, frames_per_tick=0)


def test_a_full_pool_answers_at_once_and_recovers(pool):
    streams = [pool.open() for _ in range(4)]
    with pytest.raises(PoolFull):
        pool.open()
    streams[1].close()
    again = pool.open()
    assert again.slot == streams[1].slot
    with pytest.raises(StreamClosed):
        streams[1].push_audio([0.0])  # late data of the stream that had the slot
    assert pool.stats().free == 0


def test_a_full_stream_answers_at_once_and_recovers(model):
    pool = StreamPool(model, 2, limits=Limits(stream_s=4 * 48 / RATE, pool_s=6 * 48 / RATE), warm_up=False)
    one, two = pool.open(), pool.open()
    one.push_audio(torch.zeros(48 * 4))
    with pytest.raises(StreamFull, match=r"would wait in the stream, at most 0\.008 s may"):
        one.push_audio([0.0])
    with pytest.raises(StreamFull, match=r"would wait in the pool, at most 0\.012 s may"):
        two.push_codes(torch.zeros(6, 3, dtype=torch.int64))
    two.push_codes(torch.zeros(6, 2, dtype=torch.int64))
    pool.step()
    one.push_audio(torch.zeros(48))
    one.close()
    two.close()
    assert pool._queued == 0


def test_a_stream_whose_results_are_not_read_waits(model):
    pool = StreamPool(model, 2, limits=Limits(unread_s=2 * 48 / RATE), warm_up=False)
    slow, other = pool.open("encode"), pool.open("encode")
    for stream in (slow, other):
        stream.push_audio(noise(48 * 9))
    frames = int(2 * 48 / RATE * model.frame_rate)
    taken = 0
    for _ in range(20):
        pool.step()
        taken += other.read_codes().shape[-1]
    assert taken == 9
    assert slow.waiting("encode") >= 9 - 4 - frames
    slow.read_codes()
    run_until_idle(pool)
    assert slow.read_codes().shape[-1] > 0


def test_a_late_stream_catches_up_and_does_not_starve_the_others(model):
    pool = StreamPool(model, 4, frames_per_tick=4, warm_up=False)
    late, *others = [pool.open("encode") for _ in range(4)]
    late.push_audio(noise(48 * 20))
    for _ in range(12):
        for stream in others:
            stream.push_audio(noise(48))
        assert pool.step() == 4
        assert all(stream.read_codes().shape[-1] == 1 for stream in others), "one frame each in every tick"
    assert late.waiting("encode") == 8
    assert [pool.step() for _ in range(3)] == [4, 4, 0], "alone, it takes several frames at once"


def test_finishing_without_any_input(pool):
    stream = pool.open()
    stream.finish()
    stream.finish()
    assert stream.done and pool.stats().free == 4
    with pytest.raises(StreamClosed, match="the stream has ended"):
        stream.push_audio([0.0])
    assert stream.read_codes().shape == (6, 0) and stream.read_audio().shape == (1, 0)


def test_a_finished_stream_takes_no_input_and_is_done_once_read(model, pool):
    stream, audio = pool.open("encode"), noise(1, 1, 48 * 2 + 5)
    stream.push_audio(audio[0])
    stream.finish()
    with pytest.raises(StreamClosed, match="the stream is finished: no more input"):
        stream.push_audio([0.0])
    run_until_idle(pool)
    assert stream.ended and not stream.done and pool.stats().free == 4
    assert torch.equal(stream.read_codes(), model.encode(audio)[0]) and stream.done


def test_streams_are_context_managers(pool):
    with pool.open() as stream:
        stream.push_audio(noise(480))
    assert pool.stats().free == 4 and pool.stats().waiting_frames == 0


def test_the_pools_thread(model):
    pool, audio, results = StreamPool(model, 3), noise(3, 1, 48 * 30), {}

    def client(i):
        stream, parts = pool.open("encode"), []
        for part in audio[i, 0].split(100):
            while True:
                try:
                    stream.push_audio(part)
                    break
                except StreamFull:
                    time.sleep(0.001)
            parts.append(stream.read_codes())
        stream.finish()
        while not stream.done:
            time.sleep(0.001)
            parts.append(stream.read_codes())
        results[i] = torch.cat(parts, dim=-1)

    with pool:
        pool.start()
        with pytest.raises(RuntimeError, match="thread is running"):
            pool.start()
        threads = [threading.Thread(target=client, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    for i in range(3):
        assert torch.equal(results[i], model.encode(audio[i : i + 1])[0])
    assert pool.stats().free == 3
    pool.stop()


def test_stats(model, pool):
    stream = pool.open()
    stream.push_audio(noise(48 * 5))
    before = pool.stats()
    assert (before.capacity, before.open, before.free, before.waiting_frames, before.ticks) == (4, 1, 3, 5, 0)
    assert before.tick_p99_ms == before.real_time_factor == 0.0
    run_until_idle(pool)
    stream.push_codes(stream.read_codes())
    run_until_idle(pool)
    after = pool.stats()
    assert (after.encoded_frames, after.decoded_frames, after.waiting_frames) == (5, 5, 0)
    assert after.tick_p99_ms >= after.tick_p50_ms > 0 and after.real_time_factor > 0


def test_a_flushed_stream_goes_on(model, pool):
    stream, audio = pool.open("encode"), noise(1, 1, 48 * 4)
    stream.push_audio(audio[0, :, :60])
    assert not stream.idle
    stream.flush()
    run_until_idle(pool)
    assert stream.idle
    stream.push_audio(audio[0, :, 60 : 60 + 48])
    run_until_idle(pool)
    padded = torch.cat([audio[..., :60], torch.zeros(1, 1, 36), audio[..., 60:108]], dim=-1)
    assert torch.equal(torch.cat(drained(stream, "codes"), dim=-1), model.encode(padded)[0])


def test_a_reset_stream_starts_anew_in_its_slot(model, pool, monkeypatch):
    stream, audio = pool.open("encode"), noise(1, 1, 48 * 3)
    stream.push_audio(noise(48 * 3 + 7, seed=9))
    pool.step()
    stream.reset()
    assert stream.read_codes().shape[-1] == 0 and pool._queued == 0
    stream.push_audio(noise(48 * 3 + 7, seed=9))
    step = pool.slots.step_encode

    def resetting(x, slots, **options):
        stream.reset()
        return step(x, slots, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pool.slots, "step_encode", resetting)
        pool.step()
    stream.push_audio(audio[0])
    run_until_idle(pool)
    assert torch.equal(torch.cat(drained(stream, "codes"), dim=-1), model.encode(audio)[0])
    stream.close()
    with pytest.raises(StreamClosed):
        stream.reset()

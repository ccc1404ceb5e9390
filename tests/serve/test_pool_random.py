"""Random operations on a pool, by hypothesis: no slot is lost, and every stream gets what it would get alone."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from fastmimi.devtools.testing import noise, small_model
from fastmimi.serve.pool import Limits, StreamPool
from fastmimi.serve.slots import PoolFull
from fastmimi.serve.stream import Stream, StreamClosed, StreamFull

CAPACITY, FRAME = 4, 48
MODEL = small_model(upsampling_ratios=[4, 3, 2])


class Operations(RuleBasedStateMachine):
    """Streams of pushes of any kind, ticks, ends; what went in and came out is noted for each stream."""

    streams = Bundle("streams")

    def __init__(self):
        super().__init__()
        self.pool = StreamPool(MODEL, CAPACITY, frames_per_tick=4, limits=Limits(stream_s=0.02), warm_up=False)
        self.audio: dict[Stream, list[torch.Tensor]] = {}  # [N] pushed
        self.codes: dict[Stream, list[torch.Tensor]] = {}  # [K, T] pushed
        self.coded: dict[Stream, list[torch.Tensor]] = {}  # results
        self.heard: dict[Stream, list[torch.Tensor]] = {}

    @rule(target=streams, directions=st.sampled_from(["encode", "decode", None]), count=st.integers(1, 6))
    def open(self, directions, count):
        try:
            stream = self.pool.open(directions, num_codebooks=count)
        except PoolFull:
            assert self.pool.slots.free == 0
            return None
        for notes in (self.audio, self.codes, self.coded, self.heard):
            notes[stream] = []
        return stream

    @rule(stream=streams, length=st.integers(0, 5 * FRAME), seed=st.integers(0, 99), good=st.booleans())
    def push_audio(self, stream, length, seed, good):
        if stream is None:
            return
        x = noise(length, seed=seed)
        if not good and length:
            x[seed % length] = float("nan")
        try:
            stream.push_audio(x)
        except (StreamFull, StreamClosed, ValueError):
            return
        self.audio[stream].append(x)

    @rule(stream=streams, frames=st.integers(0, 4), count=st.integers(1, 6), seed=st.integers(0, 99))
    def push_codes(self, stream, frames, count, seed):
        if stream is None:
            return
        codes = torch.randint(0, 64, (count, frames), generator=torch.Generator().manual_seed(seed))
        try:
            stream.push_codes(codes)
        except (StreamFull, StreamClosed, ValueError):
            return
        self.codes[stream] += list(codes.unbind(1))

    @rule()
    def tick(self):
        self.pool.step()

    @rule(stream=streams)
    def read(self, stream):
        if stream is not None:
            self._read(stream)

    def _read(self, stream):
        while (part := stream.read_codes()).shape[-1]:
            self.coded[stream].append(part)
        self.heard[stream].append(stream.read_audio())

    @rule(stream=streams)
    def finish(self, stream):
        if stream is not None:
            stream.finish()

    @rule(stream=consumes(streams))
    def close(self, stream):
        if stream is not None:
            self._read(stream)
            stream.close()
            self._check(stream, complete=False)
            for notes in (self.audio, self.codes, self.coded, self.heard):
                del notes[stream]

    def _check(self, stream, complete):
        """What came out is the beginning of what the stream alone would give or, if `complete`, all of it."""
        audio = torch.cat([torch.empty(0), *self.audio[stream]])[None, None]
        whole = MODEL.encode(audio, num_codebooks=stream.num_codebooks)[0]
        if not stream._finished:
            whole = whole[:, : audio.shape[-1] // FRAME]
        found = torch.cat([whole[:, :0], *self.coded[stream]], dim=-1)
        assert torch.equal(found, whole[:, : found.shape[-1]])
        heard = torch.cat([torch.empty(1, 0), *self.heard[stream]], dim=-1)
        if complete:
            assert (found.shape, heard.shape[-1]) == (whole.shape, FRAME * len(self.codes[stream]))
        if heard.shape[-1]:
            state = MODEL.new_state(1)
            frames = self.codes[stream][: heard.shape[-1] // FRAME]
            alone = torch.cat([MODEL.decode(frame[None, :, None], state=state) for frame in frames], dim=-1)[0]
            assert torch.allclose(heard, alone, rtol=0, atol=1e-5 * float(alone.abs().max()))

    @invariant()
    def slots_add_up(self):
        pool = self.pool
        assert len(pool._streams) + pool.slots.free + pool.slots.quarantined == CAPACITY
        assert len(pool.slots._in_use) == len(pool._streams) and not pool.slots.quarantined
        assert pool._queued == sum(stream.queued for stream in pool._streams.values())

    def teardown(self):
        while self.pool.step():
            pass
        for stream in self.audio:
            self._read(stream)
            self._check(stream, complete=True)
            stream.close()
        assert self.pool.slots.free == CAPACITY and self.pool._queued == 0


Operations.TestCase.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)


@pytest.mark.slow
class TestOperations(Operations.TestCase):
    """40 sequences of 50 operations; `make fuzz` runs more."""

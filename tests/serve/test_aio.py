"""Streams in asyncio: pushing waits for space, iterations end with the stream."""

import asyncio

import pytest
import torch

from fastmimi.devtools.testing import noise, relative_error
from fastmimi.serve.aio import AsyncStreamPool
from fastmimi.serve.pool import Limits, StreamPool
from fastmimi.serve.slots import PoolFull
from fastmimi.serve.stream import StreamFailed, StreamFull


def test_streams_in_asyncio(model):
    pool = StreamPool(model, 3, limits=Limits(stream_s=4 * 48 / 24_000), warm_up=False)
    audio = noise(3, 1, 48 * 30 + 5)

    async def one(streams, x):
        async with streams.open("encode") as stream:

            async def push():
                for part in x[0].split(150):
                    await stream.push_audio(part)
                await stream.finish()

            pushing = asyncio.create_task(push())
            codes = [part async for part in stream]
            await pushing
            return torch.cat(codes, dim=-1)

    async def everything():
        async with AsyncStreamPool(pool) as streams:
            return await asyncio.gather(*(one(streams, x) for x in audio))

    for x, codes in zip(audio, asyncio.run(everything()), strict=True):
        assert torch.equal(codes, model.encode(x[None])[0])
    assert pool.stats().free == 3


def test_decoding_and_a_full_pool(model):
    pool, codes = StreamPool(model, 1, warm_up=False), model.encode(noise(1, 1, 48 * 5))

    async def run():
        async with AsyncStreamPool(pool) as streams, streams.open("decode") as stream:
            with pytest.raises(PoolFull):
                await streams.open().__aenter__()
            await stream.push_codes(codes[0])
            await stream.finish()
            return torch.cat([part async for part in stream], dim=-1)

    assert relative_error(asyncio.run(run()), model.decode(codes)[0]) < 1e-5


def test_more_than_ever_fits_is_refused(model):
    pool = StreamPool(model, 1, limits=Limits(stream_s=0.002), warm_up=False)

    async def run():
        async with AsyncStreamPool(pool) as streams, streams.open("encode") as stream:
            await stream.push_audio(torch.zeros(100))

    with pytest.raises(StreamFull):
        asyncio.run(run())


def test_a_failed_stream_raises_where_it_is_read(model, monkeypatch):
    pool = StreamPool(model, 1, warm_up=False)

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pool.slots, "step_encode", fail)

    async def run():
        async with AsyncStreamPool(pool) as streams, streams.open("encode") as stream:
            await stream.push_audio(noise(480))
            return [part async for part in stream.codes()]

    with pytest.raises(StreamFailed, match="out of memory"):
        asyncio.run(run())

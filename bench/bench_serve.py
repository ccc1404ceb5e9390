"""Many streams: what a tick of a pool costs, beside a smaller pool and beside moshi's batched streaming; and a server,
beside its pool without one.

`python -m fastmimi.serve.load` measures latencies over the network.
"""

import asyncio
import socket
import subprocess
import sys
import time
from contextlib import AsyncExitStack, suppress

import peers
import pytest
import torch

import fastmimi
from fastmimi.devtools.testing import noise
from fastmimi.serve import protocol
from fastmimi.serve.client import AsyncClient, Client, ServerError

ROUNDS = 20
ACTIVE, LARGE = 4, 64
SERVED, FRAMES = 12, 25  # streams of a server, and how many frames each sends at once; 50 may wait
START_S = 120


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def duplex(pool, slots, batch):
    """A tick of `batch` duplex streams with a frame each."""
    audio = noise(batch, 1, peers.FRAME, scale=0.1)
    return lambda: pool.step_decode(pool.step_encode(audio, slots), slots)


def bench_a_tick_costs_its_active_streams(benchmark, in_turn, mimi):
    pools = {name: fastmimi.SlotPool(mimi, size) for name, size in (("small", ACTIVE), ("large", LARGE))}
    slots = {"small": range(ACTIVE), "large": [3, 17, 42, 60]}
    calls = {name: duplex(pool, slots[name], ACTIVE) for name, pool in pools.items()}
    for name, pool in pools.items():
        pool.warm_up()
        calls[name]()
    results = in_turn(f"{ACTIVE} active streams, pools of {LARGE} and of {ACTIVE}", calls, ROUNDS, ours="large")
    assert torch.equal(results["large"], results["small"])
    if benchmark.stats is not None:
        assert benchmark.extra_info["ratios"]["small"] > 1 / 1.15, "a large pool costs more than its active streams"


@pytest.mark.parametrize("batch", [1, 4, 8, 12, 16])
def bench_duplex_streams(benchmark, in_turn, mimi, folder, batch):
    """Ticks of moshi's batched streaming with the same weights, in turn."""
    pool, moshi = fastmimi.SlotPool(mimi, LARGE), peers.load("moshi", folder)
    pool.warm_up()
    calls = {"fastmimi": duplex(pool, range(batch), batch)}
    calls["fastmimi"]()
    if moshi is None:
        print("moshi is not installed and is left out")
        in_turn(f"{batch} duplex streams, a tick", calls, ROUNDS)
        return
    audio = noise(batch, 1, peers.FRAME, scale=0.1)
    with moshi.stream(batch) as (encode, decode):
        calls["moshi"] = lambda: decode(encode(audio))
        calls["moshi"]()
        in_turn(f"{batch} duplex streams, a tick", calls, ROUNDS)
    if benchmark.stats is not None:
        assert benchmark.extra_info["ratios"]["moshi"] > 2


@pytest.fixture(scope="module")
def server(folder):
    """The address of a server in a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = {"model": folder, "streams": SERVED, "codebooks": peers.CODEBOOKS, "port": port}
    command = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    process = subprocess.Popen([sys.executable, "-m", "fastmimi", "serve", "--quiet", *command])
    try:
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + START_S
        while True:
            with suppress(ServerError, OSError):
                Client(address).health()
                break
            assert process.poll() is None, "the server has ended"
            assert time.monotonic() < end, f"the server did not start within {START_S} s"
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait()


async def through_server(streams, audio):
    """Audio [B, N] through B streams; codes are sent back to be decoded. Returns the samples that came back."""

    async def one(stream, packed):
        samples = 0
        for message in packed:
            await stream.send(message)
        while samples < audio.shape[1]:
            match await stream.receive():
                case protocol.Codes() as codes:
                    await stream.send(protocol.pack(codes))
                case protocol.Audio() as heard:
                    samples += len(heard.samples) // 4
        return samples

    packed = [
        [protocol.pack(protocol.Audio(part.numpy().tobytes())) for part in x.split(5 * peers.FRAME)] for x in audio
    ]
    return sum(await asyncio.gather(*map(one, streams, packed)))


def through_pool(pool, streams, audio):
    """As `through_server`, without one."""
    samples = 0
    for stream, x in zip(streams, audio, strict=True):
        stream.push_audio(x)
    while samples < audio.numel():
        pool.step()
        for stream in streams:
            if (codes := stream.read_codes()).shape[1]:
                stream.push_codes(codes)
            samples += stream.read_audio().shape[1]
    return samples


def bench_a_server_costs_little_more_than_its_pool(benchmark, in_turn, mimi, server):
    """The client, whose work counts too, shares the processors with the server."""
    pool = fastmimi.StreamPool(mimi, SERVED, num_codebooks=peers.CODEBOOKS)
    bare = [pool.open(num_codebooks=peers.CODEBOOKS) for _ in range(SERVED)]
    audio = noise(SERVED, FRAMES * peers.FRAME, scale=0.1)
    loop, connections = asyncio.new_event_loop(), AsyncExitStack()
    try:
        opened = [AsyncClient(server).stream(num_codebooks=peers.CODEBOOKS) for _ in range(SERVED)]
        served = [loop.run_until_complete(connections.enter_async_context(stream)) for stream in opened]
        calls = {
            "fastmimi": lambda: loop.run_until_complete(through_server(served, audio)),
            "pool": lambda: through_pool(pool, bare, audio),
        }
        results = in_turn(f"{SERVED} duplex streams of {FRAMES} frames", calls, 5)
    finally:
        loop.run_until_complete(connections.aclose())
        loop.close()
    assert set(results.values()) == {audio.numel()}
    if benchmark.stats is not None:
        assert benchmark.extra_info["ratios"]["pool"] > 1 / 1.25, "a server costs more than a quarter of its pool"

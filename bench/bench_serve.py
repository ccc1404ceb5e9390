"""Many streams: what a tick of a pool costs, beside a smaller pool and beside moshi's batched streaming.

`python -m fastmimi.serve.load` measures latencies over the network.
"""

import peers
import pytest
import torch

import fastmimi
from fastmimi.devtools.testing import noise

ROUNDS = 40
ACTIVE, LARGE = 4, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return peers.weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def mimi(folder):
    return fastmimi.load(folder, num_codebooks=peers.CODEBOOKS)


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

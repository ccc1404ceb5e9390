"""End to end against transformers and moshi on the same weights: 10 s offline, and one frame of a stream.

Each case first checks that the result equals the peer's; a red check gives no number. Compare within a group only: the
rows of a group are taken in one run on one machine.
"""

import pytest
import torch

import fastmimi
from fastmimi.testing import noise, relative_error

CODEBOOKS = 8


@pytest.fixture(scope="module")
def audio():
    return noise(1, 1, 240_000, scale=0.1)


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def codecs(tmp_path_factory):
    """(encode, decode) on tensors, by name, all of the same weights."""
    folder = tmp_path_factory.mktemp("weights")
    mimi = fastmimi.load("random:0", num_codebooks=CODEBOOKS)
    fastmimi.save_pretrained(mimi, folder)
    fastmimi.save_kyutai(mimi, folder / "kyutai.safetensors")
    codecs = {"fastmimi": (mimi.encode, mimi.decode)}
    try:
        from transformers import MimiModel

        peer = MimiModel.from_pretrained(folder).eval()
        codecs["transformers"] = (
            lambda audio: peer.encode(audio, num_quantizers=CODEBOOKS).audio_codes,
            lambda codes: peer.decode(codes).audio_values,
        )
    except ImportError:
        pass
    try:
        from moshi.models.loaders import get_mimi

        moshi = get_mimi(folder / "kyutai.safetensors", num_codebooks=CODEBOOKS)
        codecs["moshi"] = (moshi.encode, moshi.decode)
    except ImportError:
        pass
    return codecs


def codec(codecs, name):
    if name not in codecs:
        pytest.skip(f"{name} is not installed")
    return codecs[name]


@pytest.mark.parametrize("name", ["fastmimi", "transformers", "moshi"])
@pytest.mark.benchmark(group="encode 10 s", min_rounds=5, warmup=True, warmup_iterations=1)
def bench_encode(benchmark, codecs, audio, name):
    encode, _ = codec(codecs, name)
    assert torch.equal(encode(audio), codecs["fastmimi"][0](audio))
    benchmark(encode, audio)


@pytest.mark.parametrize("name", ["fastmimi", "transformers", "moshi"])
@pytest.mark.benchmark(group="decode 10 s", min_rounds=5, warmup=True, warmup_iterations=1)
def bench_decode(benchmark, codecs, audio, name):
    _, decode = codec(codecs, name)
    codes = codecs["fastmimi"][0](audio)
    assert relative_error(decode(codes), codecs["fastmimi"][1](codes)) < 1e-5
    benchmark(decode, codes)


@pytest.mark.benchmark(group="stream, one frame of 80 ms both ways", min_rounds=20, warmup=True, warmup_iterations=5)
def bench_stream(benchmark, audio):
    mimi = fastmimi.load("random:0", num_codebooks=CODEBOOKS)
    state = mimi.new_state(1)
    frames = audio.split(mimi.frame_size, dim=-1)
    streamed = torch.cat([mimi.encode(frame, state=state) for frame in frames], dim=-1)
    assert torch.equal(streamed, mimi.encode(audio))
    state.reset()
    benchmark(lambda: mimi.decode(mimi.encode(frames[0], state=state), state=state))

"""JODIO, encoding and decoding, with each implementation: an eighth of its width on a CPU, full width on a GPU.

Before anything is timed, codes are checked to equal the reference's, and audio to agree to 1e-5 of its peak.
"""

import pytest
import torch

from fastmimi import InputError, JodioConfig
from fastmimi.checkpoints import weights
from fastmimi.devtools.testing import assert_same_codes, noise, relative_error
from fastmimi.models.config import JodioTransformerConfig
from fastmimi.runtime import dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SECONDS = 2


def config():
    if DEVICE == "cuda":
        return JodioConfig()
    encoder = JodioTransformerConfig(132, 22, 2, 64, 528)  # 4 * 33 wide, as 1028 is 4 * 257
    return JodioConfig(
        channels=112, encoder_transformer=encoder, decoder_transformer=JodioTransformerConfig(32, 4, 1, 32, 128)
    )


@pytest.fixture(scope="module")
def model():
    return weights.random(config()).to(DEVICE).eval().requires_grad_(False)


@pytest.mark.parametrize("candidate", dispatch.CANDIDATES)
@torch.inference_mode()
def bench_jodio(benchmark, model, candidate):
    try:
        dispatch.explain(DEVICE, torch.float32, candidate)
    except InputError as error:
        pytest.skip(str(error))
    audio = noise(1, 1, SECONDS * model.sample_rate).to(DEVICE)
    model.impl = "reference"
    truth, latents = model.encode(audio), model.encode_to_latent(audio)
    sound = model.decode(truth)
    model.impl = candidate
    assert_same_codes(model.encode(audio), truth, latents, model)
    assert relative_error(model.decode(truth), sound) < 1e-5

    def run():
        model.decode(model.encode(audio))
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"JODIO of {model.config.channels} channels, {SECONDS} s, encode and decode"
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)

"""The core against transformers' `MimiModel` with the same weights: codes identical, audio within 1e-5 of the peak."""

import re

import pytest
import torch

from fastmimi.checkpoints.weights import fill, to_flat
from fastmimi.devtools.testing import CONFIGS, assert_same_codes, lengths, noise, relative_error
from fastmimi.models.config import MimiCodecConfig
from fastmimi.models.mimi import Mimi

transformers = pytest.importorskip("transformers")
TRANSFORMERS_5 = hasattr(transformers.models.mimi.modeling_mimi, "create_sliding_window_causal_mask")


def peer_and_core(name):
    # transformers 4 attends to all earlier positions: compared within one window
    changes = {} if TRANSFORMERS_5 else {"sliding_window": 10_000}
    if name == "rope" and not TRANSFORMERS_5:
        rope = CONFIGS[name]["rope_parameters"]
        changes |= {"rope_theta": rope["rope_theta"], "rope_scaling": rope, "rope_parameters": None}
    torch.manual_seed(0)
    peer = transformers.MimiModel(transformers.MimiConfig(**{**CONFIGS[name], **changes})).eval().requires_grad_(False)
    for key, buffer in peer.named_buffers():
        if key.endswith("embed_sum"):
            buffer.normal_(std=0.3)
        if key.endswith("cluster_usage"):
            buffer.uniform_(0.5, 2.0)
    for key, parameter in peer.named_parameters():
        if key.endswith("layer_scale.scale"):
            parameter.uniform_(0.2, 1.0)  # so that the transformers affect the results
    core = Mimi(MimiCodecConfig.from_dict(peer.config.to_dict()))
    fill(core, to_flat(peer.state_dict()))
    return peer, core.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    return peer_and_core(request.param)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(5))
def test_codes_and_audio(pair, index):
    peer, core = pair
    samples = lengths(core.frame_size)[index]
    audio = noise(2 if samples < 10_000 else 1, core.config.audio_channels, samples, seed=index)
    latents = core.encode_to_latent(audio, last_frame="layers")
    for count in (core.config.num_semantic_quantizers, min(8, core.total_codebooks), core.total_codebooks):
        theirs = peer.encode(audio, num_quantizers=count).audio_codes
        mine = core.encode(audio, num_codebooks=count, last_frame="layers")
        assert_same_codes(mine, theirs, latents, core)
        assert relative_error(core.decode(theirs), peer.decode(theirs).audio_values) < 1e-5


def test_both_paddings_of_the_last_frame_agree_on_whole_frames(pair):
    _, core = pair
    audio = noise(1, core.config.audio_channels, 3 * core.frame_size)
    assert torch.equal(core.encode(audio), core.encode(audio, last_frame="layers"))


def test_latents(pair):
    peer, core = pair
    audio = noise(1, core.config.audio_channels, 5 * core.frame_size + 7)
    encoder = getattr(peer, "encoder", None)
    if not hasattr(encoder, "encoder_seanet"):
        pytest.skip("this transformers has no MimiEncoderModel, which returns latents")
    assert relative_error(core.encode_to_latent(audio, last_frame="layers"), encoder(audio).latents) < 1e-5


def test_without_resampling():
    """At SEANet's own frame rate there is no down- or upsampling; the peer builds such a model but cannot run it."""
    config = transformers.MimiConfig(**CONFIGS["small"], frame_rate=25)
    torch.manual_seed(0)
    peer = transformers.MimiModel(config).eval().requires_grad_(False)
    for key, buffer in peer.named_buffers():
        if key.endswith("embed_sum"):
            buffer.normal_(std=0.3)
    core = Mimi(MimiCodecConfig.from_dict(config.to_dict()))
    fill(core, to_flat(peer.state_dict()))
    core = core.eval().requires_grad_(False)
    assert core.downsample is None and core.upsample is None and core.frame_size == 960
    audio = noise(1, 1, 4000)
    modules = {re.sub(r"^(en|de)coder\.", "", name): module for name, module in peer.named_modules()}
    encoder = modules.get("encoder_seanet", peer.encoder)
    decoder = modules.get("decoder_seanet", peer.decoder)
    latents = modules["encoder_transformer"](encoder(audio).transpose(1, 2)).last_hidden_state.transpose(1, 2)
    codes = peer.quantizer.encode(latents).transpose(0, 1)
    assert torch.equal(core.encode(audio, last_frame="layers"), codes)
    latents = modules["decoder_transformer"](peer.quantizer.decode(codes).transpose(1, 2)).last_hidden_state
    assert relative_error(core.decode(codes), decoder(latents.transpose(1, 2))) < 1e-5

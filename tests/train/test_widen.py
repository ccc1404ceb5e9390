"""Widening: a wider codec starts as the function of the narrower one, and its new channels are trained."""

import accelerate
import pytest
import torch

import fastmimi
from fastmimi.devtools.testing import noise, relative_error
from fastmimi.train.data import Batch
from fastmimi.train.step import TrainingStep, build_codec
from fastmimi.train.widen import widen

WIDER = {
    "hidden_size": 48, "num_filters": 6, "upsample_groups": 48, "intermediate_size": 64, "num_attention_heads": 6,
    "num_key_value_heads": 6,
}  # fmt: skip


@pytest.fixture
def narrow(tiny_training):
    torch.manual_seed(0)
    codec = build_codec(tiny_training().model)
    for part, _ in codec.quantizer.parts(codec.total_codebooks):
        part.learned(torch.randn_like(part.codebooks()), torch.ones_like(part.usage()))
    return codec.requires_grad_(False).eval()


def test_convolutions_give_the_old_channels(narrow):
    wide = widen(narrow, WIDER, "reference").requires_grad_(False).eval()
    audio, latents = noise(2, 1, 9600, scale=0.1), noise(2, 48, 10)
    old = narrow.encoder(audio, narrow.forward_context(2))
    new = wide.encoder(audio, wide.forward_context(2))
    assert new.shape[1] == 48
    assert relative_error(new[:, :32], old) < 1e-5
    decoded = [c.decoder(latents[:, :width], c.forward_context(2)) for c, width in ((narrow, 32), (wide, 48))]
    assert relative_error(decoded[1], decoded[0]) < 1e-5


def test_a_codec_without_layer_norms_is_the_same(tiny_training, narrow):
    config = tiny_training()
    config.model.changes |= {"num_hidden_layers": 0}
    narrow = build_codec(config.model).requires_grad_(False).eval()
    for part, _ in narrow.quantizer.parts(narrow.total_codebooks):
        part.learned(torch.randn_like(part.codebooks()), torch.ones_like(part.usage()))
    wide = widen(narrow, WIDER, "reference").requires_grad_(False).eval()
    audio = noise(2, 1, 9600, scale=0.1)
    codes = narrow.encode(audio)
    assert torch.equal(wide.encode(audio), codes)
    assert relative_error(wide.decode(codes), narrow.decode(codes)) < 1e-5


def test_new_channels_are_trained(tiny_training, narrow, tmp_path):
    fastmimi.save_pretrained(narrow, tmp_path / "narrow")
    config = tiny_training()
    config.model.load, config.model.widen, config.distillation.teacher = str(tmp_path / "narrow"), WIDER, None
    step = TrainingStep(config, accelerate.Accelerator(cpu=True))
    before = {name: tensor.clone() for name, tensor in step.codec.state_dict().items()}
    step(Batch(noise(3, 1, 9600, scale=0.1), None, ["a", "b", "c"], []), 0)
    weight = step.codec.get_parameter("decoder.layers.0.conv.weight")
    assert not before["decoder.layers.0.conv.weight"][:64, 32:].any()
    assert weight[:64, 32:].abs().min() > 0
    assert step.codec.config.num_filters == 6


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_filters": 2}, r"model\.widen must give no fewer channels: .* \[4, 1, 7\] to \[2, 1, 7\]"),
        ({"num_hidden_layers": 2}, "must keep the number of layers and of codebooks"),
        ({"filters": 8}, r"must name fields of MimiCodecConfig .* got 'filters'"),
    ],
)
def test_changes_that_do_not_widen_are_refused(narrow, changes, message):
    with pytest.raises(fastmimi.InputError, match=message):
        widen(narrow, changes, "reference")


def test_only_a_loaded_mimi_is_widened(tiny_training):
    with pytest.raises(fastmimi.InputError, match="only a Mimi can be widened, got a Jodio"):
        widen(build_codec(tiny_training(architecture="jodio").model), {}, "reference")
    config = tiny_training()
    config.model.widen = WIDER
    with pytest.raises(fastmimi.InputError, match=r"model\.widen needs model\.load"):
        build_codec(config.model)

"""Publishing a training run as half-precision weights and a record."""

import json

import numpy as np
import pytest
import torch

import fastmimi
from fastmimi.devtools.testing import noise, relative_error, small_model
from fastmimi.train.loop import train
from fastmimi.train.publish import concatenate_curves, publish, summary


@pytest.fixture
def speech(tmp_path):
    import soundfile

    (tmp_path / "speech").mkdir()
    soundfile.write(tmp_path / "speech" / "a.wav", noise(24_000).numpy(), 24_000)
    return str(tmp_path / "speech")


@pytest.mark.slow
def test_published_int8_weights_load_to_the_same_bits(tiny_training, speech, tmp_path):
    model = train(tiny_training(folder=speech, steps=1))
    publish([tmp_path / "run"], tmp_path / "published", int8=True)
    whole, small = fastmimi.load(model), fastmimi.load(tmp_path / "published")
    codes = torch.randint(32, (1, 4, 9), generator=torch.Generator().manual_seed(0))
    assert relative_error(small.dequantize(codes), whole.dequantize(codes)) < 2e-2
    fastmimi.save_pretrained(small, tmp_path / "again")
    again = fastmimi.load(tmp_path / "again")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in small.state_dict().items())
    sizes = [(path / "model.safetensors").stat().st_size for path in (tmp_path / "published", model)]
    assert sizes[0] < 0.45 * sizes[1]  # a quarter, and in a model this small the header and scales


@pytest.mark.slow
def test_published_half_precision_weights_are_close_to_the_trained_ones(tiny_training, speech, tmp_path):
    config = tiny_training(folder=speech, steps=3)
    model = train(config)
    (tmp_path / "measured.json").write_text("{}")
    publish([tmp_path / "run"], tmp_path / "published", evaluation=tmp_path / "measured.json")
    assert (tmp_path / "published" / "evaluation.json").read_text() == "{}"
    publish([tmp_path / "run"], tmp_path / "published")
    whole, half = fastmimi.load(model), fastmimi.load(tmp_path / "published")
    latents, codes = noise(1, 32, 9), torch.randint(32, (1, 4, 9), generator=torch.Generator().manual_seed(0))
    assert relative_error(half.dequantize(codes), whole.dequantize(codes)) < 1e-3
    assert relative_error(half.decode_latent(latents), whole.decode_latent(latents)) < 1e-2
    files = {path.name: path.stat().st_size for path in (tmp_path / "published").iterdir()}
    assert files.keys() == {"config.json", "model.safetensors", "training.json", "training.png"}
    assert files["model.safetensors"] < 0.6 * (model / "model.safetensors").stat().st_size
    [summary] = json.loads((tmp_path / "published" / "training.json").read_text())
    assert summary["machine"].keys() == {"versions", "device", "processes", "threads"}
    assert summary["steps"] == 3 and summary["configuration"]["losses"]["mel"] == 1.0
    assert summary["at the end"].keys() >= {"mel", "discriminator", "explained"}
    record = tmp_path / "published" / "training.json"
    publish([tmp_path / "run"], tmp_path / "published", earlier=record)
    assert json.loads(record.read_text()) == [summary, summary]
    assert fastmimi.MimiModel.from_pretrained(tmp_path / "published").config.codebook_size == 32


def test_curves_of_several_runs_are_concatenated():
    first, second = (
        {"mel": tuple(np.array(t) for t in (steps, [1.0] * len(steps), steps))} for steps in ([1, 2], [1, 3])
    )
    joined = concatenate_curves([first, second | {"l1": second["mel"]}])
    assert joined["mel"][0].tolist() == [1, 2, 3, 5] and joined["l1"][0].tolist() == [3, 5]


def test_a_run_is_summarized_by_the_curve_of_all_its_steps(tiny_training):
    """Those of the codec begin after the discriminators' head start."""
    steps, values = np.arange(1, 11), np.zeros(10)
    curves = {"mel": (steps[6:], values[6:], 360.0 * steps[6:]), "discriminator": (steps, values, 360.0 * steps)}
    found = summary(tiny_training(), curves, {})
    assert (found["steps"], found["hours of training"]) == (10, 0.9)


def test_runs_that_cannot_be_published(tiny_training, speech, tmp_path):
    with pytest.raises(ValueError, match="is not a training run with a checkpoint"):
        publish([tmp_path], tmp_path / "published")
    train(tiny_training(folder=speech, steps=1, architecture="jodio"))
    with pytest.raises(ValueError, match=r"only a Mimi can be published, .* trained a JodioModel"):
        publish([tmp_path / "run"], tmp_path / "published")
    assert not (tmp_path / "published").exists()


@pytest.mark.parametrize("log", ["log", "log that was moved"])
def test_a_run_without_logged_losses_is_refused(tiny_training, tmp_path, log):
    (tmp_path / "run" / log).mkdir(parents=True)
    fastmimi.save_pretrained(small_model(), tmp_path / "run" / "model")
    tiny_training().write(tmp_path / "run" / "config.yaml")
    with pytest.raises(fastmimi.InputError, match=r"run/log holds no logged losses$"):
        publish([tmp_path / "run"], tmp_path / "published")
    assert not (tmp_path / "published").exists()

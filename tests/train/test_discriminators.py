"""The discriminators: what they see, their head start, and that they learn."""

import time
from pathlib import Path

import accelerate
import pytest
import torch

import fastmimi
from fastmimi.devtools.testing import noise, relative_error
from fastmimi.train import loop
from fastmimi.train.config import DiscriminatorConfig
from fastmimi.train.data import Batch
from fastmimi.train.discriminators import MultiScaleSTFTDiscriminator
from fastmimi.train.loop import train
from fastmimi.train.publish import read_curves
from fastmimi.train.step import TrainingStep


def batch(seed=1):
    return Batch(noise(3, 1, 9600, seed=seed, scale=0.1), noise(3, 6400, seed=seed + 1), ["a", "b", "c"], [])


# The networks


def test_discriminators_have_several_scales():
    discriminators = MultiScaleSTFTDiscriminator(DiscriminatorConfig())
    logits, features = discriminators(noise(2, 1, 4800))
    assert [scale.n_fft for scale in discriminators.scales] == [2048, 1024, 512, 256, 128]
    assert all(score.shape[:2] == (2, 1) and len(layers) == 5 for score, layers in zip(logits, features, strict=True))
    assert [layers[0].shape for layers in features[:2]] == [(2, 32, 10, 1025), (2, 32, 19, 513)]


@pytest.mark.parametrize("gain", [1, 20])
def test_spectra_of_discriminators_have_the_power_of_their_audio(gain):
    """Of white noise, at every resolution; times the square of the gain."""
    audio, seen = noise(1, 1, 48_000), []
    discriminators = MultiScaleSTFTDiscriminator(DiscriminatorConfig(filters=1, gain=gain))
    for scale in discriminators.scales:
        scale.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    discriminators(audio)
    powers = [spectrum.square().sum(dim=1).mean().item() for spectrum in seen]  # [B, 2, frames, bins]
    assert powers == pytest.approx([gain**2 * audio.square().mean().item()] * 5, rel=0.05)


@pytest.mark.slow
def test_new_discriminators_respond_to_quiet_audio():
    """Without biases the logits scale with the audio, and features have about the same magnitude as the audio."""
    torch.manual_seed(0)
    discriminators, audio = MultiScaleSTFTDiscriminator(DiscriminatorConfig()), noise(4, 1, 9600)
    with torch.no_grad():
        loud, features = discriminators(audio)
        quiet, _ = discriminators(audio * 1e-4)
    for of_loud, of_quiet in zip(loud, quiet, strict=True):
        assert relative_error(of_quiet * 1e4, of_loud) < 1e-4
    for scale in features:
        assert 0.2 < scale[-1].norm() / scale[-1].numel() ** 0.5 / audio.std() < 5


@pytest.mark.slow
def test_discriminators_learn_to_separate_real_from_fake(make_training_step):
    """Their hinge loss is 2 if they cannot separate them, and 0 if they always can."""
    training_step = make_training_step(lr=2e-3)
    real = noise(3, 1, 9600, seed=1, scale=0.1)
    logged = [training_step._discriminator_step(real, real.cumsum(dim=-1) * 0.05).item() for _ in range(60)]
    assert logged[0] == pytest.approx(2, abs=0.2) and logged[-1] < 1


def test_features_of_silence_are_measured_with_the_gain(make_training_step):
    """The feature-matching loss of a new discriminator does not depend on the gain, not even of the quietest audio."""
    found = []
    for gain in (1e-3, 1e3):
        training_step = make_training_step(discriminator={"n_ffts": [128], "filters": 2, "gain": gain})
        audio = batch().audio * 1e-2
        found.append(training_step._audio_losses(audio, (0.5 * audio).requires_grad_())["features"].item())
    assert found[0] == pytest.approx(found[1], rel=1e-3)


# Training


def test_discriminators_may_have_a_learning_rate_of_their_own(make_training_step):
    for given, expected in ((None, 1e-3), (2e-3, 2e-3)):
        training_step = make_training_step(lr=1e-3, discriminator={"n_ffts": [128], "filters": 2, "lr": given})
        rates = [
            {group["lr"] for group in optimizer.param_groups}
            for optimizer in (training_step.optimizer, training_step.discriminator_optimizer)
        ]
        assert rates == [{1e-3}, {expected}]


@pytest.mark.parametrize("architecture", ["mimi", "jodio"])
def test_only_discriminators_are_trained_during_their_head_start(make_training_step, architecture):
    """The codebooks of a new codec are initialized after it, too."""
    settings = {"n_ffts": [128], "filters": 2, "head_start": 2}
    training_step = make_training_step(architecture=architecture, discriminator=settings)
    for step in range(3):
        trained = (training_step.generator, training_step.discriminators)
        before = [{name: tensor.clone() for name, tensor in module.state_dict().items()} for module in trained]
        result = training_step(batch(seed=step), step)
        moved = [
            any(not torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
            for module, state in zip(trained, before, strict=True)
        ]
        assert moved == [step == 2, True]
        assert (result.scalars.keys() == {"discriminator"}) is (step < 2) and not result.skipped
    assert all(part.codebooks().any() for part, _ in training_step.codec.quantizer.parts(4))


def test_a_step_of_the_head_start_is_skipped_if_the_discriminators_gradient_overflows(tiny_training, monkeypatch):
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    training_step = TrainingStep(tiny_training(discriminator={"n_ffts": [128], "head_start": 2}), accelerator)
    assert not training_step(batch(), 0).skipped
    backward = accelerator.backward
    monkeypatch.setattr(accelerator, "backward", lambda loss: backward(loss * torch.inf))
    assert training_step(batch(), 1).skipped


@pytest.mark.slow
def test_learning_rates_with_a_head_start(tiny_training, speech):
    """The codec's schedule begins after it; that of the discriminators, with their own rate, at once."""
    settings = {"n_ffts": [128], "filters": 2, "lr": 2e-3, "head_start": 2}
    config = tiny_training(folder=str(speech), steps=6, lr=1e-3, discriminator=settings)
    config.optimizer.schedule = "linear"
    train(config)
    curves = read_curves(Path(config.out))
    codec, discriminators = (curves[name][1] for name in ("rate", "discriminator rate"))
    assert codec == pytest.approx([0, 0, 0.75e-3, 0.5e-3, 0.25e-3, 0])  # as scheduled for the next step
    assert discriminators == pytest.approx([2e-3 * remaining / 6 for remaining in range(5, -1, -1)])


@pytest.mark.slow
def test_a_run_that_stopped_within_the_head_start_resumes_with_the_same_results(
    tiny_training, speech, tmp_path, monkeypatch
):
    loaded = train(tiny_training(folder=str(speech), steps=3, out=str(tmp_path / "first")))
    settings = {"n_ffts": [128], "filters": 2, "head_start": 3}
    options = {"folder": str(speech), "load": str(loaded), "discriminator": settings, "steps": 5, "save_every": 1}
    whole, stopped = (tiny_training(**options, kind="muon", out=str(tmp_path / name)) for name in ("whole", "stopped"))
    whole.optimizer.schedule = stopped.optimizer.schedule = "linear"
    train(whole)
    step = loop.TrainingStep.__call__

    def interrupted(self, batch, number):
        if number == 2:
            raise KeyboardInterrupt
        return step(self, batch, number)

    monkeypatch.setattr(loop.TrainingStep, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(stopped)
    monkeypatch.undo()
    so_far, before = (fastmimi.load(path).state_dict() for path in (Path(stopped.out) / "model", loaded))
    assert all(torch.equal(so_far[name], before[name]) for name in before), "the codec is not trained yet"
    time.sleep(1.1)  # TensorBoard orders log files by the second in their names
    train(stopped)
    expected, found = (read_curves(Path(config.out)) for config in (whole, stopped))
    for name, first in {"discriminator": 1, "rate": 1, "mel": 4}.items():
        assert list(expected[name][0]) == list(found[name][0]) == list(range(first, 6))
        assert found[name][1] == pytest.approx(expected[name][1], rel=1e-4, abs=1e-6), name

"""The losses on the audio, and the balancer of their gradients."""

import pytest
import torch

from fastmimi.devtools.testing import noise
from fastmimi.train import losses

RATE = 24_000


def test_hinge_losses():
    real, fake = [torch.tensor([2.0, 0.5])], [torch.tensor([-3.0, 0.0])]
    assert losses.discriminator_hinge_loss(real, fake).item() == pytest.approx(0.25 + 0.5)
    assert losses.generator_hinge_loss(fake).item() == pytest.approx((4 + 1) / 2)


def test_feature_matching_is_relative():
    real, fake = [[torch.full((2, 3), 4.0), torch.ones(1)]], [[torch.full((2, 3), 5.0), torch.ones(1)]]
    assert losses.feature_matching_loss(real, fake).item() == pytest.approx(0.125)


def test_feature_matching_of_silence_is_finite():
    """Relative to features of magnitude 0, the distance would be infinite."""
    assert losses.feature_matching_loss([[torch.zeros(2, 3)]], [[torch.full((2, 3), 1e-3)]]).item() == pytest.approx(1)


def test_mel_distance_is_logarithmic():
    audio = noise(2, 1, 9600)
    assert losses.mel_distance(audio, audio, RATE).item() == 0
    assert losses.mel_distance(audio, 10 * audio, RATE).item() == pytest.approx(1, rel=1e-3)


def test_mel_distance_of_sounds_below_the_floor_is_0():
    quiet = 1e-2 * noise(1, 1, 9600)
    assert losses.mel_distance(quiet, 0 * quiet, RATE) > 0.1
    assert losses.mel_distance(quiet, 0 * quiet, RATE, floor=1e-2).item() == 0


def test_mel_distance_has_a_gradient_after_an_evaluation():
    losses._window.cache_clear(), losses._mel_filters.cache_clear()
    audio = noise(1, 1, 9600)
    with torch.inference_mode():
        losses.mel_distance(audio, 2 * audio, RATE)
    other = noise(1, 1, 9600, seed=1).requires_grad_()
    losses.mel_distance(audio, other, RATE).backward()
    assert other.grad.any()


def test_spectrum_distance_compresses_magnitudes():
    """Magnitudes of a spectrum that is x^(1 / 0.3) times as large are compressed to x times theirs."""
    audio = noise(2, 1, 9600)
    silence = losses.spectrum_distance(audio, 0 * audio)
    louder = losses.spectrum_distance(2 ** (1 / 0.3) * audio, 0 * audio)
    assert louder.item() == pytest.approx(2 * silence.item(), rel=1e-3)
    assert losses.spectrum_distance(audio, audio).item() == 0


def test_spectrum_distance_depends_on_phases():
    audio = noise(2, 1, 9600)
    assert losses.mel_distance(audio, -audio, RATE).item() == 0
    assert losses.spectrum_distance(audio, -audio) == pytest.approx(2 * losses.spectrum_distance(audio, 0 * audio))


def test_spectrum_distance_of_silence_has_a_finite_gradient():
    silence = torch.zeros(1, 1, 9600, requires_grad=True)
    losses.spectrum_distance(noise(1, 1, 9600), silence).backward()
    assert silence.grad.isfinite().all() and silence.grad.any()


def test_the_balancer_weights_gradients_by_their_norms():
    balancer = losses.Balancer({"a": 1.0, "b": 3.0}, norm=2.0, decay=0.5)
    audio = noise(4, 1, 100).requires_grad_()
    first, second = torch.zeros(4, 1, 100), torch.zeros(4, 1, 100)
    first[..., :50], second[..., 50:] = 1e-4, 1e5
    for _ in range(3):
        gradient = balancer({"a": (audio * first).sum(), "b": (audio * second).sum()}, audio)
    norms = gradient.flatten(1)[:, :50].norm(dim=1), gradient.flatten(1)[:, 50:].norm(dim=1)
    assert norms[0].tolist() == pytest.approx([0.5] * 4) and norms[1].tolist() == pytest.approx([1.5] * 4)

"""The losses on the audio, and the balancer of their gradients (EnCodec, arXiv 2210.13438, section 3.4)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank

from .distributed import all_reduce_sum, rank_and_world_size

# STFT window length: number of mel bands (arXiv 2306.06546, section 3.5)
MEL_SCALES = {32: 5, 64: 10, 128: 20, 256: 40, 512: 80, 1024: 160, 2048: 320}
SPECTRUM_SCALES = (128, 512, 2048)  # STFT window lengths of the loss on complex spectra
COMPRESSION = 0.3  # exponent of their magnitudes, as is usual in speech enhancement (arXiv 2009.12286)
MEL_FLOOR = 1e-5  # magnitude to which mel bands are clamped before the logarithm
SILENCE = 1e-3  # mean magnitude below which features are those of silence; speech gives some hundredths

Features = list[list[Tensor]]  # by scale, then by layer


def discriminator_hinge_loss(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    """Hinge loss of the discriminators: real logits should exceed 1, fake ones lie below -1; mean over the scales."""
    terms = [(1 - r).relu().mean() + (1 + f).relu().mean() for r, f in zip(real, fake, strict=True)]
    return torch.stack(terms).mean()


def generator_hinge_loss(fake: list[Tensor]) -> Tensor:
    """Hinge loss of the codec: the logits of decoded audio should exceed 1; mean over the scales."""
    return torch.stack([(1 - f).relu().mean() for f in fake]).mean()


def feature_matching_loss(real: Features, fake: Features, silence: float = SILENCE) -> Tensor:
    """L1 distance of features divided by the mean magnitude of the real ones; mean over layers and scales.

    The mean magnitude is taken over all processes, and is at least `silence`.
    """
    pairs = [(r.detach(), f) for scale in zip(real, fake, strict=True) for r, f in zip(*scale, strict=True)]
    magnitudes = all_reduce_sum(torch.stack([r.abs().mean() for r, _ in pairs])) / rank_and_world_size()[1]
    distances = torch.stack([(r - f).abs().mean() for r, f in pairs])
    return (distances / magnitudes.clamp(min=silence)).mean()


@cache
def _window(length: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it is cached: a later call may need it for autograd
        return torch.hann_window(length, device=device)


@cache
def _mel_filters(window: int, rate: int, device: torch.device) -> Tensor:
    """The mel filters [bins, bands]."""
    bins = window // 2 + 1
    filters = mel_filter_bank(bins, MEL_SCALES[window], 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney")
    with torch.inference_mode(False):
        return torch.tensor(filters, dtype=torch.float32, device=device)


def _spectrum(audio: Tensor, window: int) -> Tensor:
    """Audio [B, C, N] -> its STFT [B * C, bins, frames, 2] in fp32: real and imaginary parts."""
    flat, hann = audio.flatten(0, 1).float(), _window(window, audio.device)
    return torch.view_as_real(torch.stft(flat, window, window // 4, window=hann, normalized=True, return_complex=True))


def log_mel(audio: Tensor, window: int, rate: int, floor: float = MEL_FLOOR) -> Tensor:
    """Audio [B, C, N] -> log10 of its mel bands [B * C, bands, frames], which are at least `floor`."""
    with torch.autocast(audio.device.type, enabled=False):
        power = _spectrum(audio, window).square().sum(dim=-1)
        filters = _mel_filters(window, rate, audio.device)
        return (filters.T @ (power + 1e-12).sqrt()).clamp(min=floor).log10()


def mel_distance(real: Tensor, fake: Tensor, rate: int, floor: float = MEL_FLOOR) -> Tensor:
    """Multi-scale mel loss: mean absolute difference of the log-mel spectra of audio [B, C, N], over `MEL_SCALES`."""
    spectra = ([log_mel(audio, window, rate, floor) for audio in (real, fake)] for window in MEL_SCALES)
    return torch.stack([(a - b).abs().mean() for a, b in spectra]).mean()


def spectrum_distance(real: Tensor, fake: Tensor) -> Tensor:
    """Mean absolute difference of the complex spectra of audio [B, C, N], real and imaginary parts apart, over
    `SPECTRUM_SCALES`.

    The magnitudes are raised to the power of `COMPRESSION`, so that quiet frequencies count too; phases are kept.
    """
    spectra = ([_compressed_spectrum(audio, window) for audio in (real, fake)] for window in SPECTRUM_SCALES)
    return torch.stack([(a - b).abs().mean() for a, b in spectra]).mean()


def _compressed_spectrum(audio: Tensor, window: int) -> Tensor:
    with torch.autocast(audio.device.type, enabled=False):
        spectrum = _spectrum(audio, window)
        power = spectrum.square().sum(dim=-1, keepdim=True) + 1e-8  # below a magnitude of 1e-4 spectra are linear
        return spectrum * power ** ((COMPRESSION - 1) / 2)


class Balancer(nn.Module):
    """The loss balancer of EnCodec: sums the losses' gradients with respect to the audio, rescaled by their norms.

    Each gradient is divided by an exponential moving average of its norm (the mean over the items of a batch and over
    all processes), and multiplied by its loss's share of the sum of all weights and by `norm`. How much a loss
    contributes thus depends on its weight and not on its scale.
    """

    def __init__(self, weights: dict[str, float], norm: float, decay: float):
        super().__init__()
        self.weights, self.norm, self.decay = weights, norm, decay
        for name in weights:
            # moving averages of the norm and of 1, both from 0: their ratio has no bias towards 0
            self.register_buffer(name, torch.zeros(2))

    def forward(self, losses: dict[str, Tensor], audio: Tensor) -> Tensor:
        """Losses that are functions of `audio` [B, C, N], a leaf that requires gradients -> one gradient [B, C, N]."""
        gradients = [torch.autograd.grad(loss, audio, retain_graph=True)[0] for loss in losses.values()]
        norms = torch.stack([gradient.flatten(1).norm(dim=1).mean() for gradient in gradients])
        norms = all_reduce_sum(norms) / rank_and_world_size()[1]
        total = sum(self.weights[name] for name in losses)
        combined = torch.zeros_like(audio)
        for name, gradient, norm in zip(losses, gradients, norms, strict=True):
            running = self.get_buffer(name)
            running.mul_(self.decay).add_(torch.stack([norm, torch.ones_like(norm)]) * (1 - self.decay))
            combined += self.weights[name] / total / (running[0] / running[1]).clamp(min=1e-12) * gradient
        return combined * self.norm

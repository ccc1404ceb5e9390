"""The losses on audio, and the balancer that weighs their gradients (EnCodec, arXiv 2210.13438, section 3.4)."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank

from .processes import place, sum_of_all

MEL_SCALES = {32: 5, 64: 10, 128: 20, 256: 40, 512: 80, 1024: 160, 2048: 320}  # window: bands (arXiv 2306.06546, 3.5)
FLOOR = 1e-5  # of a band, before the logarithm
SILENT = 1e-3  # features of less are of silence: some hundredths are those of speech

Features = list[list[Tensor]]  # of each scale, of each layer


def discriminator_hinge(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    """Logits of real audio above 1, of decoded audio below -1; the mean over the scales."""
    terms = [(1 - r).relu().mean() + (1 + f).relu().mean() for r, f in zip(real, fake, strict=True)]
    return torch.stack(terms).mean()


def adversarial(fake: list[Tensor]) -> Tensor:
    """Hinge of the codec: logits of decoded audio above 1."""
    return torch.stack([(1 - f).relu().mean() for f in fake]).mean()


def feature_matching(real: Features, fake: Features) -> Tensor:
    """L1 between features, as a share of what the real ones are in all processes; the mean over layers and scales."""
    pairs = [(r.detach(), f) for scales in zip(real, fake, strict=True) for r, f in zip(*scales, strict=True)]
    sizes = sum_of_all(torch.stack([r.abs().mean() for r, _ in pairs])) / place()[1]
    distances = torch.stack([(r - f).abs().mean() for r, f in pairs])
    return (distances / sizes.clamp(min=SILENT)).mean()


@cache
def _bands(window: int, rate: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Hann window and mel filters [bins, bands]."""
    bins = window // 2 + 1
    filters = mel_filter_bank(bins, MEL_SCALES[window], 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney")
    with torch.inference_mode(False):  # they are kept, and training may ask for them next
        return torch.hann_window(window, device=device), torch.tensor(filters, dtype=torch.float32, device=device)


def log_mel(audio: Tensor, window: int, rate: int) -> Tensor:
    """Audio [B, C, N] -> decimal logarithms of mel bands [B * C, bands, frames]."""
    shape, filters = _bands(window, rate, audio.device)
    flat = audio.flatten(0, 1).float()
    with torch.autocast(audio.device.type, enabled=False):
        spectrum = torch.stft(flat, window, window // 4, window=shape, normalized=True, return_complex=True)
        power = torch.view_as_real(spectrum).square().sum(dim=-1)
        return (filters.T @ (power + 1e-12).sqrt()).clamp(min=FLOOR).log10()


def mel_distance(real: Tensor, fake: Tensor, rate: int) -> Tensor:
    """Mean absolute difference of the log-mel spectra [B, C, N], the mean over `MEL_SCALES`."""
    scales = [(log_mel(real, window, rate) - log_mel(fake, window, rate)).abs().mean() for window in MEL_SCALES]
    return torch.stack(scales).mean()


class Balancer(nn.Module):
    """Adds gradients in the audio so that each one's share of the norm is its weight's share of all weights.

    Norms are running means over the items of a batch; the result has the norm `norm` for each item.
    """

    def __init__(self, weights: dict[str, float], norm: float, decay: float):
        super().__init__()
        self.weights, self.norm, self.decay = weights, norm, decay
        for name in weights:
            self.register_buffer(name, torch.zeros(2))  # running sum of the norm, and of the weight of that sum

    def forward(self, losses: dict[str, Tensor], audio: Tensor) -> Tensor:
        """Losses of audio [B, C, N], which requires gradients -> one gradient [B, C, N]."""
        gradients = [torch.autograd.grad(loss, audio, retain_graph=True)[0] for loss in losses.values()]
        norms = torch.stack([gradient.flatten(1).norm(dim=1).mean() for gradient in gradients])
        norms = sum_of_all(norms) / place()[1]
        total = sum(self.weights[name] for name in losses)
        combined = torch.zeros_like(audio)
        for name, gradient, norm in zip(losses, gradients, norms, strict=True):
            running: Any = self.get_buffer(name)
            running.mul_(self.decay).add_(torch.stack([norm, torch.ones_like(norm)]) * (1 - self.decay))
            combined += self.weights[name] / total / (running[0] / running[1]).clamp(min=1e-12) * gradient
        return combined * self.norm

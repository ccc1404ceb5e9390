"""Multi-scale STFT discriminators (EnCodec, arXiv 2210.13438, section 3.4), with Mimi's sizes.

Each looks at one resolution: real and imaginary parts of the STFT are the channels of an image [frames, bins], which
convolutions under weight norm widen in time and halve in frequency. What they compute on the way are the features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from .config import DiscriminatorConfig
from .initial import keep_the_power

SLOPE = 0.2  # of LeakyReLU below 0


class StftDiscriminator(nn.Module):
    """Audio [B, C, N] -> logits [B, 1, frames, bins] and the features before them."""

    window: Tensor

    def __init__(self, n_fft: int, filters: int, channels: int):
        super().__init__()
        self.n_fft = n_fft
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

        def conv(into: int, kernel: tuple[int, int], dilation: int = 1, stride: int = 1) -> nn.Module:
            pad = (kernel[0] // 2 * dilation, kernel[1] // 2)
            layer = nn.Conv2d(into, filters, kernel, (1, stride), padding=pad, dilation=(dilation, 1))
            return weight_norm(layer)

        self.layers = nn.ModuleList(
            [
                conv(2 * channels, (3, 9)),
                *(conv(filters, (3, 9), dilation, stride=2) for dilation in (1, 2, 4)),
                conv(filters, (3, 3)),
            ]
        )
        self.last = weight_norm(nn.Conv2d(filters, 1, 3, padding=1))

    def forward(self, audio: Tensor) -> tuple[Tensor, list[Tensor]]:
        batch, channels, _ = audio.shape
        spectrum = torch.stft(
            audio.flatten(0, 1).float(), self.n_fft, self.n_fft // 4, window=self.window, normalized=True,
            return_complex=True,
        )  # [B * C, bins, frames]  # fmt: skip
        x = torch.view_as_real(spectrum).permute(0, 3, 2, 1).reshape(batch, 2 * channels, *spectrum.mT.shape[1:])
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), SLOPE)
            features.append(x)
        return self.last(x), features


class Discriminators(nn.Module):
    """Audio [B, C, N] -> logits of each scale, and the features of each."""

    def __init__(self, config: DiscriminatorConfig, channels: int = 1):
        super().__init__()
        self.scales = nn.ModuleList(StftDiscriminator(n_fft, config.filters, channels) for n_fft in config.n_ffts)
        # PyTorch's biases are larger than what comes of a spectrum: each LeakyReLU stays on one side of 0, the whole is
        # linear, and what is linear does not tell sounds of any phase apart
        keep_the_power(self, gain=(2 / (1 + SLOPE**2)) ** 0.5)

    def forward(self, audio: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        logits, features = zip(*(scale(audio) for scale in self.scales), strict=True)
        return list(logits), list(features)

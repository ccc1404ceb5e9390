"""The multi-scale STFT discriminator of EnCodec (arXiv 2210.13438, section 3.4), with the sizes used for Mimi.

Each scale sees one STFT resolution. The real and imaginary parts of the STFT are the channels of an image [frames,
bins], which goes through weight-normalized 2-D convolutions: dilated in time, with stride 2 in frequency. The
activations of the hidden layers are the features of the feature-matching loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from .config import DiscriminatorConfig
from .initialization import variance_preserving_init_

LEAKY_SLOPE = 0.2  # of LeakyReLU for negative inputs


class STFTDiscriminator(nn.Module):
    """One scale: audio [B, C, N] -> logits [B, 1, frames, bins], and the features of each hidden layer."""

    window: Tensor

    def __init__(self, n_fft: int, filters: int, channels: int, gain: float):
        super().__init__()
        self.n_fft = n_fft
        window = torch.hann_window(n_fft)
        # divided by its norm, like torchaudio's `normalized=True`, which EnCodec uses
        self.register_buffer("window", window * (gain / window.norm()), persistent=False)

        def conv(in_channels: int, kernel: tuple[int, int], dilation: int = 1, stride: int = 1) -> nn.Module:
            pad = (kernel[0] // 2 * dilation, kernel[1] // 2)
            layer = nn.Conv2d(in_channels, filters, kernel, (1, stride), padding=pad, dilation=(dilation, 1))
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
            audio.flatten(0, 1).float(), self.n_fft, self.n_fft // 4, window=self.window, return_complex=True
        )  # [B * C, bins, frames]
        x = torch.view_as_real(spectrum).permute(0, 3, 2, 1).reshape(batch, 2 * channels, *spectrum.mT.shape[1:])
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), LEAKY_SLOPE)
            features.append(x)
        return self.last(x), features


class MultiScaleSTFTDiscriminator(nn.Module):
    """All scales: audio [B, C, N] -> the logits of each scale, and the features of each scale and layer."""

    def __init__(self, config: DiscriminatorConfig, channels: int = 1):
        super().__init__()
        self.scales = nn.ModuleList(
            STFTDiscriminator(n_fft, config.filters, channels, config.gain) for n_fft in config.n_ffts
        )
        # PyTorch's default biases are larger than the activations that a spectrum causes. Every LeakyReLU would see
        # inputs of one sign, so that the network would be linear, and a linear function of the STFT cannot tell signals
        # apart independently of their phase.
        variance_preserving_init_(self, gain=(2 / (1 + LEAKY_SLOPE**2)) ** 0.5)

    def forward(self, audio: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        logits, features = zip(*(scale(audio) for scale in self.scales), strict=True)
        return list(logits), list(features)

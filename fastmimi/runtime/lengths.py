"""How long the results of convolutions are, in samples; integers, or symbols of a trace."""

from __future__ import annotations


def convolved(length: int, kernel: int, stride: int, dilation: int, pad: tuple[int, int]) -> int:
    """Of a convolution of `length` samples; below 1 for an input shorter than the kernel's receptive field."""
    return (length + pad[0] + pad[1] - (kernel - 1) * dilation - 1) // stride + 1


def upsampled(length: int, kernel: int, stride: int, trim: tuple[int, int]) -> int:
    """Of a transposed convolution of `length` samples, whose full result is trimmed left and right."""
    return (length - 1) * stride + kernel - trim[0] - trim[1]

"""Tensors that do not fit together: the kernels of every backend refuse them with the same message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastmimi.devtools.testing import noise
from fastmimi.kernels.cpu import _native
from fastmimi.runtime import dispatch

X, ON = noise(2, 4, 6), torch.tensor([True] * 2)
BOOKS = noise(2, 8, 4)
STATE = {"first": ON, "active": ON}
Q, K = noise(2, 6, 3, 8), noise(2, 2, 3, 8)
RINGS = {"offset": torch.zeros(2, dtype=torch.int64), "active": ON, "window": 3}
Call = Callable[..., Any]
WRONG: dict[str, tuple[str, type[Exception], str, Call]] = {
    "channels": (
        "causal_conv1d", ValueError, "x must have the 5 channels of the weight, got 4", lambda f: f(X, noise(5, 5, 3))
    ),
    "grouped channels": (
        "causal_conv1d", ValueError, "x must have the 6 channels", lambda f: f(X, noise(4, 3, 3), groups=2)
    ),
    "bias": (
        "causal_conv1d", ValueError, r"bias must be \(4,\), got \(1,\)", lambda f: f(X, noise(4, 4, 3), noise(1))
    ),
    "too short": (
        "causal_conv1d", ValueError, r"x and its padding must span the kernel's 9 samples, got 6 \+ 2",
        lambda f: f(X, noise(4, 4, 5), dilation=2, pad=(2, 0)),
    ),
    "too short for streams": (
        "causal_conv1d", ValueError, r"must span the kernel's 5 samples, got 1 \+ 3",
        lambda f: f(X[..., :1], noise(4, 4, 5), stride=2, pad=(3, 0), history=noise(2, 3, 4), **STATE),
    ),
    "history": (
        "causal_conv1d", ValueError, r"history must be contiguous and \(2, 2, 4\), got \(2, 1, 4\)",
        lambda f: f(X, noise(3, 4, 3), pad=(2, 0), history=noise(2, 1, 4), **STATE),
    ),
    "upsampled channels": (
        "causal_conv_transpose1d", ValueError, "x must have the 5 channels of the weight, got 4",
        lambda f: f(X, noise(5, 5, 3)),
    ),
    "upsampled bias": (
        "causal_conv_transpose1d", ValueError, r"bias must be \(4,\), got \(1,\)",
        lambda f: f(X, noise(4, 4, 3), noise(1)),
    ),
    "trim": (
        "causal_conv_transpose1d", ValueError, r"trim must leave some of the 14 samples .* got \(8, 7\)",
        lambda f: f(X, noise(4, 4, 4), stride=2, trim=(8, 7)),
    ),
    "negative trim": (
        "causal_conv_transpose1d", ValueError, r"trim must .* got \(-1, 0\)",
        lambda f: f(X, noise(4, 4, 4), stride=2, trim=(-1, 0)),
    ),
    "history of a transposed convolution": (
        "causal_conv_transpose1d", ValueError, r"history must be contiguous and \(2, 1, 4\), got \(2, 2, 3\)",
        lambda f: f(X, noise(4, 3, 4), stride=2, history=noise(2, 2, 3), **STATE),
    ),
    "unit": (
        "resblock", ValueError, "x must have the 5 channels of the weight, got 4",
        lambda f: f(X, noise(2, 5, 3), noise(2), noise(4, 2, 1), noise(4), pad=(2, 0)),
    ),
    "weight2": (
        "resblock", ValueError, r"weight2 must be \[4, 2, 1\], got \(4, 1, 1\)",
        lambda f: f(X, noise(2, 4, 3), noise(2), noise(4, 1, 1), noise(4), pad=(2, 0)),
    ),
    "length": (
        "resblock", ValueError, "the padding must keep the length 6, got 4",
        lambda f: f(X, noise(2, 4, 3), noise(2), noise(4, 2, 1), noise(4)),
    ),
    "the audio's channels": (
        "audio_resblock", ValueError, "x must have the 1 channels of the weight, got 4",
        lambda f: f(X, noise(2, 4, 3), noise(2), noise(4, 2, 1), noise(4), noise(4, 1, 3), noise(4)),
    ),
    "the unit's channels": (
        "audio_resblock", ValueError, "x must have the 4 channels of the weight, got 5",
        lambda f: f(X[:, :1], noise(2, 4, 3), noise(2), noise(4, 2, 1), noise(4), noise(5, 1, 3), noise(5)),
    ),
    "the audio's bias": (
        "audio_resblock", ValueError, r"bias must be \(1,\), got \(4,\)",
        lambda f: f(X, noise(2, 4, 3), noise(2), noise(4, 2, 1), noise(4), noise(1, 4, 3), noise(4), after=True),
    ),
    "entries": (
        "rvq_encode", ValueError, r"x must be \[N, 4\], like the codebook entries, got \(5, 3\)",
        lambda f: f(noise(5, 3), BOOKS),
    ),
    "levels": (
        "rvq_decode", ValueError, "codes of 3 levels need as many codebooks, got 2",
        lambda f: f(torch.zeros(3, 2, dtype=torch.int64), BOOKS),
    ),
    "codes": (
        "rvq_decode", IndexError, r"codes must lie in \[0, 8\), got 0 to 8",
        lambda f: f(torch.tensor([[0], [8]]), BOOKS),
    ),
    "dtype of codes": (
        "rvq_decode", TypeError, "codes must be int64, got torch.int32",
        lambda f: f(torch.zeros(2, 2, dtype=torch.int32), BOOKS),
    ),
    "heads": (
        "window_attention", ValueError, "the shapes of q, k and v do not match",
        lambda f: f(Q, noise(2, 4, 3, 8), noise(2, 4, 3, 8), noise(4), window=3),
    ),
    "rows": (
        "window_attention", ValueError, "the shapes of q, k and v do not match",
        lambda f: f(Q, K[:1], K[:1], noise(4), window=3),
    ),
    "ring": (
        "window_attention", ValueError, "cache_v must be contiguous and",
        lambda f: f(Q, K, K, noise(4), cache_k=noise(2, 2, 3, 8), cache_v=noise(2, 2, 2, 8), **RINGS),
    ),
}  # fmt: skip


@pytest.fixture(params=["cpu", "onednn", pytest.param("triton", marks=pytest.mark.kernels)])
def backend(request):
    if request.param == "cpu" and not _native.variants():
        pytest.skip("the native library is not built here")
    return request.param


@pytest.mark.parametrize("case", WRONG)
def test_shapes_that_do_not_fit_are_refused(backend: str, case: str) -> None:
    op, error, sentence, call = WRONG[case]
    if dispatch.is_absent(op, backend):
        pytest.skip(f"there is no {backend} kernel of {op}")
    with pytest.raises(error, match=sentence):
        call(dispatch.implementation(op, backend))


def test_codebooks_of_fp64_are_refused_natively() -> None:
    if not _native.variants():
        pytest.skip("the native library is not built here")
    with pytest.raises(TypeError, match="x must be float32 or bfloat16 and codebooks float32"):
        dispatch.implementation("rvq_encode", "cpu")(noise(3, 4).double(), BOOKS.double())

"""What tests and benchmarks share: configurations, random models, inputs, measures of agreement."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .config import CodecConfig
from .errors import InputError
from .model import Mimi
from .weights import random

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_filters": 4,
    "codebook_size": 64,
    "codebook_dim": 16,
    "vector_quantization_hidden_dimension": 16,
    "num_quantizers": 6,
    "upsample_groups": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "sliding_window": 24,
}

# Arguments of transformers' `MimiConfig`, each turning one thing of the architecture.
CONFIGS: dict[str, dict[str, Any]] = {
    "mimi": {},
    "small": SMALL,
    "ratios": {**SMALL, "upsampling_ratios": [5, 4, 2], "kernel_size": 5, "last_kernel_size": 5},
    "residual_layers": {**SMALL, "num_residual_layers": 3, "dilation_growth_rate": 3, "residual_kernel_size": 5},
    "shortcut": {**SMALL, "use_conv_shortcut": True, "compress": 4},
    "semantic": {**SMALL, "num_semantic_quantizers": 2, "num_quantizers": 5},
    "attention": {**SMALL, "num_key_value_heads": 2, "attention_bias": True, "head_dim": 12, "hidden_act": "relu"},
    "rope": {**SMALL, "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
    "unprojected": {**SMALL, "codebook_dim": 32, "vector_quantization_hidden_dimension": 32, "upsample_groups": 1},
    "stereo": {**SMALL, "audio_channels": 2},
    "replicate": {**SMALL, "pad_mode": "replicate"},
    "reflect": {**SMALL, "pad_mode": "reflect"},
    "not_causal": {**SMALL, "use_causal_conv": False},
    "not_causal_reflect": {**SMALL, "use_causal_conv": False, "pad_mode": "reflect"},
    "trim": {**SMALL, "trim_right_ratio": 0.5},
}
STREAMABLE = [name for name, values in CONFIGS.items() if name != "mimi" and CodecConfig.from_dict(values).streamable]


def lengths(frame_size: int, sample_rate: int = 24_000) -> list[int]:
    """Samples that try the edges of frames, and 10.5 s, longer than the attention window."""
    return [1, frame_size - 1, frame_size, frame_size + 1, int(10.5 * sample_rate)]


def small_model(name: str = "small", seed: int = 0, **changes: Any) -> Mimi:
    """A codec of one of the `CONFIGS`, random weights, ready for inference."""
    return random(CodecConfig.from_dict({**CONFIGS[name], **changes}), seed).eval().requires_grad_(False)


def noise(*shape: int, seed: int = 0, scale: float = 0.3) -> Tensor:
    """Normal noise, the same for the same seed whatever the device, on the default device."""
    x = torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu") * scale
    return x.to(torch.get_default_device())


def relative_error(x: Tensor, truth: Tensor) -> float:
    """Largest difference over the truth's peak."""
    assert x.shape == truth.shape, f"{tuple(x.shape)} is not {tuple(truth.shape)}"
    if not truth.numel():
        return 0.0
    return ((x.double() - truth.double()).abs().max() / truth.double().abs().max().clamp(min=1e-30)).item()


def assert_as_exact(mine: Tensor, plain: Tensor, truth: Tensor) -> None:
    """`mine` errs against the fp64 truth at most twice as much as `plain` PyTorch in the same dtype, and a rounding."""
    assert mine.dtype == plain.dtype and mine.shape == truth.shape
    error, allowed = relative_error(mine, truth), 2 * relative_error(plain, truth) + torch.finfo(mine.dtype).eps
    assert error <= allowed, f"off by {error:.2e} of the peak, {allowed:.2e} allowed"


def assert_nearest(codes: Tensor, x: Tensor, codebooks: Tensor) -> None:
    """Codes [L, N] of x [N, D] are, level by level, of the nearest entries in fp64, or of one as near to 1e-6."""
    for rows, code_rows in zip(x.double().split(8192), codes.split(8192, dim=1), strict=True):
        residual = rows
        for code, book in zip(code_rows, codebooks.double(), strict=True):
            nearest = torch.cdist(residual, book).square().amin(dim=1)
            residual = residual - book[code]
            assert (residual.square().sum(dim=1) <= nearest * (1 + 1e-6) + 1e-20).all(), "an entry was nearer"


def assert_same_codes(mine: Tensor, theirs: Tensor, latents: Tensor, core: Mimi) -> None:
    """Codes [B, K, T] are identical, or where a residual chain parts, the two entries are equally near.

    Equally: in fp64, on the `latents` [B, hidden, T] that `core` quantized, to 1e-6 of their squared distance.
    """
    assert mine.shape == theirs.shape, f"{tuple(mine.shape)} is not {tuple(theirs.shape)}"
    semantic, split = core.config.num_semantic_quantizers, core.quantizer
    parts = (split.semantic_residual_vector_quantizer, split.acoustic_residual_vector_quantizer)
    for part, levels in zip(parts, (slice(0, semantic), slice(semantic, None)), strict=True):
        for row, _, frame in (mine[:, levels] != theirs[:, levels]).nonzero().tolist():
            a, b = mine[row, levels, frame], theirs[row, levels, frame]
            level, books = int((a != b).nonzero()[0]), part.codebooks().double()
            latent = latents[row : row + 1, :, frame : frame + 1]
            residual = (latent if part.input_proj is None else part.input_proj(latent))[0, :, 0].double()
            for i in range(level):
                residual = residual - books[i, a[i]]
            near, far = sorted(float((residual - books[level, code[level]]).square().sum()) for code in (a, b))
            assert far - near <= 1e-6 * far, f"row {row}, frame {frame}, level {level}: no tie"


def chunks(total: int, seed: int, longest: int) -> list[int]:
    """Random chunk lengths from 0 to `longest` that add up to `total`."""
    generator = torch.Generator().manual_seed(seed)
    sizes: list[int] = []
    while sum(sizes) < total:
        size = int(torch.randint(0, longest + 1, (1,), generator=generator))
        sizes.append(min(size, total - sum(sizes)))
    return sizes


def check_interpreter(triton: str, numpy: str) -> None:
    """Raise InputError unless the interpreter of this version of Triton runs with this version of NumPy."""
    first_two = [tuple(int(part) for part in version.split(".")[:2]) for version in (triton, numpy)]
    if first_two[0] < (3, 7) and first_two[1] >= (2, 4):
        raise InputError(
            f"the interpreter of Triton {triton} fails with NumPy 2.4 and later, and NumPy {numpy} is installed: "
            "pip install 'numpy<2.4', or 'triton>=3.7'"
        )


def mend_interpreter() -> None:
    """Make Triton's interpreter compute in bfloat16 as GPUs do.

    Up to Triton 3.9 it multiplies bit patterns as integers, and rounds to bfloat16 by cutting off. Raises InputError
    where it cannot run beside the installed NumPy.
    """
    import numpy as np
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    check_interpreter(triton.__version__, np.__version__)
    builder = interpreter.InterpreterBuilder
    original_dot, original_cast = builder.create_dot, builder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.cast_impl(x, tl.float32) for x in (a, b))
        return original_dot(self, a, b, *rest)

    def cast_impl(self: Any, x: Any, dtype: Any) -> Any:
        if (x.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return original_cast(self, x, dtype)
        bits = np.ascontiguousarray(x.data).view(np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # ties to even
        halves = np.where(np.isnan(x.data), 0x7FC0, nearest).astype(np.uint16)
        return interpreter.TensorHandle(halves, tl.bfloat16)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl

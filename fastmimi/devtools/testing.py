"""Shared by tests and benchmarks: configurations, random models and inputs, and measures of agreement."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.func import functional_call

from ..checkpoints.weights import random
from ..errors import InputError
from ..models.codec import Codec
from ..models.config import MimiCodecConfig
from ..models.mimi import Mimi
from ..models.runner import Pass
from ..runtime import tiles

SMALL: dict[str, object] = {
    "hidden_size": 32, "num_filters": 4, "codebook_size": 64, "codebook_dim": 16,
    "vector_quantization_hidden_dimension": 16, "num_quantizers": 6, "upsample_groups": 32, "num_hidden_layers": 2,
    "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4, "sliding_window": 24,
}  # fmt: skip

# Arguments of transformers' `MimiConfig`; each entry varies one aspect of the architecture.
CONFIGS: dict[str, dict[str, object]] = {
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
STREAMABLE = [
    name for name, values in CONFIGS.items() if name != "mimi" and MimiCodecConfig.from_dict(values).streamable
]


def lengths(frame_size: int, sample_rate: int = 24_000) -> list[int]:
    """Numbers of samples around frame boundaries, and 10.5 s, which is longer than the attention window."""
    return [1, frame_size - 1, frame_size, frame_size + 1, int(10.5 * sample_rate)]


def small_model(name: str = "small", seed: int = 0, **changes: object) -> Mimi:
    """A codec with random weights of one of the `CONFIGS`, in eval mode, without gradients."""
    return random(MimiCodecConfig.from_dict({**CONFIGS[name], **changes}), seed).eval().requires_grad_(False)


def noise(*shape: int, seed: int = 0, scale: float = 0.3) -> Tensor:
    """Normal noise on the default device; the same for the same seed on every device."""
    x = torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu") * scale
    return x.to(torch.get_default_device())


def relative_error(x: Tensor, truth: Tensor) -> float:
    """Largest absolute difference, divided by the largest magnitude of `truth`."""
    assert x.shape == truth.shape, f"{tuple(x.shape)} is not {tuple(truth.shape)}"
    if not truth.numel():
        return 0.0
    return ((x.double() - truth.double()).abs().max() / truth.double().abs().max().clamp(min=1e-30)).item()


@dataclass(frozen=True)
class Errors:
    """Largest errors against fp64, relative to its peak; `assert_as_exact` says how they are compared."""

    mine: float  # of the implementation under test
    plain: float  # of plain PyTorch in the same dtype
    bound: float  # of the reference in fp64 with perturbed operands
    eps: float

    @property
    def allowed(self) -> float:
        return min(max(2 * self.plain, self.bound), 2 * self.bound) + self.eps

    def check(self) -> None:
        assert self.mine <= self.allowed, f"off by {self.mine:.2e} of the peak, {self.allowed:.2e} allowed: {self}"


def assert_as_exact(op: Callable[..., Tensor], reference: Callable[..., Tensor], operands: Sequence[Tensor | None],
                    *, longest: int, fixed: Collection[int] = (), **options: object) -> None:  # fmt: skip
    """Raise AssertionError if the error of `op` is larger than its sums, or plain PyTorch, explain.

    The allowed error against the reference in fp64 is one unit in the last place more than the larger of

    - the bound: the change of the reference in fp64 when every element of every operand is perturbed by sqrt(n) + 2
      unit roundoffs with a random sign, where n is the number of terms of the longest sum; the largest of three draws;
    - twice the error of plain PyTorch (the reference in the operands' dtype), but at most twice the bound: on some
      processors PyTorch's result is wrong, and agreement with it then proves nothing.

    PyTorch's error depends on the processor, the bound does not. It is a backward error: a sum of n products rounded
    in any order is, with high probability, the exact sum of products that are each off by at most lambda sqrt(n) unit
    roundoffs, where lambda is a small constant (Higham and Mary, "A New Approach to Probabilistic Rounding Error
    Analysis", SIAM J. Sci. Comput. 41(5), 2019). Here lambda is 1, and the signs are independent, which suits
    products of mean zero, such as those with random weights ("Sharper Probabilistic Backward Error Analysis for Basic
    Linear Algebra Kernels with Random Data", by the same, 42(5), 2020). The 2 accounts for activations, biases and
    residuals, which are not sums. In half precision sums are still in fp32: sqrt(n) multiplies the unit roundoff of
    fp32, and 2 that of the dtype.

    tests/devtools/test_testing.py shows what this accepts and refuses; `make numerics` shows how close to the bound
    errors come.

    `operands` are positional. None, integers and those at the indices in `fixed` are neither widened nor perturbed.
    """
    errors(op, reference, operands, longest=longest, fixed=fixed, **options).check()


def errors(op: Callable[..., Tensor], reference: Callable[..., Tensor], operands: Sequence[Tensor | None],
           *, longest: int, fixed: Collection[int] = (), **options: object) -> Errors:  # fmt: skip
    """The errors that `assert_as_exact` compares."""
    mine, plain = op(*operands, **options), reference(*operands, **options)
    assert mine.dtype == plain.dtype
    truth, bound = exact(reference, operands, mine.dtype, longest=longest, fixed=fixed, **options)
    return Errors(relative_error(mine, truth), relative_error(plain, truth), bound, torch.finfo(mine.dtype).eps)


def exact(reference: Callable[..., Tensor], operands: Sequence[Tensor | None], dtype: torch.dtype,
          *, longest: int, fixed: Collection[int] = (), **options: object) -> tuple[Tensor, float]:  # fmt: skip
    """The reference in fp64, and the bound of `assert_as_exact` for computing it in `dtype`."""
    rounded = {i: t for i, t in enumerate(operands) if i not in fixed and t is not None and t.is_floating_point()}

    def in_fp64(factors: Sequence[Tensor | float]) -> Tensor:
        given = list(operands)
        for (i, operand), factor in zip(rounded.items(), factors, strict=True):
            given[i] = operand.double() * factor
        return reference(*given, **options)

    truth, bound = in_fp64([1.0] * len(rounded)), 0.0
    size = longest**0.5 * torch.finfo(torch.float32).eps / 2 + torch.finfo(dtype).eps
    generator = torch.Generator("cpu").manual_seed(0)
    for _ in range(3):
        factors = [1 + size * _signs(operand, generator).double() for operand in rounded.values()]
        bound = max(bound, relative_error(in_fp64(factors), truth))
    return truth, bound


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """A tensor of random signs, 1 or -1."""
    signs = torch.randint(0, 2, like.shape, generator=generator, device="cpu", dtype=torch.int8) * 2 - 1
    return signs.to(like.device)


def as_function(model: Mimi, method: str) -> Callable[..., Tensor]:
    """A method of the model as a function of its input and of all parameters; it computes in their dtype."""

    class Method(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return getattr(self.model, method)(x)

    module = Method()
    names = [name for name, _ in module.named_parameters()]
    return lambda x, *parameters: functional_call(module, dict(zip(names, parameters, strict=True)), (x,))


def longest_sum(model: torch.nn.Module) -> int:
    """The number of terms of the longest sum in the model's linear and convolutional layers."""
    lengths = [0]
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv1d):
            lengths.append(layer.weight[0].numel())
        elif isinstance(layer, torch.nn.ConvTranspose1d):
            taps = -(-layer.kernel_size[0] // layer.stride[0])  # that contribute to one output
            lengths.append(layer.in_channels // layer.groups * taps)
    return max(lengths)


def assert_nearest(codes: Tensor, x: Tensor, codebooks: Tensor) -> None:
    """Assert that codes [L, N] of x [N, D] name the nearest entry of each level in fp64, or one as near to 1e-6."""
    for rows, code_rows in zip(x.double().split(8192), codes.split(8192, dim=1), strict=True):
        residual = rows
        for code, book in zip(code_rows, codebooks.double(), strict=True):
            nearest = torch.cdist(residual, book).square().amin(dim=1)
            residual = residual - book[code]
            assert (residual.square().sum(dim=1) <= nearest * (1 + 1e-6) + 1e-20).all(), "another entry is nearer"


def assert_same_codes(mine: Tensor, theirs: Tensor, latents: Tensor, core: Codec) -> None:
    """Assert that codes [B, K, T] are identical, or at the first level where those of a frame differ, a tie.

    A tie: in fp64, the squared distances of the two entries to the residual of the `latents` [B, hidden, T] that `core`
    quantized are equal to 1e-6.
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
            assert far - near <= 1e-6 * far, f"row {row}, frame {frame}, level {level}: not a tie"


def chunks(total: int, seed: int, longest: int) -> list[int]:
    """Random chunk lengths from 0 to `longest` that add up to `total`."""
    generator = torch.Generator().manual_seed(seed)
    sizes: list[int] = []
    while sum(sizes) < total:
        size = int(torch.randint(0, longest + 1, (1,), generator=generator))
        sizes.append(min(size, total - sum(sizes)))
    return sizes


@contextmanager
def short_tiles(model: Mimi, batch: int, frames: int) -> Iterator[list[int]]:
    """Within the context, audio runs in tiles of `frames` frames, and in the shortest subtiles that a CPU has.

    Only audio longer than a tile, or on a CPU longer than a subtile (4 frames), is tiled. Yields a list that gets the
    length of the input of each tiled pass.
    """
    tiled: list[int] = []
    in_tiles = Pass.in_tiles

    def recorded(self: Pass, x: Tensor, *arguments: Any) -> Tensor:
        tiled.append(x.shape[-1])
        return in_tiles(self, x, *arguments)

    samples = batch * model.frame_size * frames
    limits: dict[str, Any] = {"TILE_SAMPLES": samples, "TILE_SAMPLES_ACCELERATOR": samples, "SUBTILE_SAMPLES": 0}
    with mock.patch.multiple(tiles, **limits), mock.patch.object(Pass, "in_tiles", recorded):
        yield tiled


def check_interpreter(triton: str, numpy: str) -> None:
    """Raise InputError if the interpreter of this version of Triton fails with this version of NumPy."""
    first_two = [tuple(int(part) for part in version.split(".")[:2]) for version in (triton, numpy)]
    if first_two[0] < (3, 7) and first_two[1] >= (2, 4):
        raise InputError(
            f"the interpreter of Triton {triton} fails with NumPy 2.4 and later, and NumPy {numpy} is installed: "
            "pip install 'numpy<2.4', or 'triton>=3.7'"
        )


def patch_triton_interpreter() -> None:
    """Patch Triton's interpreter to round as GPUs do.

    Up to Triton 3.9 it multiplies the bit patterns of bfloat16 as integers, truncates where it should round to nearest,
    and multiplies in fp32 where tensor cores multiply in TF32. What it still cannot show: the order of a GPU's sums,
    and races, since its programs run one after another. Raises InputError if it cannot run with the installed NumPy.
    """
    import numpy as np
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    check_interpreter(triton.__version__, np.__version__)
    builder = interpreter.InterpreterBuilder
    original_dot, original_cast = builder.create_dot, builder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, total: Any, precision: Any, *rest: Any) -> Any:
        def dot(x: Any, y: Any, total: Any) -> Any:
            return original_dot(self, x, y, total, precision, *rest)

        if a.dtype.scalar == tl.bfloat16:
            return dot(self.cast_impl(a, tl.float32), self.cast_impl(b, tl.float32), total)
        kind = str(precision).rpartition(".")[2]
        if a.dtype.scalar != tl.float32 or kind not in ("TF32", "TF32x3"):
            return dot(a, b, total)
        parts = [tf32_parts(np.ascontiguousarray(x.data)) for x in (a, b)]
        (high_a, low_a), (high_b, low_b) = ([interpreter.TensorHandle(x, tl.float32) for x in pair] for pair in parts)
        if kind == "TF32":
            return dot(high_a, high_b, total)
        zero = interpreter.TensorHandle(np.zeros_like(total.data), total.dtype)
        small = dot(high_a, low_b, dot(low_a, high_b, zero))
        small.data = np.nan_to_num(small.data, nan=0.0)  # of infinities, which have no low part; as Triton does
        return dot(high_a, high_b, self.create_fadd(total, small))

    def cast_impl(self: Any, x: Any, dtype: Any) -> Any:
        if (x.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return original_cast(self, x, dtype)
        bits = np.ascontiguousarray(x.data).view(np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # ties to even
        halves = np.where(np.isnan(x.data), 0x7FC0, nearest).astype(np.uint16)
        return interpreter.TensorHandle(halves, tl.bfloat16)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl


def tf32_parts(x: Any) -> tuple[Any, Any]:
    """fp32 numpy values as the sum of two that TF32, with 11 significant bits, represents, as far as they go."""
    import numpy as np

    def rounded(x: Any) -> Any:
        bits = (x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
        return np.where(np.isfinite(x), bits.view(np.float32), x)

    high = rounded(x)
    with np.errstate(invalid="ignore"):
        return high, rounded(x - high)


def result_or_none(make: Callable[[], Any]) -> Any:
    """The result of `make`, or None if it raises an InputError, whose message must be one line."""
    try:
        return make()
    except InputError as error:
        sentence = str(error)
        assert sentence and "\n" not in sentence and len(sentence) < 2000
        return None

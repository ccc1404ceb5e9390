"""Muon for the matrices of a codec, AdamW for its other parameters.

Muon (https://kellerjordan.github.io/posts/muon) replaces the update of a matrix, its gradient with momentum, by the
nearest semi-orthogonal matrix, so that directions with small gradients are learnt as fast as those with large ones.
PyTorch has it from 2.9 on, for two-dimensional parameters only; here a convolution's weight [out, in, taps] counts as a
matrix [out, in * taps].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

SMALLEST = 16  # rows or columns; what has fewer is left to AdamW
MOMENTUM, ITERATIONS = 0.95, 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz iteration; singular values end within [0.7, 1.2]
# The root mean square of an update of AdamW is 0.2 to 0.4 of the learning rate: with this factor the same rates suit
# both (arXiv 2502.16982, section 2.2).
MATCHED_RMS = 0.2


class Muon(AdamW):
    """AdamW, except that matrices are updated by Muon, with the same learning rates and weight decay.

    `step` releases the gradients of the matrices.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have gradients; `closure` must be None."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is not None and is_matrix(parameter):
                    self._update(parameter, gradient, group["lr"], group["weight_decay"])
                    parameter.grad = None
        return super().step()

    def _update(self, matrix: Tensor, gradient: Tensor, rate: float, decay: float) -> None:
        state = self.state[matrix]
        if not state:
            state["step"] = torch.zeros(())  # which AdamW expects of every state that it loads
            state["momentum"] = torch.zeros_like(matrix)
        state["step"] += 1
        momentum = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        update = orthogonalized(gradient.lerp(momentum, MOMENTUM).flatten(1)).view_as(matrix)
        scale = MATCHED_RMS * max(matrix.flatten(1).shape) ** 0.5
        matrix.mul_(1 - rate * decay).add_(update, alpha=-rate * scale)


def is_matrix(parameter: Tensor) -> bool:
    """Whether Muon updates a parameter: [out, in] or [out, in, taps] with enough outputs, and inputs times taps."""
    return parameter.ndim > 1 and min(parameter.flatten(1).shape) >= SMALLEST


def orthogonalized(matrix: Tensor) -> Tensor:
    """Nearly the nearest semi-orthogonal matrix to one [M, N], in fp32; singular values are about 1."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.t() if tall else matrix
    x = (x / (x.norm() + 1e-7)).to(_fast_dtype(matrix.device))
    if x.dtype == torch.float32 and x.shape[1] > 2 * x.shape[0]:
        x = _product_of_polynomials(x @ x.t()) @ x
    else:
        for _ in range(ITERATIONS):
            x = _polynomial(x @ x.t()) @ x
    return (x.t() if tall else x).to(matrix.dtype).contiguous()


def _polynomial(gram: Tensor) -> Tensor:
    """What one Newton-Schulz iteration multiplies x by, from x x^T [M, M]."""
    a, b, c = COEFFICIENTS
    result = torch.addmm(gram, gram, gram, beta=b, alpha=c)
    result.diagonal().add_(a)
    return result


def _product_of_polynomials(gram: Tensor) -> Tensor:
    """The same of all iterations: fewer operations if x is wide, but bf16 is too inexact for it."""
    product = polynomial = _polynomial(gram)
    for _ in range(ITERATIONS - 1):
        gram = polynomial @ gram @ polynomial  # of the x of the next iteration
        polynomial = _polynomial(gram)
        product = polynomial @ product
    return product


def _fast_dtype(device: torch.device) -> torch.dtype:
    """bf16, which is exact enough, where the device multiplies it."""
    onednn = device.type == "cpu" and torch.backends.mkldnn.is_available()
    fast = device.type == "cuda" or (onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.bfloat16 if fast else torch.float32

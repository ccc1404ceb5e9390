"""Registers kernels as PyTorch ops (`torch.library`): schema, fake and autograd, so that tracing can pass them.

A kernel of an op becomes `fastmimi::<op>_<backend>` and, if the op streams, also `fastmimi::<op>_<backend>_step`, which
mutates the state and has no gradient. The backward pass, `fastmimi::<op>_backward`, recomputes the op with the
reference and differentiates that: gradients are the reference's, and no intermediate results are kept. There is no
second derivative.

The reference is not registered: PyTorch traces it, compiles it, and exports it as plain ATen.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .ops import OPS, Op

Implementation = Callable[..., Tensor]
Exactly = Callable[[Tensor], AbstractContextManager[None]]

_library = torch.library.Library("fastmimi", "DEF")
_defined: dict[str, Any] = {}


def register(op: str, kind: str, kernel: Implementation, reference: Implementation, exactly: Exactly) -> Implementation:
    """The kernel as a PyTorch op with the signature of its reference; `exactly(x)` keeps backward in true fp32."""
    schema, name = OPS[op], f"{op}_{kind}"
    if name not in _defined:

        def run(*tensors: Tensor | None, **options: object) -> Tensor:
            return kernel(**dict(zip(schema.names, tensors, strict=False)), **options)

        _define(name, f"{schema.tensors}{_keywords(schema.options)}", run, schema.fake)
        if schema.state:
            keywords = _keywords(f"{schema.state}, {schema.options}")
            _define(f"{name}_step", f"{schema.tensors}{keywords}", run, schema.fake)
        if schema.differentiable:
            _differentiate(op, name, schema, reference, exactly)
    offline, step = _defined[name], _defined.get(f"{name}_step")
    names, state = schema.names, schema.state_names

    def call(*tensors: Tensor | None, **options: Any) -> Tensor:
        dropouts = {key: options.pop(key, 0.0) for key in ("dropout", "residual_dropout")}
        if any(dropouts.values()):  # in training: backward would need the same dropout mask
            return reference(*tensors, **{key: p for key, p in dropouts.items() if p}, **options)
        if callable(options.get("activation")):  # a function of transformers: schemas have no type for it
            return reference(*tensors, **options)
        tensors += tuple(options.pop(name, None) for name in names[len(tensors) :])
        if step is not None and options.get(state[0]) is not None:
            return step(*tensors, **options)
        return offline(*tensors, **options)

    return call


def _keywords(options: str) -> str:
    return f", *, {options}" if options else ""


def _define(
    name: str, arguments: str, function: Callable[..., object], fake: Callable[..., object], gives: str = "Tensor"
) -> None:
    _library.define(f"{name}({arguments}) -> {gives}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastmimi::{name}", fake, lib=_library)
    _defined[name] = getattr(torch.ops.fastmimi, name)


def _differentiate(op: str, name: str, schema: Op, reference: Implementation, exactly: Exactly) -> None:
    names = schema.names
    back = f"{op}_backward"

    def gradients(grad: Tensor, *inputs: Any, **options: object) -> list[Tensor]:
        *tensors, needs = inputs
        with torch.enable_grad():
            tensors = [t if t is None else t.detach().requires_grad_(n) for t, n in zip(tensors, needs, strict=True)]
            y = reference(**dict(zip(names, tensors, strict=True)), **options)
            wanted = [t for t in tensors if t is not None and t.requires_grad]
            with exactly(grad):  # backward convolutions must not use TF32 either
                return [g.contiguous() for g in torch.autograd.grad(y, wanted, grad)]

    def fake(grad: Tensor, *inputs: Any, **options: object) -> list[Tensor]:
        *tensors, needs = inputs
        return [t.new_empty(t.shape) for t, need in zip(tensors, needs, strict=True) if need]

    if back not in _defined:
        arguments = f"Tensor grad, {_without_defaults(schema.tensors)}, bool[] needs{_keywords(schema.options)}"
        _define(back, arguments, gradients, fake, "Tensor[]")

    def remember(
        ctx: Any, inputs: tuple[object, ...], output: object, keyword_only_inputs: dict[str, object] | None = None
    ) -> None:
        ctx.save_for_backward(*inputs)
        ctx.options = keyword_only_inputs or {}

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, given = ctx.saved_tensors, list(ctx.needs_input_grad)
        needs = given + [False] * (len(inputs) - len(given))  # PyTorch leaves out defaults at the end
        found = iter(_defined[back](grad, *inputs, needs, **ctx.options))
        return tuple(next(found) if need else None for need in given)

    torch.library.register_autograd(f"fastmimi::{name}", backward, setup_context=remember, lib=_library)


def _without_defaults(tensors: str) -> str:
    return ", ".join(tensor.partition("=")[0] for tensor in tensors.split(", "))

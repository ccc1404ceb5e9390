"""Layer-by-layer comparison of two ways to compute the same: backends, ported models, a stream and the whole.

whole = record(model, lambda: model.encode(audio))
stream = record(model, lambda: [model.encode(chunk, state=state) for chunk in chunks])
print(compare(whole, stream))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checkpoints.weights import flat_name
from ..errors import InputError
from ..models.seanet import CausalConv1d, ResBlock
from ..models.transformer import Transformer

Recording = dict[str, Tensor]
RESULT = "result"


@dataclass(frozen=True)
class Row:
    """One layer. `shape` is [B, C, T]; `difference` the largest one, over the peak of the first recording.

    first: the time index from which on it exceeds the tolerance, None if it does not. Integers must be equal.
    """

    layer: str
    shape: tuple[int, ...]
    difference: float
    first: int | None


@dataclass(frozen=True)
class Comparison:
    """The rows of all layers that both recordings have, in order of execution; printable."""

    rows: list[Row]

    @property
    def first(self) -> Row | None:
        """The first layer that differs, None if none does."""
        return next((row for row in self.rows if row.first is not None), None)

    def __str__(self) -> str:
        width = max(len(row.layer) for row in self.rows)
        lines = [f"{'layer':{width}}  {'shape':18}  difference  from"]
        for row in self.rows:
            shape = " x ".join(map(str, row.shape))
            start = "" if row.first is None else f"{row.first:4}" + (" <- first" if row is self.first else "")
            lines.append(f"{row.layer:{width}}  {shape:18}  {row.difference:10.1e}  {start}".rstrip())
        return "\n".join(lines)


@torch.no_grad()
def record(model: nn.Module, call: Callable[[], Tensor | Iterable[Tensor]]) -> Recording:
    """What every module of `model` returns during `call()`, by its name, in order of execution, and the result.

    Outputs of several calls of a module (chunks of a stream, tiles) are joined along time, and all have time last:
    [B, C, T]. Modules that are only owners of parameters, which an op reads, do not appear. Hooks are removed at the
    end; while there are any, no recorded step runs (runtime/cpu_graphs.py). Modules of transformers have the names that
    they have in its checkpoints and here.
    """
    found: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, _: object, output: object) -> None:
            y = next(_tensors_of(output), None)
            if y is not None:
                found.setdefault(name, []).append((y.mT if _time_is_second(name, module) else y).detach().clone())

        return hook

    names = {_result_name(flat_name(name), part): part for name, part in model.named_modules()}  # the inner of two
    handles = [module.register_forward_hook(keep(name)) for name, module in names.items() if name]
    try:
        found[RESULT] = list(_tensors_of(call()))
    finally:
        for handle in handles:
            handle.remove()
    found[RESULT] = found.pop(RESULT)  # last
    return {name: torch.cat(parts, dim=-1) for name, parts in found.items() if parts}


def compare(mine: Recording, theirs: Recording, tolerance: float = 1e-5) -> Comparison:
    """Compare two recordings by layer; where one is longer in time, as far as the other goes.

    tolerance: largest difference, over the peak of `mine`. Raises InputError if no layer is in both, or if a layer's
    shapes differ in anything but time.
    """
    names = [name for name in mine if name in theirs]
    if not names:
        raise InputError(f"the recordings have no layer in common: {_some(mine)}, and {_some(theirs)}")
    return Comparison([_row(name, mine[name], theirs[name], tolerance) for name in names])


def _row(name: str, a: Tensor, b: Tensor, tolerance: float) -> Row:
    if a.shape[:-1] != b.shape[:-1]:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise InputError(f"{name} must have the same shape in both recordings but for time, got {shapes}")
    length = min(a.shape[-1], b.shape[-1])
    peak = float(a.abs().max()) if a.is_floating_point() and a.numel() else 1.0
    a, b = (x[..., :length].cpu().double() for x in (a, b))
    error = torch.where(a.isnan() & b.isnan(), 0.0, (a - b).abs()).nan_to_num(torch.inf, torch.inf) / (peak or 1.0)
    over = (error > tolerance).flatten(0, -2).any(0).nonzero()
    return Row(name, tuple(a.shape), float(error.max()) if error.numel() else 0.0, int(over[0]) if len(over) else None)


def _result_name(name: str, module: nn.Module) -> str:
    """The name of the layer whose result a module returns: with an activation fused into it, the one after it."""
    if isinstance(module, CausalConv1d | ResBlock) and module.post != "none":
        layers, _, number = name.rpartition(".")
        return f"{layers}.{int(number) + 1}"
    return name


def _tensors_of(output: object) -> Iterator[Tensor]:
    """The tensors in what a module returned: a tensor, a sequence or mapping of them."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from (x for value in output.values() for x in _tensors_of(value))
    elif isinstance(output, list | tuple | Iterator):
        yield from (x for value in output for x in _tensors_of(value))


def _time_is_second(name: str, module: nn.Module) -> bool:
    """Whether a module returns [B, T, C]: linear layers, what is inside of transformers, and the peer's transformer."""
    peer = "Transformer" in type(module).__name__ and not isinstance(module, Transformer)
    return "transformer." in name or isinstance(module, nn.Linear) or peer


def _some(recording: Recording) -> str:
    return ", ".join([*recording][:3])

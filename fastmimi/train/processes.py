"""Several processes that train together (`accelerate launch`): who this one is, and what all of them have."""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor


def place() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def sum_of_all(x: Tensor) -> Tensor:
    """x, changed to the sum of every process's."""
    if place()[1] > 1:
        torch.distributed.all_reduce(x)
    return x


def of_first(x: Tensor) -> Tensor:
    """x, changed to the first process's: what a GPU adds up in any order differs in the last bits."""
    if place()[1] > 1:
        torch.distributed.broadcast(x, 0)
    return x


def rows_of_all(rows: Tensor) -> Tensor:
    """[N, D] of every process, one after another."""
    count = place()[1]
    if count == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(count)]
    torch.distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)

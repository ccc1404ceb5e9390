"""Collective operations for training with several processes (`accelerate launch`); with one process, no-ops."""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor


def rank_and_world_size() -> tuple[int, int]:
    """The rank of this process, and the number of processes: (0, 1) without torch.distributed."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def all_reduce_sum(x: Tensor) -> Tensor:
    """Replace x by its sum over all processes, in place, and return it."""
    if rank_and_world_size()[1] > 1:
        torch.distributed.all_reduce(x)
    return x


def broadcast_from_rank_0(x: Tensor) -> Tensor:
    """Replace x by that of rank 0, in place, and return it.

    It keeps processes identical where each has computed the same x: a GPU adds in any order, and results then differ in
    the last bits.
    """
    if rank_and_world_size()[1] > 1:
        torch.distributed.broadcast(x, 0)
    return x


def all_gather_rows(rows: Tensor) -> Tensor:
    """Concatenate the rows [N, D] of all processes; N must be the same in each."""
    count = rank_and_world_size()[1]
    if count == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(count)]
    torch.distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)

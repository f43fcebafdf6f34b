"""Embeddings of the whole batch on every process, with the gradient that one process with the whole batch would see."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from cmapkd.models.types import Features, TowerFeatures


def own_place() -> tuple[int, int]:
    """This process's number, and how many there are; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def own_rows(every: Tensor, number: int) -> Tensor:
    """This process's rows of what `gather_rows` put together, of as many rows from each process."""
    rank = own_place()[0]
    return every[rank * number : (rank + 1) * number]


def gather_features(features: Features) -> Features:
    """`features` with the embeddings of all processes, in rank order; levels stay local.

    Every process then computes the same loss of the whole batch. The gradient of a process's own rows is the sum over
    processes of what their losses ask of it; the distributed wrapper divides by the number of processes, which leaves
    exactly the gradient of the whole-batch loss. Without a process group this returns its argument.
    """
    return replace(
        features,
        image=_gather_tower(features.image),
        text=_gather_tower(features.text),
        more_texts={pool: _gather_tower(tower) for pool, tower in features.more_texts.items()},
        more_images={view: _gather_tower(tower) for view, tower in features.more_images.items()},
    )


def gather_rows(rows: Tensor) -> Tensor:
    """Rows [local, ...] of all processes in rank order, [batch, ...], with the gradient described above.

    Anything with one row for each pair: embeddings, pooled levels, per-sample losses. Every process must hold the same
    number of rows. Without a process group this returns its argument.
    """
    if own_place()[1] == 1:
        return rows
    if rows.shape[1:].numel() == 0:  # of a tower that nobody reads: there is nothing to send
        return rows.new_empty(len(rows) * dist.get_world_size(), *rows.shape[1:])
    gathered: Tensor = _GatherRows.apply(rows)
    return gathered


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of every process's `values`, without gradient. Without a process group this returns its argument."""
    if own_place()[1] == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def _gather_tower(tower: TowerFeatures) -> TowerFeatures:
    return replace(tower, embedding=gather_rows(tower.embedding))


class _GatherRows(torch.autograd.Function):
    """Concatenates equal-sized row blocks of all processes; backward sums the gradients of a block over processes."""

    @staticmethod
    def forward(_ctx: Any, rows: Float[Tensor, "local ..."]) -> Float[Tensor, "batch ..."]:
        return _of_all(rows)

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> Tensor:
        return _sum_of_own(gradients[0])

    @staticmethod
    def jvp(_ctx: Any, *tangents: Tensor) -> Float[Tensor, "batch ..."]:
        return _of_all(tangents[0])


def _of_all(rows: Tensor) -> Tensor:
    """Equal-sized row blocks of all processes, in rank order, without gradient."""
    every = rows.new_empty(len(rows) * dist.get_world_size(), *rows.shape[1:])
    dist.all_gather_into_tensor(every, rows.contiguous())
    return every


def _sum_of_own(every: Tensor) -> Tensor:
    """Each process's own block of rows of the sum over processes: half of what a sum of all rows would send.

    The sum is taken in float32 at least, because in bf16 its rounding would grow with the number of processes. Where
    gathered rows are added to others, their gradient is the same tensor: the collectives leave it as it is.
    """
    wide, world_size = torch.promote_types(every.dtype, torch.float32), dist.get_world_size()
    if dist.get_backend() == "gloo":  # whose reduce-scatter is an all-reduce of everything (torch 2.15)
        parts = torch.empty_like(every, memory_format=torch.contiguous_format)
        dist.all_to_all_single(parts, every.contiguous())
        blocks: Tensor = parts.unflatten(0, (world_size, -1))
        return blocks.sum(0, dtype=wide).to(every.dtype)
    summed = every.to(wide, memory_format=torch.contiguous_format, copy=True)  # nccl may sum in place
    own = summed.new_empty(len(every) // world_size, *every.shape[1:])
    dist.reduce_scatter_tensor(own, summed)
    return own.to(every.dtype)

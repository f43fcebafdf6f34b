"""Places of a picture that are drawn for a step: the same in every process, micro-batch and resume."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from cmapkd.data.random import uniforms


def drawn_places(ids: Sequence[str], *, count: int, of: int, key: Sequence[object]) -> Int[Tensor, "batch count"]:
    """For each sample `count` different places of range(of), ascending; on the CPU.

    Args:
        ids: of the samples. Each is drawn for by itself, so that no place depends on who else is in the batch.
        count: how many; as many as there are where `of` is smaller.
        key: what else the draw is a function of: seed, step, purpose.
    """
    return _orders(ids, of, ("places", *key))[:, :count].sort(dim=1).values


def drawn_orders(ids: Sequence[str], *, of: int, key: Sequence[object]) -> Int[Tensor, "batch of"]:
    """For each sample a permutation of range(of); on the CPU. See `drawn_places`."""
    return _orders(ids, of, ("order", *key))


def _orders(ids: Sequence[str], of: int, key: Sequence[object]) -> Int[Tensor, "batch of"]:
    return torch.stack([torch.from_numpy(uniforms(of, *key, sample)) for sample in ids]).argsort(dim=1)

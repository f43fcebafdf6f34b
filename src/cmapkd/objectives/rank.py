"""Agreement of two rankings of the same candidates."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_CELLS = 2**24  # comparisons of two candidates held at once


@torch.no_grad()
def kendall_tau(
    first: Float[Tensor, "batch classes"], second: Float[Tensor, "batch classes"]
) -> Float[Tensor, " batch"]:
    """Kendall's tau-b of each pair of rows: 1 for the same order, -1 for the opposite one; no gradient.

    Args:
        first, second: scores of the same candidates; only their order counts.
    Returns:
        In [-1, 1]; zero where one of the rows has no order at all, for it agrees with nothing.
    Raises:
        ValueError: the shapes differ.
    Source: Kendall 1945, "The treatment of ties in ranking problems" (tau-b).
    """
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(
            f"two rankings of the same candidates are compared, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    rows = max(1, _CELLS // max(1, first.shape[1] ** 2))
    taus = [_tau(one, other) for one, other in zip(first.split(rows), second.split(rows), strict=True)]
    return torch.cat(taus) if taus else first.new_zeros(0)


def _tau(first: Tensor, second: Tensor) -> Tensor:
    one, other = ((scores[:, :, None] - scores[:, None, :]).sign() for scores in (first, second))
    agreements = (one * other).sum((1, 2))
    untied = (one.square().sum((1, 2)) * other.square().sum((1, 2))).sqrt()
    return torch.where(untied > 0, agreements / untied.clamp_min(1), torch.zeros_like(untied))

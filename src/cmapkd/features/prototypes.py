"""Prototypes of tokens: centres of clusters of directions, found once and fixed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_ROUNDS = 20


@torch.no_grad()
def spherical_means(
    tokens: Float[Tensor, "tokens dim"], count: int, generator: torch.Generator
) -> Float[Tensor, "prototypes dim"]:
    """Spherical k-means: every token belongs to the centre of the largest cosine, a centre is the mean of its tokens.

    A centre that no token belongs to stays where it is. Twenty rounds, so the host never looks at the tokens.

    Args:
        tokens: normalised here.
        count: of prototypes, 1 to the number of tokens.
        generator: draws the tokens that the centres begin at, on the CPU, the same in every process.
    Returns:
        Unit vectors, float32 or wider.
    Raises:
        ValueError: there are fewer tokens than prototypes.
    Source: Dhillon and Modha 2001, "Concept decompositions for large sparse text data using clustering".
    """
    if not 1 <= count <= len(tokens):
        raise ValueError(f"{count} prototypes of {len(tokens)} tokens: give 1 to {len(tokens)}")
    units = F.normalize(tokens if tokens.dtype == torch.float64 else tokens.float(), dim=-1)
    first = torch.randperm(len(units), generator=generator)[:count].to(units.device, non_blocking=True)
    centres = units[first]
    with torch.autocast(units.device.type, enabled=False):
        for _ in range(_ROUNDS):
            belongs = F.one_hot((units @ centres.T).argmax(1), count).to(units.dtype)  # no scatter: equal at every call
            sums = belongs.T @ units
            centres = torch.where(belongs.any(0)[:, None], F.normalize(sums, dim=-1), centres)
    return centres

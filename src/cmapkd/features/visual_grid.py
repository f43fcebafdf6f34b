"""Visual tokens of one square grid in the places of another."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from cmapkd.models.token_types import Rows
from cmapkd.models.vlm_rows import visual_places


def resampled(tokens: Float[Tensor, "tiles tokens width"], number: int) -> Float[Tensor, "tiles number width"]:
    """The tokens of each tile, row by row of a square, bilinearly on a square of `number`; equal numbers: as they are.

    Raises:
        ValueError: one of the numbers is no square.
    """
    if tokens.shape[1] == number:
        return tokens
    sides = [math.isqrt(count) for count in (tokens.shape[1], number)]
    if [side**2 for side in sides] != [tokens.shape[1], number]:
        raise ValueError(
            f"{tokens.shape[1]} visual tokens of a picture cannot stand in the places of {number}: both must be squares"
        )
    grid = tokens.transpose(1, 2).unflatten(-1, (sides[0], sides[0]))
    resized = F.interpolate(grid, size=(sides[1], sides[1]), mode="bilinear", align_corners=False)
    return resized.flatten(2).transpose(1, 2)


def resampled_rows(rows: Rows, visual: Bool[Tensor, "batch length"]) -> Rows:
    """Visual tokens of each dialogue in the places that `visual` marks; where there are as many, they are as they are.

    Args:
        rows: of the same dialogues, each with as many tokens as the others or none.
    Raises:
        ValueError: other dialogues have tokens, or numbers are neither equal nor squares.
    """
    own = torch.bincount(rows.sample, minlength=len(visual))
    other = visual.sum(-1)
    sample, place = visual_places(visual)
    if torch.equal(own, other):
        return Rows(rows.values, sample, place)
    counts = [{*each[each > 0].tolist()} for each in (own, other)]
    if any(len(each) != 1 for each in counts) or not torch.equal(own > 0, other > 0):
        raise ValueError(
            f"the dialogues have {own.tolist()} visual tokens of the student and {other.tolist()} of the teacher: they "
            "must be equal, or all pictures must have one number of tokens"
        )
    (mine,), (theirs,) = counts
    return Rows(resampled(rows.values.unflatten(0, (-1, mine)), theirs).flatten(0, 1), sample, place)

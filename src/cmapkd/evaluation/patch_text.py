"""How well single cells of a picture match the names of what they show."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class PatchScores(NamedTuple):
    """Sums over pictures; `patch_text_scores` divides them.

    Attributes:
        pointed, pointing_chance: by name in a picture: whether the best cell lies in one of its boxes, and the share of
            all cells that do.
        right, majority: by cell in a box: whether the nearest name is the box's; the box's name, for the commonest.
    """

    pointed: Float[Tensor, " names_in_pictures"]
    pointing_chance: Float[Tensor, " names_in_pictures"]
    right: Float[Tensor, " boxed_cells"]
    owners: Int[Tensor, " boxed_cells"]


def score_patches(
    cells: Float[Tensor, "rows_x_columns dim"],
    grid: tuple[int, int],
    names: Float[Tensor, "names dim"],
    boxes: Float[Tensor, "boxes 4"],
    labels: Int[Tensor, " boxes"],
) -> PatchScores:
    """One picture's cells against the names of all classes.

    A cell belongs to the boxes that its centre lies in; of several to the smallest one. A name is pointed at where the
    cell that is nearest to its text lies in any of its boxes; equally near cells count in parts.

    Args:
        cells: unit vectors in the joint space, row by row.
        names: unit vectors of the classes' texts.
        boxes: left, top, right, bottom, as shares of the picture's sides.
        labels: row of `names` of each box; -1: it is no object.
    """
    inside = cells_inside(grid, boxes) & (labels >= 0)[:, None]  # [boxes cells]
    similarities = names @ cells.T  # [names cells]
    present = [int(label) for label in labels[labels >= 0].unique() if bool(inside[labels == label].any())]
    own = torch.stack([inside[labels == label].any(0) for label in present]) if present else inside[:0]
    scores = similarities[present]
    best = (scores == scores.amax(1, keepdim=True)).double() if present else scores.double()
    pointed = (best * own).sum(1) / best.sum(1)
    areas = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))[:, None].expand_as(inside)
    owner = areas.masked_fill(~inside, torch.inf).argmin(0) if len(boxes) else labels.new_zeros(len(cells))
    boxed = inside.any(0)
    owners = labels[owner[boxed]] if len(boxes) else labels[:0]
    of_cells = similarities[:, boxed].T
    mine = of_cells.gather(1, owners[:, None])
    better, tied = (of_cells > mine).sum(1), (of_cells == mine).sum(1)
    return PatchScores(pointed, own.double().mean(1), (better == 0).double() / tied.clamp_min(1), owners)


def cells_inside(grid: tuple[int, int], boxes: Float[Tensor, "boxes 4"]) -> Bool[Tensor, "boxes cells"]:
    """Whether each cell's centre lies in each box."""
    rows, columns = grid
    y = ((torch.arange(rows, device=boxes.device) + 0.5) / rows).repeat_interleave(columns)
    x = ((torch.arange(columns, device=boxes.device) + 0.5) / columns).repeat(rows)
    left, top, right, bottom = boxes.T[:, :, None]
    inside: Tensor = (left <= x) & (x < right) & (top <= y) & (y < bottom)
    return inside


def patch_text_scores(scores: Iterable[PatchScores]) -> dict[str, Any]:
    """Percentages over all pictures.

    Returns:
        `pointing` and `pointing_chance` (of a cell that is drawn blindly), over the names in each picture that have a
        cell; `cells` and `cells_commonest` (of always the commonest name), over the cells in boxes; and their numbers.
    Raises:
        ValueError: no box has a cell.
    """
    pointed, chance, right, owners = (torch.cat(parts) for parts in zip(*scores, strict=True))
    if not len(pointed):
        raise ValueError("no box holds the centre of a cell: the boxes are too small for this model's patches")
    return {
        "pointing": 100 * float(pointed.mean()),
        "pointing_chance": 100 * float(chance.mean()),
        "cells": 100 * float(right.mean()),
        "cells_commonest": 100 * int(owners.bincount().max()) / len(owners),
        "num_names": len(pointed),
        "num_cells": len(owners),
    }

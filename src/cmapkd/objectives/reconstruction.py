"""Pixels of hidden patches against what was predicted of them, and directions of tokens against a teacher's."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cmapkd.objectives.common import at_least_float32, check_same_width, unit


def patches_of(
    images: Float[Tensor, "batch channels height width"], grid: tuple[int, int]
) -> Float[Tensor, "batch cells values"]:
    """The pixels of each cell of a grid over the pictures, row by row; what no whole cell covers is cut off."""
    (rows, columns), (batch, channels) = grid, images.shape[:2]
    height, width = images.shape[-2] // rows, images.shape[-1] // columns
    cells = images[..., : rows * height, : columns * width].reshape(batch, channels, rows, height, columns, width)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)


def reconstruction_error(
    predicted: Float[Tensor, "batch cells values"],
    patches: Float[Tensor, "batch cells values"],
    keep: Int[Tensor, "batch visible"],
) -> Float[Tensor, " batch"]:
    """Mean squared error of the hidden cells, whose pixels have mean 0 and variance 1 each.

    Args:
        predicted: of every cell; what stands in visible ones has no influence.
        patches: of `patches_of`; detached here.
        keep: numbers of the visible cells.
    Returns:
        For each sample >= 0, 1 in expectation for a prediction of zeros; float32 or wider.
    Raises:
        ValueError: the shapes differ.
    Source: He et al. 2022 (MAE, arXiv:2111.06377), section 3, with normalised pixels.
    """
    check_same_width(predicted, patches, "patches")
    target = at_least_float32(patches.detach())
    spread = target.var(dim=-1, keepdim=True)
    errors = (at_least_float32(predicted) - (target - target.mean(-1, keepdim=True)) / (spread + 1e-6).sqrt()).square()
    hidden = torch.ones_like(errors[..., 0]).scatter(1, keep, 0.0)
    return (errors.mean(-1) * hidden).sum(1) / hidden.sum(1)


def direction_distance(
    student: Float[Tensor, "batch tokens dim"], teacher: Float[Tensor, "batch tokens dim"]
) -> Float[Tensor, " batch"]:
    """Sum over channels of |N(t) - N(s)| divided by sqrt(dim), mean over tokens.

    Args:
        student: already at the teacher's width; brought to length 1 here.
        teacher: of the same tokens; brought to length 1 and detached here.
    Returns:
        For each sample in [0, 2], no unit; zero where all directions agree. A mean over channels is this by sqrt(dim).
    Raises:
        ValueError: the shapes differ.
    Source: Bai et al. 2023 (DMAE, arXiv:2208.12256), whose mean over channels shrinks with their number.
    """
    check_same_width(student, teacher, "tokens")
    distances: Tensor = (unit(teacher.detach()) - unit(student)).abs().sum(-1).mean(-1) / student.shape[-1] ** 0.5
    return distances

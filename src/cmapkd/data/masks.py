"""Squares of a picture that a model does not get to see: pure functions of (sample, view), as views are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cmapkd.config import ConfigError
from cmapkd.data.random import uniforms


def check_mask(image_size: int, *, patch: int, ratio: float) -> None:
    """Refuses squares of which none, or all, would be hidden.

    Raises:
        ConfigError: with the numbers and what to do.
    """
    cells = _per_side(image_size, patch) ** 2
    if not 0 < _num_hidden(cells, ratio) < cells:
        raise ConfigError(
            f"a picture of {image_size} pixels has {cells} squares of {patch}, of which a share of {ratio:g} hides "
            f"{_num_hidden(cells, ratio)}: some must be hidden and some seen, so take smaller squares or another share"
        )


def hidden_squares(
    ids: Sequence[str], *, view: int | Sequence[int], image_size: int, patch: int, ratio: float
) -> Bool[Tensor, "batch side side"]:
    """Which squares of each sample's picture are hidden: the same number in all, drawn for each sample and view.

    Args:
        view: view number, one for all or one for each sample.
        patch: side of a square in pixels; where it does not divide the picture's, the last row and column are cut.
        ratio: share of the squares that is hidden, in (0, 1); the number seen is rounded down, as MAE rounds it.
    Raises:
        ConfigError: none or all would be hidden.
    """
    check_mask(image_size, patch=patch, ratio=ratio)
    side = _per_side(image_size, patch)
    views = [view] * len(ids) if isinstance(view, int) else view
    draws = torch.stack(
        [torch.from_numpy(uniforms(side**2, "mask", number, sample)) for number, sample in zip(views, ids, strict=True)]
    )
    order = draws.argsort(dim=-1)
    hidden = torch.zeros(draws.shape, dtype=torch.bool)
    hidden.scatter_(1, order[:, : _num_hidden(side**2, ratio)], True)
    squares: Tensor = hidden.unflatten(1, (side, side))
    return squares


def hide(
    images: Float[Tensor, "batch 3 height width"], squares: Bool[Tensor, "batch rows columns"], *, patch: int
) -> Float[Tensor, "batch 3 height width"]:
    """The pictures with zeros, a model's mean colour after its normalisation, in the hidden squares."""
    pixels = squares.to(images.device, non_blocking=True).repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    return images.masked_fill(pixels[:, None, : images.shape[-2], : images.shape[-1]], 0.0)


def _per_side(image_size: int, patch: int) -> int:
    return -(-image_size // patch)


def _num_hidden(cells: int, ratio: float) -> int:
    return cells - int(cells * (1 - ratio))

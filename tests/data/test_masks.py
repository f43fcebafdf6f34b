"""Hidden squares: which, how many, and that they depend on nothing but sample and view."""

from __future__ import annotations

import pytest
import torch

from cmapkd.config import ConfigError
from cmapkd.data.masks import hidden_squares, hide

IDS = tuple(f"s{i}" for i in range(200))


@pytest.mark.parametrize(
    ("size", "patch", "ratio", "hidden"), [(64, 16, 0.75, 12), (224, 16, 0.75, 147), (20, 8, 0.5, 5)]
)
def test_every_sample_hides_the_same_number(size: int, patch: int, ratio: float, hidden: int) -> None:
    squares = hidden_squares(IDS, view=0, image_size=size, patch=patch, ratio=ratio)
    side = -(-size // patch)
    assert squares.shape == (200, side, side)
    assert squares.sum((1, 2)).tolist() == [hidden] * 200


def test_a_mask_is_a_function_of_sample_and_view() -> None:
    def masks(ids: tuple[str, ...], view: int) -> torch.Tensor:
        return hidden_squares(ids, view=view, image_size=64, patch=16, ratio=0.75)

    torch.manual_seed(0)
    first = masks(IDS, 0)
    torch.manual_seed(1)
    assert torch.equal(masks(IDS[50:60], 0), first[50:60])
    assert (masks(IDS, 1) == first).all(2).all(1).float().mean() < 0.05
    assert len({tuple(mask.flatten().tolist()) for mask in first}) > 150
    # no place is favoured: each is hidden in 150 of 200, give or take three deviations
    assert bool(((first.float().mean(0) - 0.75).abs() < 3 * (0.75 * 0.25 / 200) ** 0.5).all())


def test_hidden_squares_are_the_mean_colour_and_the_others_untouched() -> None:
    images = torch.randn(2, 3, 20, 20)
    squares = hidden_squares(IDS[:2], view=0, image_size=20, patch=8, ratio=0.5)
    shown = hide(images, squares, patch=8)
    for sample in range(2):
        for row in range(20):
            for column in range(20):
                hidden = bool(squares[sample, row // 8, column // 8])
                expected = torch.zeros(3) if hidden else images[sample, :, row, column]
                assert torch.equal(shown[sample, :, row, column], expected)


def test_nothing_or_everything_hidden_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"4 squares of 8, of which a share of 0\.9 hides 4"):
        hidden_squares(IDS, view=0, image_size=16, patch=8, ratio=0.9)

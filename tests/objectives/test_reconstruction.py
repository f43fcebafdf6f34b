"""Errors of hidden patches and of directions: the sums in loops, gradients, and what has no influence."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from cmapkd.objectives import direction_distance, patches_of, reconstruction_error


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


KEEP = torch.tensor([[0, 3], [1, 2]])


def test_patches_are_the_cells_row_by_row() -> None:
    picture = rows(2, 3, 7, 9)  # cells of 3 x 3, one row of pixels is cut off
    patches = patches_of(picture, (2, 3))
    assert patches.shape == (2, 6, 27)
    for cell in range(6):
        row, column = divmod(cell, 3)
        own = picture[:, :, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
        assert torch.equal(patches[:, cell], own.permute(0, 2, 3, 1).flatten(1))


def test_reconstruction_error_is_the_sum_in_loops() -> None:
    predicted, patches = rows(2, 4, 5), 3 + 2 * rows(2, 4, 5, seed=1)
    for sample, found in enumerate(reconstruction_error(predicted, patches, KEEP)):
        hidden = [cell for cell in range(4) if cell not in KEEP[sample].tolist()]
        total = 0.0
        for cell in hidden:
            x = patches[sample, cell]
            spread = sum((float(each) - float(x.mean())) ** 2 for each in x) / 4  # unbiased, as in the published code
            target = (x - x.mean()) / math.sqrt(spread + 1e-6)
            total += float(((predicted[sample, cell] - target) ** 2).mean())
        assert found.item() == pytest.approx(total / len(hidden), rel=1e-12)


def test_direction_distance_is_the_published_mean_times_the_root_of_the_width() -> None:
    student, teacher = rows(2, 3, 6), rows(2, 3, 6, seed=1)
    for sample, found in enumerate(direction_distance(student, teacher)):
        published = F.l1_loss(F.normalize(teacher[sample], dim=-1), F.normalize(student[sample], dim=-1))
        torch.testing.assert_close(found, published * math.sqrt(6))
    assert float(direction_distance(3 * teacher, teacher).abs().max()) < 1e-12
    apart = torch.eye(2)[:, None]
    assert direction_distance(apart[:1], apart[1:]).item() == pytest.approx(2 / math.sqrt(2))


def test_gradients() -> None:
    predicted, patches = rows(2, 4, 3).requires_grad_(), rows(2, 4, 3, seed=1).requires_grad_()
    assert gradcheck(lambda x: reconstruction_error(x, patches, KEEP), predicted)
    assert gradcheck(lambda x: direction_distance(x, patches), predicted)
    (reconstruction_error(predicted, patches, KEEP) + direction_distance(predicted, patches)).sum().backward()
    assert patches.grad is None
    (of_hidden,) = torch.autograd.grad(reconstruction_error(predicted, patches, KEEP).sum(), predicted)
    assert not of_hidden.gather(1, KEEP[..., None].expand(-1, -1, 3)).any()


def test_flat_patches_give_numbers_and_other_shapes_are_refused() -> None:
    assert reconstruction_error(rows(2, 4, 5), torch.ones(2, 4, 5), KEEP).isfinite().all()
    with pytest.raises(ValueError, match="student patches has shape"):
        reconstruction_error(rows(2, 4, 5), rows(2, 4, 6), KEEP)
    with pytest.raises(ValueError, match="project the student to the teacher's width first"):
        direction_distance(rows(2, 4, 5), rows(2, 4, 6))

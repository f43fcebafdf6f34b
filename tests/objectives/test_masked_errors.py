"""Errors under masks and their overlap: the sums in loops, gradients, and what keeps a mask from vanishing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from cmapkd.objectives import mask_overlap, masked_error


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_masked_error_is_the_sum_in_loops() -> None:
    errors, masks = rows(2, 5), rows(2, 3, 5, seed=1)
    for sample, found in enumerate(masked_error(errors, masks)):
        means = [float((mask * errors[sample]).sum() / mask.sum()) for mask in masks[sample]]
        assert found.item() == pytest.approx(sum(means) / 3, rel=1e-12)


@pytest.mark.parametrize("of_one_length", [False, True])
def test_mask_overlap_is_the_sum_over_pairs(of_one_length: bool) -> None:
    masks = rows(2, 3, 5)
    for sample, found in enumerate(mask_overlap(masks, of_one_length=of_one_length)):
        m = [mask / mask.norm() if of_one_length else mask for mask in masks[sample]]
        dice = [float(2 * m[i] @ m[j] / (m[i] @ m[i] + m[j] @ m[j])) for i in range(3) for j in range(3) if i != j]
        assert found.item() == pytest.approx(sum(dice) / 6, rel=1e-12)


def test_gradients() -> None:
    errors, masks = rows(2, 4).requires_grad_(), rows(2, 3, 4, seed=1).requires_grad_()
    assert gradcheck(masked_error, (errors, masks))
    assert gradcheck(mask_overlap, masks)
    assert gradcheck(lambda m: mask_overlap(m, of_one_length=False), masks)


def test_no_mask_gains_by_becoming_small() -> None:
    """Undivided, the error falls with the mask; divided, neither term does, and its gradient along the mask is 0."""
    errors, masks = rows(2, 5), rows(2, 3, 5, seed=1).requires_grad_()
    for loss in (masked_error(errors, masks), mask_overlap(masks)):
        (gradient,) = torch.autograd.grad(loss.sum(), masks)
        assert float((gradient * masks.detach()).sum((-2, -1)).abs().max()) < 1e-12
    masks = masks.detach()
    for shrunk in (1e-2 * masks, masks * torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)[:, None]):
        torch.testing.assert_close(masked_error(errors, shrunk), masked_error(errors, masks))
        torch.testing.assert_close(mask_overlap(shrunk), mask_overlap(masks))
    printed = masked_error(errors, masks, divided=False)
    torch.testing.assert_close(printed, (masks * errors[:, None]).mean((1, 2)))
    torch.testing.assert_close(masked_error(errors, 1e-2 * masks, divided=False), 1e-2 * printed)
    assert bool((mask_overlap(shrunk, of_one_length=False) < 0.5 * mask_overlap(masks, of_one_length=False)).all())


def test_values_at_the_ends() -> None:
    errors = rows(2, 4)
    torch.testing.assert_close(masked_error(errors, torch.ones(2, 3, 4, dtype=torch.float64)), errors.mean(1))
    alike, apart = torch.ones(1, 4, 6), torch.eye(4)[None]
    assert mask_overlap(alike).item() == 1
    assert mask_overlap(apart).item() == 0
    assert masked_error(errors.float(), torch.zeros(2, 1, 4)).tolist() == [0, 0]  # vanished, and no NaN


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"errors have shape \(2, 5\) but masks \(2, 3, 4\)"):
        masked_error(rows(2, 5), rows(2, 3, 4))
    with pytest.raises(ValueError, match="masks overlap in pairs, and there is one"):
        mask_overlap(rows(2, 1, 4))

"""Agreement about parts of classes: the chain rule, loops and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from cmapkd.objectives import kl_divergence
from cmapkd.objectives.subclasses import subclass_divergence

B, C, S = 3, 2, 4


def scores(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_classes_and_parts_sum_to_all_parts(temperature: float) -> None:
    own, theirs = scores(B, C, S), scores(B, C, S, seed=1)
    own_classes, classes = scores(B, C, seed=2), scores(B, C, seed=3)
    found = subclass_divergence(own, theirs, classes, temperature=temperature)
    p = (classes / temperature).softmax(1)[:, :, None] * theirs.softmax(2)
    q = (own_classes / temperature).softmax(1)[:, :, None] * own.softmax(2)
    whole = sum(p[i, c, s] * (p[i, c, s] / q[i, c, s]).log() for i in range(B) for c in range(C) for s in range(S)) / B
    whole *= temperature**2
    torch.testing.assert_close(kl_divergence(own_classes, classes, temperature=temperature) + found, whole)


def test_zero_at_agreement_and_gradients() -> None:
    own, theirs, classes = scores(B, C, S).requires_grad_(), scores(B, C, S, seed=1), scores(B, C, seed=3)
    shifted = theirs + scores(B, C, 1, seed=4)  # a constant of each class changes nothing
    assert float(subclass_divergence(shifted, theirs, classes)) == pytest.approx(0, abs=1e-12)
    assert gradcheck(lambda x: subclass_divergence(x, theirs, classes, temperature=2.0), own)
    theirs.requires_grad_()
    classes.requires_grad_()
    subclass_divergence(own, theirs, classes).backward()
    assert theirs.grad is None
    assert classes.grad is None


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \[batch, classes, parts\] twice"):
        subclass_divergence(scores(B, C, S), scores(B, C, S), scores(B, C + 1))

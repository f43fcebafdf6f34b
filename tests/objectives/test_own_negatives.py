"""Contrast with false texts: in loops, gradients, chunks, and what the docstrings promise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from cmapkd.objectives import contrast_with_negatives, contrastive_loss, own_negatives_loss

BATCH, EACH, WIDTH, SCALE = 4, 2, 3, 5.0
PICTURES = torch.tensor([1, 2, 1, 3])


def embeddings() -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    v, t, n = (torch.randn(rows, WIDTH, generator=draws, dtype=torch.float64) for rows in (BATCH, BATCH, BATCH * EACH))
    return v, t, n


def power(one: Tensor, other: Tensor) -> float:
    return math.exp(SCALE * float(one @ other) / math.sqrt(float(one @ one) * float(other @ other)))


def test_images_see_all_false_texts_and_texts_none() -> None:
    v, t, n = embeddings()
    for pictures in (None, PICTURES):
        expected = 0.0
        for i in range(BATCH):
            seen = [j for j in range(BATCH) if j == i or pictures is None or pictures[i] != pictures[j]]
            of_image = sum(power(v[i], t[j]) for j in seen) + sum(power(v[i], each) for each in n)
            of_text = sum(power(v[j], t[i]) for j in seen)
            own = power(v[i], t[i])
            expected -= (math.log(own / of_image) + math.log(own / of_text)) / (2 * BATCH)
        for chunk in (None, 1, 3):
            found = contrast_with_negatives(v, t, n, logit_scale=SCALE, pictures=pictures, chunk=chunk)
            assert float(found) == pytest.approx(expected, rel=1e-12)


def test_own_false_texts_alone() -> None:
    v, t, n = embeddings()
    expected = 0.0
    for i in range(BATCH):
        own = power(v[i], t[i])
        others = sum(power(v[i], n[EACH * i + k]) for k in range(EACH))
        expected -= math.log(own / (own + others)) / BATCH
    found = own_negatives_loss(v, t, n.unflatten(0, (BATCH, EACH)), logit_scale=SCALE)
    assert float(found) == pytest.approx(expected, rel=1e-12)
    same = t[:, None].expand(BATCH, EACH, WIDTH)
    assert float(own_negatives_loss(v, t, same, logit_scale=SCALE)) == pytest.approx(math.log(1 + EACH))


def test_gradients() -> None:
    given = tuple(each.requires_grad_() for each in embeddings())
    scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda v, t, n, s: contrast_with_negatives(v, t, n, logit_scale=s), (*given, scale))
    whole, chunked = (
        torch.autograd.grad(contrast_with_negatives(*given, logit_scale=scale, chunk=chunk), (*given, scale))
        for chunk in (None, 3)
    )
    for one, other in zip(whole, chunked, strict=True):
        torch.testing.assert_close(one, other)
    split = (BATCH, EACH)
    assert gradcheck(lambda v, t, n, s: own_negatives_loss(v, t, n.unflatten(0, split), logit_scale=s), (*given, scale))


def test_without_false_texts_it_is_clips_loss() -> None:
    v, t, n = embeddings()
    for pictures in (None, PICTURES):
        expected = contrastive_loss(v, t, logit_scale=SCALE, pictures=pictures)
        torch.testing.assert_close(contrast_with_negatives(v, t, n[:0], logit_scale=SCALE, pictures=pictures), expected)
    assert contrast_with_negatives(v, t, n, logit_scale=SCALE) > contrastive_loss(v, t, logit_scale=SCALE)


def test_negatives_that_belong_to_nothing_are_refused() -> None:
    v, t, n = embeddings()
    with pytest.raises(ValueError, match=r"negatives have shape \(8, 3\) beside 4 anchors"):
        own_negatives_loss(v, t, n, logit_scale=SCALE)
    with pytest.raises(ValueError, match="row i of every tensor must belong to pair i"):
        contrast_with_negatives(v, t[1:], n, logit_scale=SCALE)

"""Contrast with a momentum teacher's candidates: in loops, its gradient, and what its docstring promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from cmapkd.objectives import contrastive_loss, soft_contrast

BATCH, ENTRIES, WIDTH, SCALE = 4, 5, 3, 6.0
EXCLUDE = torch.zeros(BATCH, ENTRIES, dtype=torch.bool)
EXCLUDE[0, 2] = EXCLUDE[3, 4] = True
PICTURES = torch.tensor([1, 2, 1, 3])


def embeddings(*rows: int) -> list[Tensor]:
    draws = torch.Generator().manual_seed(0)
    return [torch.randn(count, WIDTH, generator=draws, dtype=torch.float64) for count in rows]


def of_batch() -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    *four, image, text = embeddings(*[BATCH] * 4, ENTRIES, ENTRIES)
    return four, (image, text)


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other) / math.sqrt(float(one @ one) * float(other @ other))


def in_loops(anchors: Tensor, targets: Tensor, candidates: Tensor, hidden: Tensor) -> tuple[float, float]:
    """Cross-entropy with the pair, and KL(target || anchor), means over rows."""
    hard = soft = 0.0
    for row in range(len(anchors)):
        seen = [place for place in range(len(candidates)) if not hidden[row, place]]
        follower = {place: math.exp(SCALE * cosine(anchors[row], candidates[place])) for place in seen}
        target = {place: math.exp(SCALE * cosine(targets[row], candidates[place])) for place in seen}
        q, p = ({at: value / sum(each.values()) for at, value in each.items()} for each in (follower, target))
        hard -= math.log(q[row]) / len(anchors)
        soft += sum(p[at] * math.log(p[at] / q[at]) for at in seen) / len(anchors)
    return hard, soft


def test_it_is_both_parts_in_loops() -> None:
    (v, t, v_m, t_m), (images, texts) = of_batch()
    same = (PICTURES[:, None] == PICTURES) & ~torch.eye(BATCH, dtype=torch.bool)
    hidden = torch.cat([same, EXCLUDE], 1)
    of_images = in_loops(v, v_m, torch.cat([t_m, texts]), hidden)
    of_texts = in_loops(t, t_m, torch.cat([v_m, images]), hidden)
    options: dict[str, Any] = {"queue": (images, texts), "exclude": EXCLUDE, "pictures": PICTURES}
    for chunk in (None, 1, 3):
        found = soft_contrast(v, t, v_m, t_m, logit_scale=SCALE, chunk=chunk, **options)
        assert float(found.hard) == pytest.approx((of_images[0] + of_texts[0]) / 2, rel=1e-12)
        assert float(found.soft) == pytest.approx((of_images[1] + of_texts[1]) / 2, rel=1e-12)


def test_gradients_whole_and_in_chunks() -> None:
    (v, t, v_m, t_m), queue = of_batch()
    scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    learned = (v.requires_grad_(), t.requires_grad_(), scale)

    def loss(v: Tensor, t: Tensor, scale: Tensor, chunk: int | None = None) -> Tensor:
        parts = soft_contrast(v, t, v_m, t_m, logit_scale=scale, queue=queue, exclude=EXCLUDE, chunk=chunk)
        return 0.6 * parts.hard + 0.4 * parts.soft

    assert gradcheck(lambda v, t: loss(v, t, scale.detach()), learned[:2])
    whole, chunked = (torch.autograd.grad(loss(*learned, chunk), learned) for chunk in (None, 3))
    for one, other in zip(whole, chunked, strict=True):
        torch.testing.assert_close(one, other)


def test_the_scale_learns_by_the_student_alone() -> None:
    """The target's scale stands still, so its slope is that of a target with a fixed scale."""
    (v, t, v_m, t_m), _ = of_batch()
    scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    [found] = torch.autograd.grad(soft_contrast(v, t, v_m, t_m, logit_scale=scale).soft, [scale])
    logits = [scale * torch.tensor([[cosine(a, b) for b in other] for a in one]) for one, other in ((v, t_m), (t, v_m))]
    fixed = [SCALE * torch.tensor([[cosine(a, b) for b in o] for a in one]) for one, o in ((v_m, t_m), (t_m, v_m))]
    divergences = [
        (p.softmax(-1) * (p.log_softmax(-1) - z.log_softmax(-1))).sum(-1).mean()
        for z, p in zip(logits, fixed, strict=True)
    ]
    [expected] = torch.autograd.grad(torch.stack(divergences).mean(), [scale])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_a_student_that_is_its_teacher_has_clips_loss_and_no_divergence() -> None:
    (v, t, *_), queue = of_batch()
    alone = soft_contrast(v, t, v, t, logit_scale=SCALE)
    torch.testing.assert_close(alone.hard, contrastive_loss(v, t, logit_scale=SCALE))
    assert float(soft_contrast(v, t, v, t, logit_scale=SCALE, queue=queue).soft) == pytest.approx(0, abs=1e-12)


def test_an_excluded_queue_is_none() -> None:
    """Also one that is empty, with a single place of zeros; more candidates make pairs harder to find."""
    four, queue = of_batch()
    alone = soft_contrast(*four, logit_scale=SCALE)
    for rows in (queue, (torch.zeros(1, WIDTH, dtype=torch.float64),) * 2):
        hidden = torch.ones(BATCH, len(rows[0]), dtype=torch.bool)
        for one, other in zip(soft_contrast(*four, logit_scale=SCALE, queue=rows, exclude=hidden), alone, strict=True):
            torch.testing.assert_close(one, other)
    assert soft_contrast(*four, logit_scale=SCALE, queue=queue).hard > alone.hard


def test_inputs_that_do_not_fit_are_refused() -> None:
    four, (images, texts) = of_batch()
    with pytest.raises(ValueError, match=r"the queue has shapes \[\(5, 2\), \(5, 3\)\]"):
        soft_contrast(*four, logit_scale=SCALE, queue=(images[:, :2], texts))
    with pytest.raises(ValueError, match="as many images as texts"):
        soft_contrast(*four, logit_scale=SCALE, queue=(images, texts[1:]))
    with pytest.raises(ValueError, match=r"exclude has shape \(4, 4\).* 4 pairs and 5 entries"):
        soft_contrast(*four, logit_scale=SCALE, queue=(images, texts), exclude=EXCLUDE[:, 1:])
    with pytest.raises(ValueError, match="row i of every tensor must belong to pair i"):
        soft_contrast(four[0], four[1], four[2], four[3][1:], logit_scale=SCALE)

"""DC-CLIP: each tower learns from its own teacher, without pairs, until they are aligned."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from cmapkd.methods import Method, StageConfig
from cmapkd.objectives import contrastive_loss, smooth_distance
from helpers import make_method, random_batch


def test_smooth_distance_written_out() -> None:
    draws = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 4, generator=draws, dtype=torch.float64) * 2
    total = 0.0
    for one, other in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
        d = abs(one - other)
        total += d * d / (2 * 0.5) if d < 0.5 else d - 0.25
    assert smooth_distance(student, teacher, beta=0.5).item() == pytest.approx(total / 20)
    torch.testing.assert_close(smooth_distance(student, teacher), F.smooth_l1_loss(student, teacher))
    assert smooth_distance(teacher, teacher).item() == 0
    assert gradcheck(lambda s: smooth_distance(s, teacher, beta=0.5), student.requires_grad_())


def test_smooth_distance_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(ValueError, match="project the student to the teacher's width first"):
        smooth_distance(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="beta must be positive, got 0"):
        smooth_distance(torch.zeros(2, 3), torch.zeros(2, 3), beta=0)


def test_terms() -> None:
    method, batch = make_method("dc_clip", settings={"feature_weight": 2.0}), random_batch(5)
    student, teacher = method.encode_student(batch), method.encode_teacher(batch)
    ours = method.adapt(student)  # type: ignore[operator]
    terms = method.terms(batch)
    assert {name: term.weight for name, term in terms.items()} == {
        "image_feature": 2.0,
        "text_feature": 2.0,
        "contrastive": 1.0,
    }
    for tower in ("image", "text"):
        expected = F.smooth_l1_loss(getattr(ours, tower).embedding, getattr(teacher, tower).embedding)
        torch.testing.assert_close(terms[f"{tower}_feature"].value, expected)
    expected = contrastive_loss(student.image.embedding, student.text.embedding, logit_scale=student.logit_scale)
    torch.testing.assert_close(terms["contrastive"].value, expected)


def gradients(method: Method, batch: object) -> dict[str, torch.Tensor]:
    method.zero_grad()
    torch.stack([term.value for term in method(batch).values()]).sum().backward()  # type: ignore[arg-type]
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


def test_the_first_stage_sees_no_pairs() -> None:
    """Texts in another order change nothing, as they do when the towers are aligned."""
    batch = random_batch(5)
    turned = {
        role: replace(each, texts=replace(each.texts, ids=each.texts.ids.roll(1, 0), mask=each.texts.mask.roll(1, 0)))
        for role, each in batch.inputs.items()
    }
    other = replace(batch, inputs=turned)
    for terms, alike in ((("image_feature", "text_feature"), True), (("contrastive",), False)):
        method = make_method("dc_clip")
        method.enter(StageConfig(share=1.0, terms=terms))
        before, after = gradients(method, batch), gradients(method, other)
        equal = all(torch.allclose(before[name], after[name], rtol=1e-4, atol=1e-6) for name in before)
        assert equal == alike


def test_the_last_stage_asks_neither_teacher_nor_adapter() -> None:
    method = make_method("dc_clip")
    method.enter(StageConfig(share=1.0, terms=("contrastive",)))
    method.teachers.clear()
    assert not any(name.startswith("adapt.") for name in gradients(method, random_batch(5)))

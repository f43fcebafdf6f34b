"""CLIP-Refine: both terms against loops, the draws of references, and the gap between modalities that they close."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from cmapkd.evaluation.embed import Embedded
from cmapkd.evaluation.tasks.retrieval import modality_gap
from cmapkd.methods import StepInfo
from cmapkd.methods.clip_refine import ClipRefine, ClipRefineConfig
from cmapkd.objectives import hybrid_divergence, kl_divergence, reference_distance, similarity_divergence
from helpers import make_method, make_model, make_teacher, random_batch

BATCH = 5


def embeddings(seed: int = 0, width: int = 4) -> list[Tensor]:
    """Of the student and of a teacher of another width: images and texts."""
    draws = torch.Generator().manual_seed(seed)
    sizes = (width, width, width + 2, width + 2)
    return [torch.randn(BATCH, size, generator=draws, dtype=torch.float64) for size in sizes]


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(each) for each in row)
    return [math.exp(each) / total for each in row]


@pytest.mark.parametrize("scales", [(3.0, 7.0), (None, None)])
@pytest.mark.parametrize("hard_share", [0.0, 0.5, 0.9])
def test_the_mixture_is_the_loop(hard_share: float, scales: tuple[float | None, float | None]) -> None:
    sides = embeddings()
    expected = 0.0
    for rows, columns in ((0, 1), (1, 0)):
        products = []
        for side, scale in ((0, scales[0]), (2, scales[1])):
            one, other = sides[side + rows], sides[side + columns]
            if scale is not None:
                one, other = one / one.norm(dim=1, keepdim=True), other / other.norm(dim=1, keepdim=True)
            products.append([[(scale or 1.0) * float(a @ b) for b in other] for a in one])
        for i in range(BATCH):
            p, soft = softmax(products[0][i]), softmax(products[1][i])
            q = [hard_share * (i == j) + (1 - hard_share) * soft[j] for j in range(BATCH)]
            expected += sum(a * math.log(a / b) for a, b in zip(q, p, strict=True)) / BATCH / 2
    for chunk in (None, 2):
        found = hybrid_divergence(
            *sides, hard_share=hard_share, student_scale=scales[0], teacher_scale=scales[1], chunk=chunk
        )
        assert float(found) == pytest.approx(expected, rel=1e-12)


def test_the_mixture_without_pairs_is_the_similarity_divergence() -> None:
    sides = embeddings()
    found = hybrid_divergence(*sides, hard_share=0.0, student_scale=3.0, teacher_scale=7.0)
    torch.testing.assert_close(found, similarity_divergence(*sides, student_scale=3.0, teacher_scale=7.0))


def test_gradients() -> None:
    image, text, *teacher = embeddings()
    references = torch.randn_like(image)

    def losses(v: Tensor, t: Tensor, scale: Tensor) -> Tensor:
        scaled = hybrid_divergence(v, t, *teacher, hard_share=0.5, student_scale=scale, teacher_scale=2.0, chunk=2)
        raw = hybrid_divergence(v, t, *teacher, hard_share=0.3, student_scale=None, teacher_scale=None)
        return scaled + raw + reference_distance(v, references)

    scale = torch.tensor(3.0, dtype=torch.float64)
    assert gradcheck(losses, tuple(each.requires_grad_() for each in (image, text, scale)))


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\), got"):
        hybrid_divergence(*embeddings(), hard_share=share, student_scale=1.0, teacher_scale=1.0)
    with pytest.raises(ValueError, match="hard_share"):
        ClipRefineConfig.from_mapping({"name": "clip_refine", "hard_share": share})
    with pytest.raises(ValueError, match="width"):
        reference_distance(torch.zeros(2, 3), torch.zeros(2, 4))


def clip_refine(**settings: Any) -> ClipRefine:
    student = make_model(image_size=24)
    teacher = make_teacher(dim=16, seed=0)  # the same weights: a copy
    method = make_method("clip_refine", student=student, teacher=teacher, settings=settings)
    assert isinstance(method, ClipRefine)
    return method


def batch_of_copies() -> Any:
    batch = random_batch(BATCH)
    return replace(batch, inputs=dict.fromkeys(("student", "teacher"), batch.inputs["teacher"]))


def test_terms_are_the_formulas() -> None:
    """Of a student that is its teacher: half of the target is what it says itself."""
    method, batch = clip_refine(task_weight=0.25), batch_of_copies()
    method.step = StepInfo(step=3, seed=2)
    terms = method.terms(batch)
    assert {name: term.weight for name, term in terms.items()} == {
        "reference": 1.0,
        "similarity": 1.0,
        "contrastive": 0.25,
    }
    student = method.encode_student(batch)
    image, text = student.image.embedding, student.text.embedding
    z = torch.randn(image.shape, generator=StepInfo(step=3, seed=2).generator("references"))
    torch.testing.assert_close(terms["reference"].value, ((image - z) ** 2).mean() + ((text - z) ** 2).mean())
    logits = student.logit_scale * torch.cosine_similarity(image[:, None], text[None], dim=-1)
    p, own = logits.softmax(1), torch.eye(BATCH)
    rows = kl_divergence(logits, (0.5 * own + 0.5 * p).log())
    columns = kl_divergence(logits.T, (0.5 * own + 0.5 * logits.T.softmax(1)).log())
    torch.testing.assert_close(terms["similarity"].value, (rows + columns) / 2)


def test_references_are_shared_or_each_its_own_and_new_in_each_step() -> None:
    batch = batch_of_copies()
    values = {
        (kind, step): float(clip_refine(references=kind)(batch, StepInfo(step=step))["reference"].value.detach())
        for kind in ("shared", "own")
        for step in (1, 2)
    }
    assert len(set(values.values())) == 4
    again = clip_refine(references="own")(batch, StepInfo(step=2))["reference"].value
    assert float(again.detach()) == values["own", 2]


def test_a_term_without_weight_asks_nobody() -> None:
    method = clip_refine(distill_weight=0)
    method.teachers.clear()
    assert list(method.terms(batch_of_copies())) == ["reference"]
    assert method.term_names == ("reference",)


def test_in_expectation_all_references_are_zero() -> None:
    """The gradient is linear in z: over z and -z it is that of zero, for one z of both modalities or two."""
    image, text = (each.requires_grad_() for each in embeddings()[:2])
    z, other = embeddings(seed=1)[:2]

    def gradient(*references: Tensor) -> Tensor:
        loss = reference_distance(image, references[0]) + reference_distance(text, references[-1])
        return torch.cat(torch.autograd.grad(loss, [image, text]))

    for references in ((z,), (z, other)):
        mean = (gradient(*references) + gradient(*(-each for each in references))) / 2
        torch.testing.assert_close(mean, gradient(torch.zeros_like(z)))
    found = clip_refine(references="zero")(batch_of_copies())["reference"].value
    features = clip_refine().encode_student(batch_of_copies())
    expected = features.image.embedding.square().mean() + features.text.embedding.square().mean()
    torch.testing.assert_close(found, expected)


def test_the_gap_of_unit_and_raw_embeddings() -> None:
    images, texts = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.6, 0.8]])
    known = SimpleNamespace(images=images, texts=texts, image_norms=torch.empty(0), text_norms=torch.empty(0))
    found = modality_gap(known)  # type: ignore[arg-type]
    assert found == {"unit": pytest.approx(math.hypot(0.1, 0.3))}
    assert Embedded.__dataclass_fields__.keys() >= {"image_norms", "text_norms"}
    known.image_norms, known.text_norms = torch.tensor([2.0, 4.0]), torch.tensor([5.0])
    assert modality_gap(known)["raw"] == pytest.approx(math.hypot(2.0, 2.0))  # type: ignore[arg-type]

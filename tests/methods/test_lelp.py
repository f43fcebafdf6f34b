"""LELP: how classes are cut, its terms written out, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cmapkd.config import ConfigError
from cmapkd.methods.dual import LABELS
from cmapkd.methods.lelp import Lelp
from cmapkd.methods.targets import Answered
from helpers import made_up, make_method, random_batch

NUMBER, DIM = 200, 24


def lelp(**settings: Any) -> Lelp:
    method = make_method("lelp", settings=settings).double()
    assert isinstance(method, Lelp)
    assert method.teacher is not None
    method.teacher.model.double()
    return method


def rows_of(method: Lelp, label: int, answers: Answered) -> Tensor:
    """What is left of a class's images where no two class vectors differ."""
    basis = torch.linalg.svd(method.class_vectors.double(), full_matrices=False).Vh
    units = normalize(answers.image[answers.labels == label].double(), dim=-1)
    return units - units @ basis.T @ basis


@pytest.mark.parametrize("directions", ["pca", "random"])
def test_parts_have_equal_variance_and_no_part_of_the_classifier(directions: str) -> None:
    method = make_method("lelp", settings={"directions": directions}).double()
    survey = made_up(NUMBER)
    method.prepare(survey)
    answers = Answered.joined(survey())
    torch.testing.assert_close(
        method.projections @ method.class_vectors.T, torch.zeros(5, 4, 5).double(), atol=1e-6, rtol=0
    )
    for label in range(5):
        scores = rows_of(method, label, answers) @ method.projections[label].T - method.offsets[label]
        torch.testing.assert_close(scores.mean(0), torch.zeros(4).double(), atol=1e-6, rtol=0)
        assert float(scores.square().mean()) == pytest.approx(1.0, rel=1e-5)  # on average over the parts
        spread = torch.linalg.eigvalsh(torch.cov(scores.T, correction=0))
        if directions == "pca":  # a rotation keeps the spread of the first directions
            values = torch.linalg.svdvals(rows_of(method, label, answers) - rows_of(method, label, answers).mean(0))
            expected = values[:4].square() / values[:4].square().mean()
            torch.testing.assert_close(spread.flip(0), expected, rtol=1e-5, atol=1e-6)


def test_terms_are_those_of_all_parts() -> None:
    method = lelp(task_weight=0.5, temperature=2.0, part_temperature=0.7)
    batch = replace(random_batch(6, dtype=torch.float64), extra={LABELS: torch.tensor([4, -1, 0, 0, -1, 2])})
    with torch.no_grad():
        terms = method.terms(batch)
        student, teacher = method.encode_student(batch), method.encode_teacher(batch)
        image, v = student.image.embedding, normalize(teacher.image.embedding, dim=-1)
        own = student.logit_scale * normalize(image, dim=-1) @ normalize(method.class_vectors, dim=-1).T
        theirs = teacher.logit_scale * v @ normalize(method.class_vectors, dim=-1).T
        total = 0.0
        for i in range(6):
            p, q = (theirs[i] / 2).softmax(0), (own[i] / 2).softmax(0)
            head = method.head(image[i]).view(5, 4)
            for c in range(5):
                z = (method.projections[c] @ v[i] - method.offsets[c]) / 0.7
                for s in range(4):
                    there, here = p[c] * z.softmax(0)[s], q[c] * head[c].softmax(0)[s]
                    total += float(there * (there / here).log()) * 4 / 6
    assert {name: term.weight for name, term in terms.items()} == {"labels": 0.5, "classes": 1.0, "parts": 1.0}
    assert float(terms["classes"].value + terms["parts"].value) == pytest.approx(total, rel=1e-6)


def test_controls() -> None:
    """Shuffled: each picture has the parts of the one before it. Without parts: Hinton's distillation of classes."""
    batch = random_batch(6, dtype=torch.float64)
    image = torch.randn(6, DIM, dtype=torch.float64)
    plain, shuffled = lelp(), lelp(directions="shuffled")
    torch.testing.assert_close(shuffled._parts(image), plain._parts(image).roll(1, 0))
    alone = lelp(part_weight=0)
    assert alone.head is None
    settings = {"form": "classes", "class_vectors": "teacher", "task_weight": 0}
    kd = make_method("hinton", settings=settings).double()
    kd.load_state_dict(alone.state_dict(), strict=False)
    kd.teacher.model.double()
    assert alone.terms(batch)["classes"].value.item() == pytest.approx(
        kd.terms(batch)["classes"].value.item(), rel=1e-9
    )


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"into 20 parts.*of the teacher's 24 dimensions 19 are left for them"):
        make_method("lelp", settings={"parts": 20})
    one = Answered.joined(made_up(NUMBER)())
    one.image[:] = one.image[0].clone()
    with pytest.raises(ConfigError, match=r"all 200 training images are alike to it"):
        make_method("lelp").prepare(lambda **_: iter([one]))
    with pytest.raises(ConfigError, match=r"classes into 4 parts, and 4 training images cannot show that many"):
        make_method("lelp").prepare(made_up(4))


@pytest.mark.parametrize("directions", ["pca", "random"])
@pytest.mark.parametrize("images", ["none", "alike"])
def test_a_class_of_few_images_is_cut_as_all_images_are(images: str, directions: str) -> None:
    method = make_method("lelp", settings={"directions": directions}).double()
    answers = Answered.joined(made_up(NUMBER)())
    if images == "none":
        answers = replace(answers, labels=answers.labels.clamp(max=3))
    else:
        answers.image[answers.labels == 4] = answers.image[4].clone()
    method.prepare(lambda **_: iter([answers]))
    every = replace(answers, labels=torch.zeros_like(answers.labels))
    scores = rows_of(method, 0, every) @ method.projections[4].T - method.offsets[4]
    assert float(scores.mean(0).abs().max()) < 1e-6
    assert float(scores.square().mean()) == pytest.approx(1.0, rel=1e-5)

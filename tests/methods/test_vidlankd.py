"""`vidlankd`: the distance of neurons against published numbers and loops, and the method's terms by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from cmapkd.config import ConfigError
from cmapkd.objectives.neuron_selectivity import selectivity_distance
from writers import batch_of, make_judge, make_task, make_writer

PUBLISHED = json.loads((Path(__file__).parent / "fixtures/vidlankd.json").read_text())


def states(rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_loops(student: Tensor, teacher: Tensor) -> Tensor:
    """The published kernel over all pairs of neurons of one answer, with its constant."""
    s, t = (F.normalize(each, dim=0).T for each in (student, teacher))
    kernels = [
        torch.stack([(a @ b) ** 2 for a in one for b in other]).mean() for one, other in ((s, s), (s, t), (t, t))
    ]
    return kernels[0] - 2 * kernels[1] + kernels[2]


def test_the_distance_is_that_of_all_pairs_of_neurons() -> None:
    student, teacher = states(9, 4, 0), states(9, 6, 1)
    sample = torch.tensor([0, 0, 0, 0, 2, 2, 2, 3, 3])  # the second answer has no token
    found = selectivity_distance(student, teacher, sample, 5)
    for number in (0, 2, 3):
        own = sample == number
        torch.testing.assert_close(found[number], by_loops(student[own], teacher[own]))
    assert found[[1, 4]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(selectivity_distance(student, 3 * student, sample, 5), torch.zeros(5).double())
    single = selectivity_distance(student[:2], teacher[:2], torch.tensor([0, 1]), 2)
    torch.testing.assert_close(single, torch.zeros(2).double())
    assert selectivity_distance(student[:0], teacher[:0], sample[:0], 2).tolist() == [0.0, 0.0]
    own = student.requires_grad_()
    assert gradcheck(lambda x: selectivity_distance(x, teacher, sample, 5), (own,))


def test_it_is_the_published_loss_but_for_its_constant() -> None:
    student, teacher = (torch.tensor(PUBLISHED[name], dtype=torch.float64) for name in ("student", "teacher"))
    student.requires_grad_()
    texts, length, _ = student.shape
    sample = torch.arange(texts).repeat_interleave(length)
    ours = selectivity_distance(student.flatten(0, 1), teacher.flatten(0, 1), sample, texts).sum() / length
    neurons = F.normalize(teacher, dim=1)
    constant = (neurons @ neurons.mT / teacher.shape[-1]).square().sum() / length
    assert (ours - constant).item() == pytest.approx(PUBLISHED["value"], abs=1e-9)
    (gradient,) = torch.autograd.grad(ours, student)
    torch.testing.assert_close(gradient, torch.tensor(PUBLISHED["gradient"], dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", ["own", "reversed"])
def test_the_terms_are_those_written_out(order: str) -> None:
    method = make_task("vidlankd", order=order)
    batch = batch_of(method)
    terms = method(batch)
    plain = make_task("sft")
    torch.testing.assert_close(terms["answers"].value, plain(batch_of(plain))["answers"].value)
    student = method.student(batch.inputs["student"], method.student_needs).hidden["answer"]
    teacher = method.teachers["teacher"].model(batch.inputs["teacher"], method.teacher_needs).hidden["answer"]
    total = torch.zeros((), dtype=torch.float64)
    for number in range(len(batch)):
        own = F.normalize(method.states_head(student.values[student.sample == number]), dim=-1)
        theirs = teacher.values[teacher.sample == number]
        total = total + by_loops(own, theirs.flip(0) if order == "reversed" else theirs)
    torch.testing.assert_close(terms["selectivity"].value, total / len(batch))
    assert terms["selectivity"].value > 1e-4


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="answers_weight is 0, so nothing teaches the student to write"):
        make_task("vidlankd", answers_weight=0)
    with pytest.raises(ConfigError, match="selectivity_weight"):
        make_task("vidlankd", selectivity_weight=0)
    assert "holds its likeliest tokens" in (make_task("vidlankd").not_cached or "")
    wide = make_task("vidlankd", student=make_writer(width=32), teacher=make_judge())
    assert wide(batch_of(wide))["selectivity"].value > 0

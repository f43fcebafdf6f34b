"""Losses over classes against their definition in loops, the published code, and what their docstrings promise."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from cmapkd.objectives import kendall_tau, kl_divergence, labelled_cross_entropy, non_target_divergence, rank

FIXTURES = Path(__file__).parents[1] / "methods" / "fixtures"


def published(name: str) -> dict:
    return json.loads((FIXTURES / f"{name}.json").read_text())


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS = torch.tensor([2, -1, 0, 4, -1])


# ------------------------------------------------------------------------------------------------ divergence of classes


@pytest.mark.parametrize("case", published("hinton")["cases"])
def test_kl_equals_mdistillers(case: dict) -> None:
    student = tensor(case["student_logits"]).requires_grad_()
    value = kl_divergence(student, tensor(case["teacher_logits"]), temperature=case["temperature"])
    assert value.item() == pytest.approx(case["value"], rel=1e-10)
    torch.testing.assert_close(torch.autograd.grad(value, student)[0], tensor(case["gradient"]), rtol=1e-9, atol=1e-12)


def test_kl_of_a_high_temperature_matches_centred_logits() -> None:
    """T² KL -> half the mean squared difference of the centred logits; its gradient that difference, over B C."""
    student, teacher = rows(4, 7).requires_grad_(), rows(4, 7, seed=1)
    value = kl_divergence(student, teacher, temperature=1000.0)
    with torch.no_grad():
        difference = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    assert value.item() == pytest.approx(float(difference.square().sum(1).mean()) / (2 * 7), rel=3e-3)
    gradient = torch.autograd.grad(value, student)[0]
    torch.testing.assert_close(gradient, difference / (4 * 7), rtol=0, atol=1e-3 * float(gradient.abs().max()))


# ------------------------------------------------------------------------------------------------ cross-entropy


def test_cross_entropy_is_the_mean_over_the_labelled() -> None:
    logits = rows(5, 6)
    probabilities = logits.softmax(1)
    expected = -sum(math.log(probabilities[row, label]) for row, label in enumerate(LABELS) if label >= 0) / 3
    assert labelled_cross_entropy(logits, LABELS).item() == pytest.approx(expected)


def test_cross_entropy_without_labels_is_zero_and_asks_nothing() -> None:
    logits = rows(3, 4).requires_grad_()
    loss = labelled_cross_entropy(logits, torch.full((3,), -1))
    assert loss.item() == 0
    assert torch.equal(torch.autograd.grad(loss, logits)[0], torch.zeros(3, 4, dtype=torch.float64))


def test_gradients() -> None:
    student, teacher = rows(5, 6).requires_grad_(), rows(5, 6, seed=1)
    assert gradcheck(lambda s: labelled_cross_entropy(s, LABELS), student)
    assert gradcheck(lambda s: non_target_divergence(s, teacher, LABELS, torch.tensor([1.0, 0, 1, 1, 0])), student)


def test_labels_without_a_class_are_refused() -> None:
    with pytest.raises(ValueError, match="a label 4, but only 4 classes"):
        labelled_cross_entropy(rows(5, 4), LABELS)
    with pytest.raises(ValueError, match="one label for each row"):
        labelled_cross_entropy(rows(4, 6), LABELS)


# ------------------------------------------------------------------------------------------------ non-target divergence


@pytest.mark.parametrize("case", published("c2kd")["cases"])
def test_non_target_divergence_and_mask_equal_c2kds(case: dict) -> None:
    student, teacher = tensor(case["student_logits"]).requires_grad_(), tensor(case["teacher_logits"])
    tau = kendall_tau(teacher, student)
    torch.testing.assert_close(tau, tensor(case["tau"]), rtol=1e-9, atol=1e-12)
    mask = (tau > 0).double()
    assert mask.tolist() == case["mask"]
    value = non_target_divergence(student, teacher, torch.tensor(case["labels"]), mask)
    assert value.item() == pytest.approx(case["value"], rel=1e-10)
    torch.testing.assert_close(torch.autograd.grad(value, student)[0], tensor(case["gradient"]), rtol=1e-9, atol=1e-12)


def test_non_target_divergence_written_out() -> None:
    student, teacher, counts = rows(5, 6), rows(5, 6, seed=1), [1.0, 0.5, 0.0, 1.0, 1.0]
    total = 0.0
    for row, label in enumerate(LABELS.tolist()):
        ours, theirs = student[row].clone(), teacher[row].clone()
        if label >= 0:
            ours[label] = theirs[label] = 0.0
        q, p = ours.softmax(0), theirs.softmax(0)
        total += counts[row] * sum(float(p[c] * (p[c].log() - q[c].log())) for c in range(6))
    found = non_target_divergence(student, teacher, LABELS, torch.tensor(counts))
    assert found.item() == pytest.approx(total / 5)


def test_the_right_class_has_no_influence() -> None:
    student, teacher = rows(5, 6), rows(5, 6, seed=1)
    before = non_target_divergence(student, teacher, LABELS)
    for row, label in enumerate(LABELS.tolist()):
        if label >= 0:
            student[row, label] += 3.0
            teacher[row, label] -= 2.0
    torch.testing.assert_close(non_target_divergence(student, teacher, LABELS), before)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(5, 6\) but teacher_logits \(5, 7\)"):
        non_target_divergence(rows(5, 6), rows(5, 7), LABELS)
    with pytest.raises(ValueError, match="two rankings of the same candidates"):
        kendall_tau(rows(5, 6), rows(5, 7))


# ------------------------------------------------------------------------------------------------ rank agreement


def tau_in_loops(first: list[float], second: list[float]) -> float:
    agree, ties = 0, [0, 0]
    pairs = list(itertools.combinations(range(len(first)), 2))
    for i, j in pairs:
        one, other = first[i] - first[j], second[i] - second[j]
        agree += (one * other > 0) - (one * other < 0)
        ties[0] += one == 0
        ties[1] += other == 0
    untied = math.sqrt((len(pairs) - ties[0]) * (len(pairs) - ties[1]))
    return agree / untied if untied else 0.0


@pytest.mark.parametrize("cells", [2**24, 40])
def test_tau_in_loops(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank, "_CELLS", cells)
    first, second = (rows(7, 6, seed=seed).mul(2).round() for seed in (0, 1))  # many ties
    first[0], second[1] = 1.0, 2.0  # no order at all
    expected = [tau_in_loops(*pair) for pair in zip(first.tolist(), second.tolist(), strict=True)]
    assert kendall_tau(first, second).tolist() == pytest.approx(expected)


def test_tau_of_the_same_and_the_opposite_order() -> None:
    scores = rows(3, 9)
    torch.testing.assert_close(kendall_tau(scores, 3 * scores + 1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(kendall_tau(scores, -scores), -torch.ones(3, dtype=torch.float64))

"""Losses of token graphs: the sums in loops, gradients, and what the mathematics promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from cmapkd.objectives import context_distance, neighbour_divergence, token_contrast

NODES, WIDTHS = 9, (4, 6)
GRAPH: dict[str, Any] = {"neighbours": 3, "bandwidth": 0.7, "temperature": 0.1}


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def models() -> tuple[Tensor, Tensor]:
    return rows(NODES, WIDTHS[0]), rows(NODES, WIDTHS[1], seed=1)


def centred_unit(tokens: Tensor) -> list[Tensor]:
    return [(x - x.mean()) / (x - x.mean()).norm() for x in tokens]


def log_row(tokens: Tensor, i: int) -> list[Tensor]:
    """The log of the softmax of row i of A / temperature, written out."""
    x = centred_unit(tokens)
    squared = [((x[i] - x[j]) ** 2).sum() for j in range(len(x))]
    others = sorted((j for j in range(len(x)) if j != i), key=lambda j: float(squared[j]))
    near = set(others[: GRAPH["neighbours"]])
    zero = squared[0] * 0
    row = [(-squared[j] / (2 * GRAPH["bandwidth"])).exp() if j in near else zero for j in range(len(x))]
    parts = [a / GRAPH["temperature"] for a in row]
    total = torch.stack([part.exp() for part in parts]).sum().log()
    return [part - total for part in parts]


def test_neighbour_divergence_is_the_sum_in_loops() -> None:
    student, teacher = models()
    for i, found in enumerate(neighbour_divergence(student, teacher, **GRAPH)):
        q, p = log_row(student, i), log_row(teacher, i)
        torch.testing.assert_close(found, sum((a.exp() * (a - b) for a, b in zip(q, p, strict=True)), q[0] * 0))


def test_token_contrast_is_the_sum_in_loops() -> None:
    student, teacher = rows(NODES, 4), rows(NODES, 4, seed=1)
    for i, found in enumerate(token_contrast(student, teacher, temperature=0.3)):
        scores = [torch.cosine_similarity(student[i], teacher[j], dim=0) / 0.3 for j in range(NODES)]
        expected = torch.stack([score.exp() for score in scores]).sum().log() - scores[i]
        torch.testing.assert_close(found, expected)


def test_context_distance_is_the_sum_in_loops_and_n_times_the_mean_over_pairs() -> None:
    student, teacher = rows(2, 5, WIDTHS[0]), rows(2, 5, WIDTHS[1], seed=1)
    for picture, found in enumerate(context_distance(student, teacher, temperature=0.2)):
        total = 0.0
        for i in range(5):
            ours, theirs = (
                torch.softmax(torch.stack([(x[i] @ each) / 0.2 for each in x]), 0)
                for x in (centred_unit(tokens[picture]) for tokens in (student, teacher))
            )
            total += float(((ours - theirs) ** 2).mean())
        assert found.item() == pytest.approx(total, rel=1e-12)  # 1/5 Σ_i of the sum = Σ_i of the mean


def test_gradients() -> None:
    student, teacher = (x.requires_grad_() for x in models())
    assert gradcheck(lambda s: neighbour_divergence(s, teacher, **GRAPH), student)
    same = rows(NODES, WIDTHS[0], seed=2).requires_grad_()
    assert gradcheck(lambda s: token_contrast(s, same, temperature=0.3), student)
    contexts, theirs = rows(2, 4, 3).requires_grad_(), rows(2, 4, 5, seed=1).requires_grad_()
    assert gradcheck(lambda s: context_distance(s, theirs, temperature=0.3), contexts)
    for loss in (
        neighbour_divergence(student, teacher, **GRAPH).sum(),
        token_contrast(student, same, temperature=0.3).sum(),
        context_distance(contexts, theirs, temperature=0.3).sum(),
    ):
        loss.backward()
    assert all(each.grad is None for each in (teacher, same, theirs))


def test_zero_at_agreement_and_whatever_size_rotation_and_shift_of_channels() -> None:
    student, _ = models()
    rotation = torch.linalg.qr(rows(4, 4, seed=5)).Q
    mean_free = student - student.mean(1, keepdim=True)
    ones = torch.full((4,), 0.5, dtype=torch.float64)  # a rotation that keeps the direction of equal channels
    plane = torch.eye(4, dtype=torch.float64) - torch.outer(ones, ones)
    kept = torch.linalg.svd(plane @ rotation @ plane)
    turn = kept.U[:, :3] @ kept.Vh[:3]
    for other in (student, 7 * student, student + 3, mean_free @ turn):
        assert float(neighbour_divergence(student, other, **GRAPH).abs().max()) < 1e-12
        assert float(context_distance(student[None], other[None], temperature=0.1).max()) < 1e-12


def test_few_nodes() -> None:
    """Three neighbours are asked for, and there is one."""
    student, teacher = models()
    assert bool(neighbour_divergence(student[:2], teacher[:2], **GRAPH).isfinite().all())


def test_a_printed_softmax_of_affinities_is_nearly_flat() -> None:
    """Ten of 512 nodes get about 3 % of the mass at temperature 1: e / (10 e + 502) each at most."""
    assert 10 * math.e / (10 * math.e + 502) < 0.06
    student, teacher = rows(512, 8), rows(512, 8, seed=1)
    flat, sharp = (
        float(neighbour_divergence(student, teacher, neighbours=10, bandwidth=1.0, temperature=t).mean())
        for t in (1.0, 0.1)
    )
    assert flat < 0.05 < 1.0 < sharp


def test_wrong_inputs_are_refused() -> None:
    student, teacher = models()
    with pytest.raises(ValueError, match=r"got 0, 0\.7 and 0\.1"):
        neighbour_divergence(student, teacher, **{**GRAPH, "neighbours": 0})
    with pytest.raises(ValueError, match="project the student to the teacher's width"):
        token_contrast(student, teacher, temperature=0.1)
    with pytest.raises(ValueError, match="at the same places"):
        context_distance(student[None], teacher[None, :3], temperature=0.1)
    for call in (lambda: token_contrast(student, student, temperature=0.0),
                 lambda: context_distance(student[None], student[None], temperature=0.0)):  # fmt: skip
        with pytest.raises(ValueError, match="the temperature must be positive, got 0"):
            call()

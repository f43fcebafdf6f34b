"""Two tokenizers of one text: groups of tokens, the chain rule, distances by rank."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from cmapkd.objectives.ranked import byte_groups, hybrid_distance, joined, ranked_distance
from cmapkd.objectives.tokens import TokenDivergence

GOLD = json.loads((Path(__file__).parent / "fixtures" / "gold.json").read_text())


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([2, 3], [2, 3], [(0, 1, 0, 1), (1, 2, 1, 2)]),
        ([5], [2, 3], [(0, 1, 0, 2)]),
        ([2, 2, 1, 1], [1, 3, 2], [(0, 2, 0, 2), (2, 4, 2, 3)]),
        ([2, 0], [1, 1, 0], [(0, 1, 0, 2), (1, 2, 2, 3)]),
        ([2, 0], [2], [(0, 1, 0, 1)]),
        ([0, 2, 1, 0], [3, 0], [(0, 3, 0, 1), (3, 4, 1, 2)]),
        ([2, 1], [0, 0, 2, 1, 0], [(0, 1, 0, 3), (1, 2, 3, 4)]),
        ([], [], []),
    ],
)
def test_groups_end_at_the_same_byte(one: list[int], other: list[int], expected: list[tuple[int, ...]]) -> None:
    assert [(a.start, a.stop, b.start, b.stop) for a, b in byte_groups(one, other)] == expected


def test_groups_are_the_shortest_that_cover_both_texts() -> None:
    draws = torch.Generator().manual_seed(0)
    for _ in range(50):
        cuts = [sorted({*torch.randint(1, 30, (8,), generator=draws).tolist(), 30}) for _ in range(2)]
        one, other = ([end - start for start, end in zip([0, *some], some, strict=False)] for some in cuts)
        groups = byte_groups(one, other)
        assert len(groups) == len(set(cuts[0]) & set(cuts[1]))  # one for each common end
        for here, there in groups:
            assert sum(one[: here.start]) == sum(other[: there.start])
            assert sum(one[here]) == sum(other[there])


def test_texts_of_different_length_and_gaps_are_refused() -> None:
    with pytest.raises(ValueError, match="give the same text"):
        byte_groups([2], [3])
    with pytest.raises(ValueError, match="must stand at the start or at the end"):
        byte_groups([1, 0, 1], [2])


def test_joined_tokens_are_the_chain_rule_written_out() -> None:
    log_p, targets = normal(5, 4).log_softmax(-1), torch.tensor([3, 0, 2, 1, 1])
    got = joined(log_p, targets, [slice(0, 1), slice(1, 4), slice(4, 5)])
    for v in range(4):
        p = log_p.exp()
        expected = [p[0, v], p[1, 0] * p[2, 2] * p[3, v], p[4, v]]
        assert got[:, v].exp().tolist() == pytest.approx([float(one) for one in expected])


def test_the_distance_by_rank_is_the_sum_over_ranks_written_out() -> None:
    p, q = normal(3, 6).softmax(-1), normal(3, 4).softmax(-1)
    for i, value in enumerate(ranked_distance(p, q)):
        first, second = sorted(p[i].tolist(), reverse=True), [*sorted(q[i].tolist(), reverse=True), 0, 0]
        assert float(value) == pytest.approx(sum(abs(a - b) for a, b in zip(first, second, strict=True)))
    assert (ranked_distance(p, p[:, torch.randperm(6)]).abs() < 1e-12).all()
    assert (ranked_distance(p, q, likeliest=2) <= ranked_distance(p, q)).all()
    torch.testing.assert_close(ranked_distance(p, q, likeliest=6), ranked_distance(p, q))
    assert gradcheck(lambda logits: ranked_distance(p, logits.softmax(-1)), normal(3, 4).requires_grad_())


def test_the_hybrid_compares_common_tokens_by_text() -> None:
    log_p, log_q = normal(2, 5).log_softmax(-1), normal(2, 4).log_softmax(-1)
    matched = torch.tensor([[0, 3], [4, 1]])
    got = hybrid_distance(log_p, log_q, matched, divergence=TokenDivergence("forward"))
    for i in range(2):
        p, q = log_p[i].exp().tolist(), log_q[i].exp().tolist()
        a, b = [p[0], p[4]], [q[3], q[1]]
        kl = sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))
        rest = zip(sorted(p[1:4], reverse=True), [*sorted((q[0], q[2]), reverse=True), 0], strict=True)
        assert float(got[i]) == pytest.approx(2 / 5 * kl + 3 / 5 * sum(abs(x - y) for x, y in rest))
    with pytest.raises(ValueError, match="compared at temperature 1"):
        hybrid_distance(log_p, log_q, matched, divergence=TokenDivergence(temperature=2.0))


@pytest.mark.parametrize("hybrid", [False, True])
def test_distances_are_those_of_gold(hybrid: bool) -> None:
    """Value and gradient of its extended loss with the `bayesian` merge, for one answer after one prompt token."""
    logits, teacher = (torch.tensor(GOLD[f"{who}_logits"], dtype=torch.float64) for who in ("student", "teacher"))
    logits.requires_grad_()
    ids = {who: torch.tensor(GOLD[f"{who}_ids"]) for who in ("student", "teacher")}
    groups = byte_groups(GOLD["teacher_bytes"], GOLD["student_bytes"])
    log_p = joined(teacher.log_softmax(-1), ids["teacher"], [group for group, _ in groups])
    log_q = joined(logits.log_softmax(-1), ids["student"], [group for _, group in groups])
    if hybrid:
        how = TokenDivergence("jsd", beta=GOLD["beta"])
        values = hybrid_distance(log_p, log_q, torch.tensor(GOLD["matched"]), divergence=how)
    else:
        values = ranked_distance(log_p.exp(), log_q.exp())
    published = GOLD["hybrid" if hybrid else "ranked"]
    assert float(values.mean().detach()) == pytest.approx(published["value"], rel=1e-6)
    (gradient,) = torch.autograd.grad(values.mean(), logits)
    torch.testing.assert_close(gradient, torch.tensor(published["gradient"]).double(), rtol=1e-5, atol=1e-8)

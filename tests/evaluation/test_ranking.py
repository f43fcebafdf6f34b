"""Ranks and hits against their definition: the average over every order that ties could take."""

from __future__ import annotations

from fractions import Fraction
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cmapkd.evaluation.ranking import Ranks, rank_positives


def every_order(scores: list[int], positives: set[int], k: int) -> tuple[Fraction, Fraction, Fraction]:
    """(chance of a hit within k, mean rank of the first positive, mean average precision) over all orders of ties."""
    hits, total, orders, precision = 0, 0, 0, Fraction(0)
    for order in permutations(range(len(scores))):
        ranked = sorted(order, key=lambda candidate: -scores[candidate])  # stable: `order` settles ties
        rank = 1 + min(place for place, candidate in enumerate(ranked) if candidate in positives)
        hits, total, orders = hits + (rank <= k), total + rank, orders + 1
        places = [place for place, candidate in enumerate(ranked, start=1) if candidate in positives]
        precision += sum(Fraction(found, place) for found, place in enumerate(places, start=1)) / len(places)
    return Fraction(hits, orders), Fraction(total, orders), precision / orders


def pairs_of(*pairs: tuple[int, int]) -> Tensor:
    return torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_hits_and_rank_are_the_average_over_every_order_of_ties(data: st.DataObject) -> None:
    num = data.draw(st.integers(1, 6))
    scores = data.draw(st.lists(st.integers(-1, 1), min_size=num, max_size=num))
    positives = data.draw(st.sets(st.integers(0, num - 1), min_size=1))
    k = data.draw(st.integers(1, 7))
    ranks = rank_positives(
        torch.ones(1, 1),
        torch.tensor(scores, dtype=torch.float32)[:, None],
        pairs_of(*((0, positive) for positive in positives)),
    )
    hit, rank, precision = every_order(scores, positives, k)
    assert ranks.average_precision.item() == pytest.approx(float(precision), abs=1e-12)
    assert ranks.hits(k).item() == pytest.approx(float(hit), abs=1e-12)
    assert ranks.expected().item() == pytest.approx(float(rank), abs=1e-12)


def test_ties_between_vectors_that_differ() -> None:
    queries = torch.tensor([[1.0, 1.0]])
    candidates = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0], [3.0, 0.0]])  # scores 2, 2, 2, 3
    ranks = rank_positives(queries, candidates, pairs_of((0, 1)))
    assert (ranks.better.item(), ranks.equal_negatives.item(), ranks.equal_positives.item()) == (1, 2, 1)
    assert [round(ranks.hits(k).item(), 12) for k in (1, 2, 3, 4)] == [0.0, round(1 / 3, 12), round(2 / 3, 12), 1.0]


@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("num", [3, 17, 333])
def test_identical_candidates_tie_exactly_whatever_the_matrix_product_rounds(num: int, num_queries: int) -> None:
    torch.manual_seed(0)
    candidates = torch.randn(1, 512).expand(num, 512).contiguous()
    queries = torch.randn(num_queries, 512)
    ranks = rank_positives(queries, candidates, pairs_of(*((query, query) for query in range(num_queries))))
    assert ranks.better.tolist() == [0] * num_queries
    assert ranks.equal_negatives.tolist() == [num - 1] * num_queries


def test_a_positive_that_is_repeated_or_listed_twice_counts_as_what_it_is() -> None:
    candidates = torch.tensor([[1.0], [1.0], [1.0], [0.0]])
    ranks = rank_positives(torch.ones(1, 1), candidates, pairs_of((0, 0), (0, 1), (0, 0), (0, 3)))
    assert (ranks.better.item(), ranks.equal_negatives.item(), ranks.equal_positives.item()) == (0, 1, 2)


def test_queries_without_a_positive_are_left_out() -> None:
    ranks = rank_positives(torch.eye(3), torch.eye(3), pairs_of((2, 2), (0, 1)))
    assert ranks.query.tolist() == [0, 2]
    assert ranks.better.tolist() == [1, 0]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), size=st.integers(1, 9))
def test_blocks_do_not_change_the_counts(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randint(-2, 3, (13, 4), generator=generator).float()
    candidates = torch.randint(-2, 3, (11, 4), generator=generator).float()
    pairs = torch.stack(
        [torch.randint(0, 13, (20,), generator=generator), torch.randint(0, 11, (20,), generator=generator)], dim=1
    )
    whole, split = (rank_positives(queries, candidates, pairs, queries_per_block=s) for s in (1000, size))
    for name in Ranks.__slots__:
        assert getattr(whole, name).tolist() == getattr(split, name).tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    broken = torch.ones(3, 2)
    broken[1, 0] = bad
    with pytest.raises(ValueError, match=r"1 of 3 queries are not finite .* row 1"):
        rank_positives(broken, torch.ones(2, 2), pairs_of((0, 0)))
    with pytest.raises(ValueError, match="1 of 3 candidates are not finite"):
        rank_positives(torch.ones(2, 2), broken, pairs_of((0, 0)))


def test_shapes_and_pairs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="one joint space"):
        rank_positives(torch.ones(2, 3), torch.ones(2, 2), pairs_of((0, 0)))
    with pytest.raises(ValueError, match="candidate 0 to 2, but there are 2"):
        rank_positives(torch.ones(2, 2), torch.ones(2, 2), pairs_of((0, 0), (1, 2)))

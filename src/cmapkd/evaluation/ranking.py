"""Where the positives of every query rank among all candidates, ties settled by expectation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

_BLOCK_SCORES = 4_000_000  # scores held at once: 16 MB, and as much again to compare them


@dataclass(frozen=True, slots=True)
class RankCounts:
    """The rank of the best-scoring positive of each query, in three counts, so that ties can be settled.

    Attributes:
        better: candidates that score strictly higher; none of them is a positive.
        equal_negatives: candidates that tie with the best positive without being positives.
        equal_positives: positives with that same score, at least 1.
    """

    better: Int[Tensor, " queries"]
    equal_negatives: Int[Tensor, " queries"]
    equal_positives: Int[Tensor, " queries"]

    def __len__(self) -> int:
        return len(self.better)

    def hits(self, k: int) -> Float[Tensor, " queries"]:
        """Probability that a positive is among the first `k` when candidates of equal score stand in random order.

        The places left for the tied group, `k - better`, are drawn without replacement from its negatives and
        positives; the query misses when all of them are negatives (hypergeometric). 0 or 1 where nothing ties; float64.
        """
        miss = torch.ones(len(self), dtype=torch.float64, device=self.better.device)
        tied = self.equal_negatives + self.equal_positives
        for place in range(k):
            share = (self.equal_negatives - place).clamp_min(0) / (tied - place).clamp_min(1).double()
            miss = torch.where(self.better + place < k, miss * share, miss)
        return 1 - miss

    def percent(self, k: int) -> float:
        """Recall@k: the mean of `hits`, 0 to 100."""
        return 100 * float(self.hits(k).sum()) / len(self)

    def expected(self) -> Float[Tensor, " queries"]:
        """Expected rank of the best positive, from 1, under the same random order; float64."""
        return 1 + self.better + self.equal_negatives / (self.equal_positives + 1).double()


@dataclass(frozen=True, slots=True)
class Ranks(RankCounts):
    """The ranks of the queries that have a positive, and the average precision of all their positives.

    Attributes:
        query: the queries that have a positive, ascending.
        average_precision: mean over a query's positives of the share of positives down to each; float64. With a single
            positive it is the reciprocal of its rank.
    """

    query: Int[Tensor, " queries"]
    average_precision: Float[Tensor, " queries"]


class _DistinctCandidates(NamedTuple):
    """Candidates without repetition: identical ones would tie exactly only if the matrix product saw to it."""

    vectors: Float[Tensor, "distinct dim"]
    of_candidate: Int[Tensor, " candidates"]
    sizes: Float[Tensor, " distinct"]


def rank_positives(
    queries: Float[Tensor, "queries dim"],
    candidates: Float[Tensor, "candidates dim"],
    positives: Int[Tensor, "pairs 2"],
    *,
    queries_per_block: int | None = None,
) -> Ranks:
    """Ranks every query's positives among all candidates, by inner product.

    Only one block of queries is scored at a time, and counted by comparison with each positive's score; scores are
    float32. A positive's score comes from the same product as the others, and identical candidates share one column,
    so that ties are exact.

    Args:
        positives: (query, candidate) pairs in any order, repeats allowed. A query without a pair is left out.
        queries_per_block: queries scored at once; by default as many as fit 4 million scores.
    Raises:
        ValueError: the widths differ, an embedding is not finite, or a pair points outside.
    """
    _check(queries, candidates, positives)
    pairs = positives.to(queries.device, torch.long)
    pairs = torch.unique(pairs, dim=0) if len(pairs) else pairs  # sorted by query
    distinct = _distinct(candidates.float())
    asked, count = torch.unique_consecutive(pairs[:, 0], return_counts=True)
    start = torch.cat([count.new_zeros(1), count.cumsum(0)])
    columns = distinct.of_candidate[pairs[:, 1]]
    rows = torch.repeat_interleave(torch.arange(len(asked), device=pairs.device), count)

    size = queries_per_block or max(1, _BLOCK_SCORES // len(distinct.vectors))
    score = torch.empty(len(pairs), device=pairs.device)  # of each pair
    above, equal = (torch.zeros(len(pairs), dtype=torch.long, device=pairs.device) for _ in range(2))
    for first in range(0, len(asked), size):
        last = min(first + size, len(asked))
        scores = queries[asked[first:last]].float() @ distinct.vectors.T
        block = slice(int(start[first]), int(start[last]))
        score[block] = scores[rows[block] - first, columns[block]]
        for place in range(int(count[first:last].max())):  # every query's first positive, then its second, ...
            having = (count[first:last] > place).nonzero().flatten()
            pair = start[first:last][having] + place
            of_these = scores if len(having) == last - first else scores[having]
            above[pair] = (
                (of_these > score[pair, None]).float() @ distinct.sizes
            ).long()  # exact below 2**24 candidates
            equal[pair] = ((of_these == score[pair, None]).float() @ distinct.sizes).long()
    return _summarise(asked, count, rows, score, above, equal)


def _summarise(
    asked: Int[Tensor, " queries"],
    count: Int[Tensor, " queries"],
    rows: Int[Tensor, " pairs"],
    score: Float[Tensor, " pairs"],
    above: Int[Tensor, " pairs"],
    equal: Int[Tensor, " pairs"],
) -> Ranks:
    """From each pair's score, and the candidates above and equal to it, to the counts of each query."""
    order = score.argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]  # by query, best first
    rows, score, above, equal = rows[order], score[order], above[order], equal[order]
    start = count.cumsum(0) - count
    fresh = torch.ones(
        len(score), dtype=torch.bool, device=score.device
    )  # whether a pair begins a group of equal scores
    fresh[1:] = (rows[1:] != rows[:-1]) | (score[1:] != score[:-1])
    group = fresh.cumsum(0) - 1
    first = fresh.nonzero().flatten()[group]
    equal_positives = group.bincount()[group]
    precision = _expected_precision(above, equal, first - start[rows], equal_positives)
    average = torch.zeros(len(asked), dtype=torch.float64, device=score.device).index_add_(0, rows, precision) / count
    best = equal_positives[start]
    return Ranks(above[start], equal[start] - best, best, query=asked, average_precision=average)


def _expected_precision(
    above: Int[Tensor, " pairs"],
    equal: Int[Tensor, " pairs"],
    positives_above: Int[Tensor, " pairs"],
    equal_positives: Int[Tensor, " pairs"],
) -> Float[Tensor, " pairs"]:
    """Expected share of positives down to a positive, when the candidates of its score stand in random order; float64.

    Averages (positives above + 1 + (i - 1) (equal positives - 1) / (equal - 1)) / (above + i) over its places i.
    Source: McSherry & Najork 2008, "Computing information retrieval performance measures efficiently in the presence
    of tied scores", section 3.
    """
    above, equal, positives = above.double(), equal.double(), positives_above.double() + 1
    harmonic = torch.special.digamma(above + equal + 1) - torch.special.digamma(above + 1)  # sum of 1 / (above + i)
    others = (equal_positives - 1) / (equal - 1).clamp_min(1)
    tied = (positives * harmonic + others * (equal - (above + 1) * harmonic)) / equal
    return torch.where(equal == 1, positives / (above + 1), tied)


def _check(
    queries: Float[Tensor, "queries dim"],
    candidates: Float[Tensor, "candidates dim"],
    positives: Int[Tensor, "pairs 2"],
) -> None:
    if queries.shape[1] != candidates.shape[1]:
        raise ValueError(
            f"queries are {queries.shape[1]} wide and candidates {candidates.shape[1]}: they must be embeddings of one "
            "joint space, so of one model."
        )
    for name, values in (("queries", queries), ("candidates", candidates)):
        check_finite(name, values)
    for column, values in ((0, queries), (1, candidates)):
        if len(positives) and not 0 <= int(positives[:, column].min()) <= int(positives[:, column].max()) < len(values):
            raise ValueError(
                f"positives name {('query', 'candidate')[column]} {int(positives[:, column].min())} to "
                f"{int(positives[:, column].max())}, but there are {len(values)}, numbered from 0."
            )


def check_finite(name: str, values: Float[Tensor, "count dim"]) -> None:
    """Refuses NaN and infinity.

    Raises:
        ValueError: says how many rows, and the first.
    """
    rows: Sequence[int] = (~torch.isfinite(values).all(dim=1)).nonzero().flatten().tolist()
    if rows:
        raise ValueError(
            f"{len(rows)} of {len(values)} {name} are not finite (NaN or infinity), the first at row {rows[0]}: any "
            "rank of them would be made up. The model diverged, or overflowed in half precision."
        )


def _distinct(candidates: Float[Tensor, "candidates dim"]) -> _DistinctCandidates:
    vectors, of_candidate, sizes = torch.unique(candidates, dim=0, return_inverse=True, return_counts=True)
    if len(vectors) == len(candidates):  # the usual case: keep the order, free the copy
        everyone = torch.arange(len(candidates), device=candidates.device)
        return _DistinctCandidates(candidates, everyone, torch.ones(len(candidates), device=candidates.device))
    return _DistinctCandidates(vectors, of_candidate, sizes.float())

"""Agreement: how far a student ranks, chooses and represents as its teacher does."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

_BLOCK_SCORES = 2_000_000  # similarities ranked at once: 16 MB each in float64


def ranks(values: Float[Tensor, "queries candidates"]) -> Float[Tensor, "queries candidates"]:
    """Ranks within each row from 1, lowest first; equal values share the mean of their places. float64."""
    ordered = values.sort(dim=-1).values.contiguous()
    below = torch.searchsorted(ordered, values.contiguous(), right=False)
    until = torch.searchsorted(ordered, values.contiguous(), right=True)
    return (below + until + 1).double() / 2


def spearman(
    first: Float[Tensor, "queries candidates"], second: Float[Tensor, "queries candidates"]
) -> Float[Tensor, " queries"]:
    """Spearman's rank correlation of each row: Pearson's of the ranks, ties as their mean rank; NaN for constant rows.

    Returns:
        -1 to 1, float64.
    """
    a, b = (rows - rows.mean(dim=-1, keepdim=True) for rows in (ranks(first), ranks(second)))
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()


def rank_agreement(
    queries: Float[Tensor, "queries dim"],
    candidates: Float[Tensor, "candidates dim"],
    teacher_queries: Float[Tensor, "queries teacher_dim"],
    teacher_candidates: Float[Tensor, "candidates teacher_dim"],
) -> dict[str, float]:
    """How similarly two models order the same candidates for the same queries, by inner product.

    Returns:
        `rank_correlation`: Spearman's over all candidates, the mean over queries (those where a model gives every
        candidate the same score say nothing and are left out), -1 to 1; `top1`: percent of queries with the same best
        candidate (of equal ones the first).
    Raises:
        ValueError: the two models were not given the same queries and candidates.
    """
    if len(queries) != len(teacher_queries) or len(candidates) != len(teacher_candidates):
        raise ValueError(
            f"agreement compares the same queries and candidates: the student has {len(queries)} x {len(candidates)}, "
            f"the teacher {len(teacher_queries)} x {len(teacher_candidates)}. A sample that only one model can read "
            "is left out by that one: remove it from the data."
        )
    size = max(1, _BLOCK_SCORES // max(1, len(candidates)))
    correlations: list[Tensor] = []
    same = 0
    for first in range(0, len(queries), size):
        scores = queries[first : first + size] @ candidates.T
        teacher_scores = teacher_queries[first : first + size] @ teacher_candidates.T
        correlations.append(spearman(scores, teacher_scores))
        same += int((scores.argmax(-1) == teacher_scores.argmax(-1)).sum())
    return {"rank_correlation": float(torch.cat(correlations).nanmean()), "top1": 100 * same / len(queries)}


def linear_cka(first: Float[Tensor, "samples width"], second: Float[Tensor, "samples other_width"]) -> float:
    """Linear centred kernel alignment of two representations of the same samples, 0 to 1.

    ||Y'X||^2 / (||X'X|| ||Y'Y||) of column-centred X and Y, Frobenius norms: unchanged by rotation and scaling of
    either. Computed from covariances in float64, so in memory of width x width whatever the number of samples. NaN
    where a representation is constant.

    Raises:
        ValueError: the numbers of samples differ, or there are fewer than two.
    Source: Kornblith et al. 2019, arXiv:1905.00414, section 3.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"CKA compares two or more of the same samples, got {len(first)} and {len(second)}")
    x, y = (values.double() - values.double().mean(0) for values in (first, second))
    together = (y.T @ x).square().sum()
    return float(together / ((x.T @ x).norm() * (y.T @ y).norm()))


def prediction_agreement(
    images: Float[Tensor, "images dim"],
    weights: Float[Tensor, "classes dim"],
    teacher_images: Float[Tensor, "images teacher_dim"],
    teacher_weights: Float[Tensor, "classes teacher_dim"],
    labels: Int[Tensor, " images"],
) -> dict[str, float]:
    """Zero-shot predictions of two models: how often they are the same, and how often where the teacher is wrong.

    Returns:
        `top1` and `top1_where_teacher_errs` (NaN where it never does), in percent of the images; of equal classes the
        first counts.
    """
    predicted = (images @ weights.T).argmax(-1)
    teacher_predicted = (teacher_images @ teacher_weights.T).argmax(-1)
    same = (predicted == teacher_predicted).double()
    wrong = (teacher_predicted != labels) & (labels >= 0)
    return {"top1": 100 * float(same.mean()), "top1_where_teacher_errs": 100 * float(same[wrong].mean())}

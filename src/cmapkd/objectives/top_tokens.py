"""A teacher that is known by its likeliest tokens: divergences on k cells and one for all other tokens together."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cmapkd.objectives.tokens import TokenDivergence


class Likeliest(Protocol):
    """What is known of each row's prediction (`models.token_types.TopTokens`)."""

    @property
    def ids(self) -> Int[Tensor, "rows k"]: ...
    @property
    def log_p(self) -> Float[Tensor, "rows k"]: ...
    @property
    def rest(self) -> Float[Tensor, " rows"]: ...


def top_divergence(
    student_logits: Float[Tensor, "rows tokens"], top: Likeliest, divergence: TokenDivergence
) -> Float[Tensor, " rows"]:
    """The divergence on k + 1 cells: the teacher's likeliest tokens, and all others as one.

    The student's probabilities are those of its softmax over all tokens. Joining cells never increases these
    divergences: each is a lower bound of that on all tokens, and the same where k is the number of tokens.

    Args:
        top: at the divergence's temperature. Where its rest is none of 1, as far as its type can tell, the rest is
            taken to be this type's resolution.
    Returns:
        In nats, times the squared temperature; zero where the cells agree; float32 or wider.
    Raises:
        ValueError: the shapes do not fit, or the divergence asks for all of the teacher's logits.
    """
    check_top(top, divergence, *student_logits.shape)
    log_q = divergence.log_softmax(student_logits)
    log_q_cells = to_cells(log_q, top.ids)
    return divergence.measure(log_q_cells, teacher_cells(top, log_q)).values * divergence.temperature**2


def check_top(top: Likeliest, divergence: TokenDivergence, num_rows: int, num_tokens: int) -> None:
    """Refuses likeliest tokens that do not fit the student's rows or the divergence.

    Raises:
        ValueError: with the shapes, or what the divergence would need.
    """
    shapes = tuple(top.ids.shape), tuple(top.log_p.shape), tuple(top.rest.shape)
    k = top.ids.shape[-1]
    if shapes != ((num_rows, k), (num_rows, k), (num_rows,)) or not 0 < k <= num_tokens:
        raise ValueError(
            f"ids, log_p and rest have shapes {shapes}, but the student has {num_rows} rows and {num_tokens} tokens: "
            "give [rows, k], [rows, k] and [rows], with 1 <= k <= tokens"
        )
    if divergence.reads_all_tokens:
        raise ValueError(
            f"{divergence.name} reads all of the teacher's logits, and only its {k} likeliest tokens are known: "
            "use a teacher without a cache, or another divergence"
        )


def to_cells(log_q: Float[Tensor, "rows tokens"], ids: Int[Tensor, "rows k"]) -> Float[Tensor, "rows cells"]:
    """Log-probabilities of k tokens and of all others together; without the last cell where there are no others."""
    ids = ids.long()
    chosen = log_q.gather(-1, ids)
    if ids.shape[-1] == log_q.shape[-1]:
        return chosen
    return torch.cat([chosen, log_q.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)], -1)


def teacher_cells(top: Likeliest, like: Float[Tensor, "rows tokens"]) -> Float[Tensor, "rows cells"]:
    """The teacher's log-probabilities of the cells of `to_cells`, in the type of `like`."""
    log_p = top.log_p.to(like)
    if log_p.shape[-1] == like.shape[-1]:
        return log_p
    floor = math.log(torch.finfo(like.dtype).eps)  # what probabilities that sum to 1 or more, rounded, can still hide
    return torch.cat([log_p, top.rest.to(like).clamp(min=floor)[:, None]], -1)


def top_measure(
    divergence: TokenDivergence, log_q: Float[Tensor, "rows tokens"], top: Likeliest
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows tokens"], Float[Tensor, "rows 1"]]:
    """Values, and `dense` and `totals` of their gradient `dense - totals * q` by the student's logits over all tokens.

    At temperature 1, and unchecked.
    """
    cells = to_cells(log_q, top.ids)
    values, slopes = divergence.measure(cells, teacher_cells(top, log_q))
    return values, _spread(slopes, cells, log_q, top.ids.long()), slopes.sum(-1, keepdim=True)


def _spread(slopes: Tensor, cells: Tensor, log_q: Tensor, ids: Tensor) -> Tensor:
    """From slopes by cells to those by tokens. A token of the rest moves its cell by its share of the cell."""
    k = ids.shape[-1]
    if k == log_q.shape[-1]:
        return torch.empty_like(log_q).scatter_(-1, ids, slopes)
    shares = log_q.sub(cells[:, k:]).exp_()  # of the rest, which may be too small for its reciprocal
    return shares.mul_(slopes[:, k:]).scatter_(-1, ids, slopes[:, :k])

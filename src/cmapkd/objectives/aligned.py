"""Divergence of two models whose tokens differ, at the places of a text where a token of each begins.

At such a place both models have read the same text. A *group* is what each of them writes up to the next such place:
the same bytes, in one token or in several. What may happen at the place is taken apart into cells that mean the same
text for both models:

- *written*: the group's text. Its probability is that of its tokens by the chain rule.
- a cell for each pair of tokens that stand for the same bytes, but for the pairs with a group's first token;
- *rest*: everything else, also a group's first token without the tokens after it.

Each model's cells sum to 1. So every divergence of `TokenDivergence` is >= 0 on them, and zero where both models agree.
With one tokenizer every token is a cell, and the value is that on all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cmapkd.objectives.tokens import TokenDivergence
from cmapkd.objectives.top_tokens import Likeliest

_NOTHING = -60.0  # log-probability that both models are given where a cell is not used


class Spans(NamedTuple):
    """The rows of one model in each group.

    Attributes:
        start, stop: Int[groups]; in order, no two overlap, none is empty.
    """

    start: Int[Tensor, " groups"]
    stop: Int[Tensor, " groups"]


class Pairs(NamedTuple):
    """Tokens of both models that stand for the same bytes, [pairs] ids each; no id twice."""

    teacher: Int[Tensor, " pairs"]
    student: Int[Tensor, " pairs"]


class Side(NamedTuple):
    """One model's log-probabilities at the groups of a chunk.

    Attributes:
        log_p: Float[groups columns] at the first row of each: of its tokens, or of the likeliest and of all others.
        first: Int[groups], the column of the group's first token; -1: none of the columns.
        written: Float[groups], of the group's text; read where it is known.
        later: Float[groups], of its tokens behind the first one, after it; 0 where there are none.
        ids: Int[groups], the first token.
    """

    log_p: Tensor
    first: Tensor
    written: Tensor
    later: Tensor
    ids: Tensor


def side_of(log_p: Float[Tensor, "rows tokens"], targets: Int[Tensor, " rows"], spans: Spans) -> Side:
    """Of a model that is known whole, from its log-probabilities and the tokens that stand there."""
    chosen = log_p.gather(-1, targets[:, None].long())[:, 0]
    return Side(log_p[spans.start], targets[spans.start].long(), *_along(chosen, spans), targets[spans.start].long())


def side_of_top(top: Likeliest, targets: Int[Tensor, " rows"], spans: Spans) -> Side:
    """Of a teacher that is known by its likeliest tokens; the last column is all others.

    A group's text is known where all its tokens are among the likeliest, and has a probability of nan elsewhere.
    """
    hit = top.ids == targets[:, None]
    chosen = torch.where(hit, top.log_p, 0.0).sum(-1).masked_fill(~hit.any(-1), torch.nan)
    columns = torch.cat([top.log_p, top.rest[:, None]], -1)[spans.start]
    found = hit[spans.start]
    first = torch.where(found.any(-1), found.int().argmax(-1), -1)
    return Side(columns, first, *_along(chosen, spans), targets[spans.start].long())


def aligned_cells(
    student: Side, teacher: Side, pairs: Pairs, top_ids: Int[Tensor, "groups k"] | None = None
) -> tuple[Float[Tensor, "groups cells"], Float[Tensor, "groups cells"]]:
    """Log-probabilities of the cells of each group, the student's and the teacher's.

    Args:
        top_ids: the teacher's likeliest tokens at each group's first row; None: all of them, by id. Then only these are
            cells, and where a token of the group's text is none of them, its text is part of the rest.
    """
    if top_ids is None:
        ours, theirs = (each.expand(len(student.ids), -1) for each in (pairs.student, pairs.teacher))
        columns, active = theirs, torch.ones_like(ours, dtype=torch.bool)
    else:
        place = _places(pairs.teacher, int(max(top_ids.max(), pairs.teacher.max())) + 1)[top_ids]
        active = place >= 0
        ours, theirs = pairs.student[place.clamp(min=0)], top_ids
        columns = torch.arange(top_ids.shape[-1], device=top_ids.device).expand_as(top_ids)
    known = teacher.written.isfinite()
    active = active & (ours != student.ids[:, None]) & (theirs != teacher.ids[:, None])
    return _cells(student, ours, active, known), _cells(teacher, columns, active, known)


def aligned_divergence(
    hidden: Float[Tensor, "rows width"],
    head: Any,
    targets: Int[Tensor, " rows"],
    spans: Spans,
    measure: Callable[[Float[Tensor, "chunk tokens"], Int[Tensor, " chunk"], Spans, slice], Tensor],
    *,
    weights: Float[Tensor, " groups"] | None,
    divergence: TokenDivergence,
    rows_at_once: int,
) -> Float[Tensor, ""]:
    """The weighted sum over groups of a measure of the student's log-probabilities, some groups at a time.

    A chunk's logits are made again in the backward pass, so none of them is kept between the passes.

    Args:
        hidden, head: of the student; row i predicts `targets[i]`.
        spans: of the student.
        measure: of the log-probabilities of a chunk's rows at the divergence's temperature, their targets, the chunk's
            spans from row 0, and which groups these are: [groups of the chunk].
        weights: of each group; None: 1.
    Returns:
        Times the squared temperature.
    """

    def of_chunk(states: Tensor, tokens: Tensor, local: Spans, groups: slice) -> Tensor:
        values = measure(divergence.log_softmax(head(states)), tokens, local, groups)
        return (values if weights is None else values * weights[groups].to(values)).sum()

    parts = [0 * hidden.sum()]  # where there are no groups
    for groups in _chunks(spans, rows_at_once):
        first, last = int(spans.start[groups][0]), int(spans.stop[groups][-1])
        local = Spans(spans.start[groups] - first, spans.stop[groups] - first)
        given = (hidden[first:last], targets[first:last], local, groups)
        parts.append(checkpoint(of_chunk, *given, use_reentrant=False, preserve_rng_state=False))
    return torch.stack(parts[1:] or parts).sum() * divergence.temperature**2


def _chunks(spans: Spans, size: int) -> list[slice]:
    """Groups in order, each chunk of them with at most `size` rows, or one group."""
    made, begin, starts = [], 0, spans.start.tolist()
    for number, stop in enumerate(spans.stop.tolist()):
        if number > begin and stop - starts[begin] > size:
            made.append(slice(begin, number))
            begin = number
    return [*made, slice(begin, len(starts))] if starts else []


def _along(chosen: Float[Tensor, " rows"], spans: Spans) -> tuple[Tensor, Tensor]:
    """Of each group, the sum over its rows, and over all but the first."""
    sizes = spans.stop - spans.start
    owner = torch.repeat_interleave(torch.arange(len(sizes), device=chosen.device), sizes)
    begin = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    inside = torch.arange(len(owner), device=chosen.device) - begin
    rows = chosen[torch.repeat_interleave(spans.start, sizes) + inside]
    nothing = chosen.new_zeros(len(sizes))
    later = nothing.index_add(0, owner, rows.masked_fill(inside == 0, 0.0))
    return nothing.index_add(0, owner, rows), later


def _cells(
    side: Side, columns: Int[Tensor, "groups k"], active: Bool[Tensor, "groups k"], known: Bool[Tensor, " groups"]
) -> Float[Tensor, "groups cells"]:
    """One model's log-probabilities of the cells: of `columns`, of the group's text, and of the rest."""
    log_p, (groups, width) = side.log_p, side.log_p.shape
    floor = log_p.new_full((groups, 1), math.log(torch.finfo(log_p.dtype).eps))  # of the rest, so that it has a slope
    several = known & (side.later < 0)
    later = torch.where(several, side.later, -1.0)
    begun = log_p.gather(-1, side.first.clamp(min=0)[:, None])[:, 0] + torch.log(-torch.expm1(later))
    begun = begun.masked_fill(~several, -math.inf)  # the first token, and then others than those that were written
    used = torch.cat([torch.where(active, columns, width), _or(known, side.first, width)[:, None]], -1)
    others = torch.cat([log_p, floor], -1).scatter(-1, used, -math.inf)
    others = torch.cat([others[:, :width], floor, begun[:, None]], -1)
    return torch.cat(
        [
            log_p.gather(-1, torch.where(active, columns, 0)).masked_fill(~active, _NOTHING),
            torch.where(known, side.written, _NOTHING)[:, None],
            others.logsumexp(-1, keepdim=True),
        ],
        -1,
    )


def _or(known: Tensor, first: Tensor, width: int) -> Tensor:
    return torch.where(known & (first >= 0), first, width)


def _places(ids: Int[Tensor, " pairs"], size: int) -> Int[Tensor, " size"]:
    """Of each id its place among the pairs, -1 where it has none."""
    made = torch.full((size,), -1, dtype=torch.long, device=ids.device)
    made[ids] = torch.arange(len(ids), device=ids.device)
    return made

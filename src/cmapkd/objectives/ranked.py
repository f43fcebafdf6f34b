"""Two tokenizers of one text: tokens are joined until both end at the same byte, predictions compared by rank.

Everything here is over materialised probabilities of the groups: [groups, tokens] of each model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from cmapkd.objectives.tokens import TokenDivergence

Group = tuple[slice, slice]
"""Tokens of one text that cover the same bytes: first those of one model, then those of the other."""


def byte_groups(one: Sequence[int], other: Sequence[int]) -> list[Group]:
    """The shortest runs of tokens that end at the same byte of a text.

    Args:
        one, other: bytes of each token of the same text, in order. Tokens without bytes may stand at the start (a space
            that is no part of the text) or at the end (the end of an answer), and nowhere else.
    Returns:
        In order; every token with bytes is in one group, and the tokens without bytes before them in the first one.
        Those at the end are one group more where both models have them; otherwise they are left out.
    Raises:
        ValueError: the texts have different lengths, or a token without bytes stands between others.
    """
    ends, other_ends = _covering(one), _covering(other)
    if sum(one) != sum(other):
        raise ValueError(f"one model's tokens cover {sum(one)} bytes, the other's {sum(other)}: give the same text")
    groups: list[Group] = []
    start = other_start = at = other_at = bytes_here = other_bytes = closed = 0
    while at < ends or other_at < other_ends:
        if bytes_here <= other_bytes:
            bytes_here, at = bytes_here + one[at], at + 1
        else:
            other_bytes, other_at = other_bytes + other[other_at], other_at + 1
        if bytes_here == other_bytes > closed:
            closed = bytes_here
            groups.append((slice(start, at), slice(other_start, other_at)))
            start, other_start = at, other_at
    if ends < len(one) and other_ends < len(other):
        groups.append((slice(ends, len(one)), slice(other_ends, len(other))))
    return groups


def joined(
    log_p: Float[Tensor, "rows tokens"], targets: Int[Tensor, " rows"], groups: Sequence[slice]
) -> Float[Tensor, "groups tokens"]:
    """Log-probabilities of groups by the chain rule: of the last token's distribution, after the tokens before it.

    Entry v of a group is the log-probability that the model writes the group's first tokens as they are, and v in
    place of the last one. Exponentiated, a group sums to the probability of its first tokens and not to 1.

    Args:
        targets: the tokens that stand there.
        groups: of this model, none of them empty.
    Source: the `bayesian` merge of GOLD, huggingface.co/spaces/HuggingFaceH4/on-policy-distillation.
    """
    chosen = log_p.gather(-1, targets[:, None].long())[:, 0]
    ends = torch.tensor([group.stop - 1 for group in groups], dtype=torch.long, device=log_p.device)
    starts = torch.tensor([group.start for group in groups], dtype=torch.long, device=log_p.device)
    before = torch.cat([chosen.new_zeros(1), chosen.cumsum(0)])  # of all tokens before a place
    return log_p[ends] + (before[ends] - before[starts])[:, None]


def ranked_distance(
    p: Float[Tensor, "groups tokens"], q: Float[Tensor, "groups other_tokens"], *, likeliest: int | None = None
) -> Float[Tensor, " groups"]:
    """Sum of absolute differences of probabilities of the same rank; tokens that only one model has count as 0.

    Args:
        p, q: probabilities over two vocabularies; p is the teacher's and gets no gradient.
        likeliest: only so many of each are sorted, and the others left out. None: all. Of 150,000 tokens, 256 hold
            nearly all of the probability.
    Returns:
        In [0, 2].
    Source: ULD, arXiv:2402.12030, equation 5.
    """
    k = max(p.shape[-1], q.shape[-1]) if likeliest is None else likeliest
    first, second = (F.pad(top, (0, k - top.shape[-1])) for top in (_sorted(p.detach(), k), _sorted(q, k)))
    return (first - second).abs().sum(-1)


def hybrid_distance(
    log_p: Float[Tensor, "groups tokens"],
    log_q: Float[Tensor, "groups other_tokens"],
    matched: Int[Tensor, "pairs 2"],
    *,
    divergence: TokenDivergence,
    weights: tuple[float, float] | None = None,
    likeliest: int | None = None,
) -> Float[Tensor, " groups"]:
    """Tokens that both vocabularies have are compared by a divergence, the others by rank.

    Args:
        log_p, log_q: of groups, as from `joined`; log_p is the teacher's and gets no gradient.
        matched: (teacher's id, student's id) of each token that both have, by its text.
        divergence: summed over the matched tokens, whose probabilities are not renormalised; at temperature 1. Then
            `jsd` and `tv` are >= 0, and the others may be less.
        weights: of the matched and of the other tokens. None: the share of the teacher's tokens that are matched, and
            1 less that.
        likeliest: see `ranked_distance`.
    Raises:
        ValueError: the divergence has a temperature, or reads more than the probabilities of the matched tokens.
    Source: GOLD, as `joined`.
    """
    if divergence.temperature != 1 or divergence.reads_all_tokens:
        raise ValueError(
            f"matched tokens are compared at temperature 1, and not by `taid` or `sampled_reverse`; got {divergence}. "
            "Divide the logits by the temperature before they are joined."
        )
    log_p, (of_teacher, of_student) = log_p.detach(), matched.long().unbind(-1)
    share = len(matched) / log_p.shape[-1]
    by_text, by_rank = weights or (share, 1 - share)
    values = log_q.new_zeros(len(log_q))
    if len(matched):
        values = values + by_text * divergence.measure(log_q[:, of_student], log_p[:, of_teacher]).values
    others = (_without(log_p, of_teacher).exp(), _without(log_q, of_student).exp())
    return values + by_rank * ranked_distance(*others, likeliest=likeliest)


def _covering(lengths: Sequence[int]) -> int:
    """How many tokens stand before the end of the text."""
    places = [place for place, length in enumerate(lengths) if length > 0]
    if not places:
        return 0
    if len(places) <= places[-1] - places[0]:
        raise ValueError(f"tokens without bytes must stand at the start or at the end, got lengths {list(lengths)}")
    return places[-1] + 1


def _sorted(probabilities: Tensor, k: int) -> Tensor:
    if k >= probabilities.shape[-1]:
        return probabilities.sort(-1, descending=True).values
    return probabilities.topk(k, dim=-1).values


def _without(log_p: Tensor, ids: Tensor) -> Tensor:
    kept = torch.ones(log_p.shape[-1], dtype=torch.bool, device=log_p.device)
    kept[ids] = False
    return log_p[:, kept]

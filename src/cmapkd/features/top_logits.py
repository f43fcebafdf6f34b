"""The likeliest tokens of final states, found a few rows at a time, and what they say of all the others together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cmapkd.models.token_types import TokenFeatures, TopTokens

CHUNK_LOGITS = 2**24
"""64 MiB of float32 logits at a time."""


class TopLogits(NamedTuple):
    """What determines the probabilities of each row's likeliest tokens.

    Attributes:
        ids: Int[rows k], the likeliest first.
        values: Float[rows k], their logits minus the largest one; <= 0, the first is 0.
        lse: Float[rows], log-sum-exp over all tokens of (logits minus the largest) / temperature; >= 0.
    """

    ids: Int[Tensor, "rows k"]
    values: Float[Tensor, "rows k"]
    lse: Float[Tensor, " rows"]


def top_logits(
    hidden: Float[Tensor, "rows width"], head: Callable[[Tensor], Tensor], count: int, *, temperature: float
) -> TopLogits:
    """The `count` likeliest tokens of each row, or all tokens where there are fewer; the logits of few rows exist at once.

    Args:
        head: makes logits of states (`LogitHead`).
        temperature: of `lse`; > 0.
    """
    size = max(1, head(hidden[:1]).shape[-1])
    parts = [_of_chunk(head(rows), count, temperature) for rows in hidden.split(max(1, CHUNK_LOGITS // size))]
    return TopLogits(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def top_tokens(found: TopLogits, count: int, *, temperature: float, size: int) -> TopTokens:
    """The `count` likeliest of the tokens that were found, or all of them, and all others as one.

    What is found beyond `count` is added to the rest, which is more exact than to subtract from 1.

    Args:
        temperature: that of `found.lse`.
        size: of the vocabulary. Where all tokens were found, none are left for the rest.
    """
    log_p = found.values / temperature - found.lse[:, None]
    left = torch.full_like(found.lse, -torch.inf)
    if found.ids.shape[-1] < size:
        left = (1 - log_p.double().exp().sum(-1)).clamp(min=0).log().float()
    rest = torch.cat([log_p[:, count:], left[:, None]], -1).logsumexp(-1)
    return TopTokens(found.ids[:, :count], log_p[:, :count], rest)


@torch.no_grad()
def with_top(features: TokenFeatures, count: int, *, temperature: float) -> TokenFeatures:
    """A teacher's features with its likeliest tokens, as a cache of them would give: for live teachers."""
    assert features.head is not None
    rows = features.hidden["answer"].values
    found = top_logits(rows, features.head, count, temperature=temperature)
    return replace(features, top=top_tokens(found, count, temperature=temperature, size=len(features.head.weight)))


def _of_chunk(logits: Tensor, count: int, temperature: float) -> TopLogits:
    below = logits - logits.amax(-1, keepdim=True)
    values, ids = below.topk(min(count, below.shape[-1]), dim=-1)
    return TopLogits(ids, values, (below / temperature).logsumexp(-1))

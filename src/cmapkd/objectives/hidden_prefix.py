"""Which earlier tokens of an answer are hidden from a student: those that it attends to most, under a budget."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_SMALLEST = 1e-6  # of a divergence, before its logarithm


def hidden_shares(
    divergences: Float[Tensor, " queries"],
    sample: Int[Tensor, " queries"],
    samples: int,
    *,
    least: float,
    most: float,
    scale: float,
) -> Float[Tensor, " queries"]:
    """How much of a query's attention to the answer shall be hidden: the more, the nearer it is to its teacher.

    `least + (most - least) sigmoid((u - mean u) / scale)` with u = -log divergence, and the mean over a dialogue.

    Args:
        divergences: of each query in nats, >= 0 but for rounding.
        sample: the dialogue of each query; there are `samples`.
    Returns:
        In (least, most), float32 or wider.
    Source: Masking-KD, arXiv:2605.11651, its released `_compute_tau`.
    """
    ease = -(divergences.clamp(min=0) + _SMALLEST).log()
    zeros = ease.new_zeros(samples)
    means = zeros.index_add(0, sample, ease) / zeros.index_add(0, sample, torch.ones_like(ease)).clamp(min=1)
    return least + (most - least) * ((ease - means[sample]) / scale).sigmoid()


def hidden_keys(
    attention: Float[Tensor, "queries keys"],
    eligible: Bool[Tensor, "queries keys"],
    shares: Float[Tensor, " queries"],
    *,
    budget: float,
    fallback: float,
    low: float,
) -> Bool[Tensor, "queries keys"]:
    """The fewest eligible keys of most attention that together have a share of the attention to all eligible ones.

    Args:
        attention: >= 0, what each query attends to.
        eligible: keys that may be hidden.
        shares: of each query, of its attention to eligible keys.
        budget: no more than this share of the eligible keys is hidden, rounded down.
        fallback: share of the keys that are hidden from a query that hardly attends to them, rounded down.
        low: attention to all eligible keys below which a query hardly attends to them.
    Returns:
        True where a key is hidden; one at least where the budget allows it.
    Source: Masking-KD, arXiv:2605.11651, its released `_build_mask`.
    """
    number = eligible.sum(-1)
    most = (number.float() * budget).long()
    whole = (attention * eligible).sum(-1).clamp(min=1e-8)
    falling, order = attention.masked_fill(~eligible, -1.0).sort(dim=-1, descending=True)
    places = torch.arange(attention.shape[-1], device=attention.device)
    within = places < most[:, None]
    reached = falling.masked_fill(~within, 0.0).cumsum(-1) / whole[:, None] >= shares[:, None]
    first = torch.where(reached.any(-1), reached.long().argmax(-1) + 1, most).clamp(min=1)
    fixed = (number.float() * fallback).long().clamp(min=1)
    count = torch.minimum(torch.where(whole < low, fixed, first), most)
    return torch.zeros_like(eligible).scatter(-1, order, places < count[:, None])


def as_many(
    chosen: Bool[Tensor, "queries keys"], eligible: Bool[Tensor, "queries keys"], scores: Float[Tensor, "queries keys"]
) -> Bool[Tensor, "queries keys"]:
    """As many eligible keys of each query as are chosen, those of the highest scores (>= 0)."""
    order = scores.masked_fill(~eligible, -1.0).argsort(dim=-1, descending=True)
    places = torch.arange(chosen.shape[-1], device=chosen.device)
    return torch.zeros_like(chosen).scatter(-1, order, places < chosen.sum(-1, keepdim=True))

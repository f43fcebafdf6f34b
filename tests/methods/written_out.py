"""Losses of answers' tokens as their definitions say, of logits that the library's own forward pass makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cmapkd.data.dialogues import ChatInput


def rows_of(model: Any, inputs: ChatInput, size: int | None = None) -> list[tuple[Tensor, list[int]]]:
    """Logits of the library's own forward pass that predict each answer's tokens, dialogue by dialogue, unpadded."""
    found = []
    for number in range(len(inputs)):
        alone = inputs.rows([number])
        logits = model.model(**model.arguments(alone)).logits[0, :, : size or model.vocabulary.size]
        places = alone.answer[0].nonzero().flatten()
        found.append((logits[places - 1], alone.texts.ids[0][places].tolist()))
    return found


def kl(one: Tensor, other: Tensor) -> Tensor:
    return (one * (one / other).log()).sum()


def divergence(student: Tensor, teacher: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """Of one token, written out."""
    t = settings.get("temperature", 1.0)
    q, p = (student / t).softmax(-1), (teacher / t).softmax(-1)
    k = settings.get("top_k")
    if k is not None:
        ids = p.topk(k).indices
        q, p = (torch.cat([each[ids], (each.sum() - each[ids].sum())[None]]) for each in (q, p))
    name, beta, lam = settings.get("divergence", "forward"), settings.get("beta", 0.5), settings.get("skew", 0.1)
    m = beta * p + (1 - beta) * q
    values = {
        "forward": lambda: kl(p, q),
        "reverse": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
        "skew_forward": lambda: kl(p, lam * p + (1 - lam) * q),
        "skew_reverse": lambda: kl(q, (1 - lam) * p + lam * q),
        "tv": lambda: (p - q).abs().sum() / 2,
    }
    return values[name]() * t**2


def taid(student: Tensor, teacher: Tensor, settings: Mapping[str, Any]) -> Tensor:
    t = settings.get("start", 0.4)
    target = ((1 - t) * student.detach() + t * teacher).softmax(-1)
    return -(target * student.log_softmax(-1)).sum()


def reduced(values: Sequence[Sequence[Tensor]], reduction: str) -> Tensor:
    """Of the tokens of each answer, one loss."""
    sums = torch.stack([torch.stack([*answer]).sum() for answer in values])
    lengths = torch.tensor([len(answer) for answer in values])
    if reduction == "token_mean":
        return sums.sum() / lengths.sum()
    return (sums / lengths).mean() if reduction == "sample_mean" else sums.sum() / len(values)

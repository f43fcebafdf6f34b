"""What a model thinks of given answers, token by token; logits are made of a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cmapkd.models.generative import GenerativeModel
from cmapkd.models.token_types import Rows, TokenFeatures

_BLOCK_LOGITS = 2**23  # logits held at once: 32 MB in float32


def row_blocks(num_rows: int, size: int) -> Iterator[slice]:
    """Slices of rows that together have few enough logits over a vocabulary of `size`."""
    step = max(1, _BLOCK_LOGITS // size)
    return (slice(first, min(first + step, num_rows)) for first in range(0, num_rows, step))


def answer_rows(features: TokenFeatures) -> Rows:
    return features.hidden["answer"]


def negative_log_likelihoods(model: GenerativeModel, features: TokenFeatures) -> Float[Tensor, " rows"]:
    """-log p of each token of the answers, in nats, float64."""
    rows, targets = answer_rows(features), features.targets
    parts = [
        F.cross_entropy(model.logits(rows.values[block]).float(), targets[block], reduction="none").double()
        for block in row_blocks(len(targets), model.vocabulary.size)
    ]
    return torch.cat(parts) if parts else rows.values.new_empty(0, dtype=torch.float64)


class Agreement(NamedTuple):
    """Sums over answer tokens: divergence in nats, and how many likeliest tokens are the same."""

    divergence: float = 0.0
    same: int = 0
    tokens: int = 0

    def plus(self, other: Agreement) -> Agreement:
        return Agreement(self.divergence + other.divergence, self.same + other.same, self.tokens + other.tokens)


def token_agreement(
    teacher: GenerativeModel, teacher_features: TokenFeatures, student: GenerativeModel, features: TokenFeatures
) -> Agreement:
    """KL(teacher || student) and equal likeliest tokens, over all tokens of the answers.

    Raises:
        ValueError: the two models were not given the same answers in the same tokens.
    """
    if not torch.equal(teacher_features.targets, features.targets):
        raise ValueError(
            f"{teacher.name} and {student.name} read the same answers as other tokens ({len(teacher_features.targets)} "
            f"and {len(features.targets)} of them): their probabilities cannot be compared token by token."
        )
    divergence, same = 0.0, 0
    for block in row_blocks(len(features.targets), student.vocabulary.size):
        theirs = F.log_softmax(teacher.logits(answer_rows(teacher_features).values[block]).float(), dim=-1)
        own = F.log_softmax(student.logits(answer_rows(features).values[block]).float(), dim=-1)
        divergence += float(F.kl_div(own, theirs, reduction="none", log_target=True).sum(-1).double().sum())
        same += int((theirs.argmax(-1) == own.argmax(-1)).sum())
    return Agreement(divergence, same, len(features.targets))


def first_log_odds(
    model: GenerativeModel, features: TokenFeatures, yes: Int[Tensor, " yes"], no: Int[Tensor, " no"]
) -> Float[Tensor, " batch"]:
    """log p(a token of `yes`) - log p(a token of `no`) at the first token of each answer."""
    rows = answer_rows(features)
    first = torch.ones_like(rows.sample, dtype=torch.bool)
    first[1:] = rows.sample[1:] != rows.sample[:-1]
    logits = model.logits(rows.values[first]).float()
    return logits[:, yes].logsumexp(-1) - logits[:, no].logsumexp(-1)

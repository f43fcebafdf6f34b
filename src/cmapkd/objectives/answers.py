"""Answers to questions of a picture: probabilities among alternatives, and the loss of learning them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cmapkd.objectives.common import at_least_float32


def answers_among(
    scores: Float[Tensor, "batch questions"], sizes: Sequence[int], *, hard: bool = False
) -> Float[Tensor, "batch questions"]:
    """The probability of each text among the alternatives of its group.

    Args:
        scores: of every text, already scaled; groups stand one after the other.
        sizes: how many texts each group has.
        hard: 1 for the highest score of a group and 0 for the others, in place of a softmax.
    Returns:
        Values in [0, 1] whose sum is 1 within each group; float32 or wider, without gradient.
    Raises:
        ValueError: the groups do not have as many texts as there are scores.
    """
    if scores.ndim != 2 or sum(sizes) != scores.shape[1]:
        raise ValueError(
            f"scores has shape {tuple(scores.shape)} and the groups have {list(sizes)} texts: expected "
            f"[batch, {sum(sizes)}]"
        )
    groups = at_least_float32(scores.detach()).split(list(sizes), dim=1)
    if not hard:
        return torch.cat([group.softmax(1) for group in groups], dim=1)
    return torch.cat([torch.zeros_like(group).scatter_(1, group.argmax(1, keepdim=True), 1.0) for group in groups], 1)


def answer_cross_entropy(
    logits: Float[Tensor, "batch questions"], answers: Float[Tensor, "batch questions"]
) -> Float[Tensor, ""]:
    """Binary cross-entropy of every question with the probability of a yes.

    Args:
        logits: unnormalised scores of a yes.
        answers: probabilities in [0, 1]; detached.
    Returns:
        Mean over samples and questions in nats, float32 or wider. Its least value is the entropy of the answers.
    Raises:
        ValueError: the shapes differ.
    Source: Lee et al. 2025, arXiv:2501.13341, the multi-aspect loss.
    """
    if logits.shape != answers.shape or logits.ndim != 2:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)} but answers {tuple(answers.shape)}: expected [batch, questions] "
            "of both"
        )
    wide = at_least_float32(logits)
    return F.binary_cross_entropy_with_logits(wide, answers.detach().to(wide.dtype))

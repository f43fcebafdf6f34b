"""Staying alike on reference pictures: what a student that learns something new must not forget."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from cmapkd.objectives.common import at_least_float32
from cmapkd.objectives.divergence import check_temperature, row_divergences

_LEFT_OUT = -1e9  # a logit whose probability is exactly 0 beside any other's; finite, so that it has a gradient


def reference_divergences(
    student_logits: Float[Tensor, "pictures sentences"],
    teacher_logits: Float[Tensor, "pictures sentences"],
    counts: Bool[Tensor, " pictures"],
    *,
    temperature: float = 1.0,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Forward KL of each picture over the sentences, and of each sentence over the pictures, times temperature squared.

    Args:
        student_logits, teacher_logits: of the same pictures and sentences; the teacher's are detached.
        counts: which pictures are compared. The others are neither rows of the first KL nor candidates of the second.
        temperature: divides both models' logits; > 0, no unit.
    Returns:
        The mean over the pictures that count, and the mean over all sentences; nats, >= 0, zero if no picture counts.
    Raises:
        ValueError: the shapes differ, or the temperature is not positive.
    Source: ZSCL, Zheng et al. 2023, arXiv:2303.06628: cross-entropies with soft targets, which are these KL plus the
        teacher's entropy.
    """
    if student_logits.shape != teacher_logits.shape or counts.shape != student_logits.shape[:1]:
        raise ValueError(
            f"student_logits has shape {tuple(student_logits.shape)}, teacher_logits {tuple(teacher_logits.shape)} and "
            f"counts {tuple(counts.shape)}: expected the same pictures and sentences, and one count for each picture"
        )
    check_temperature(temperature)
    student, teacher = at_least_float32(student_logits), at_least_float32(teacher_logits.detach())
    of_pictures = row_divergences(student, teacher, temperature=temperature)
    number = counts.sum().clamp_min(1)
    left_out = ~counts[:, None]
    log_q, log_p = (
        F.log_softmax((logits / temperature).masked_fill(left_out, _LEFT_OUT), dim=0) for logits in (student, teacher)
    )
    of_sentences = (log_p.exp() * (log_p - log_q)).masked_fill(left_out, 0.0).sum(0) * temperature**2
    return (of_pictures * counts).sum() / number, of_sentences.mean()

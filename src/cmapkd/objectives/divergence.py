"""Kullback-Leibler divergence between softened distributions: the loss of knowledge distillation."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cmapkd.objectives.common import at_least_float32


def kl_divergence(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Forward KL(teacher || student) at `temperature`, times temperature squared.

    Args:
        student_logits: unnormalised scores of the same candidates, in the same order, as the teacher's.
        teacher_logits: detached here, so no gradient reaches the teacher.
        temperature: divides the logits; > 0, no unit. Its reciprocal is a logit scale.
    Returns:
        Batch mean in nats, >= 0, zero when the distributions agree; float32 or wider.
    Raises:
        ValueError: the shapes differ, or the temperature is not positive.
    Source: Hinton et al. 2015, arXiv:1503.02531, section 2 (why the squared factor).
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits has shape {tuple(student_logits.shape)} but teacher_logits {tuple(teacher_logits.shape)}. "
            "KL compares them candidate by candidate: give both models the same candidates, or use a feature objective."
        )
    check_temperature(temperature)
    return row_divergences(student_logits, teacher_logits.detach(), temperature=temperature).mean()


def check_temperature(temperature: float) -> None:
    """Refuses a temperature that is not positive.

    Raises:
        ValueError: with the value.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def row_divergences(
    student_logits: Float[Tensor, "*rows classes"],
    teacher_logits: Float[Tensor, "*rows classes"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "*rows"]:
    """`kl_divergence` of each row; unchecked, and nothing is detached."""
    log_p_student = F.log_softmax(at_least_float32(student_logits) / temperature, dim=-1)
    log_p_teacher = F.log_softmax(at_least_float32(teacher_logits) / temperature, dim=-1)
    return F.kl_div(log_p_student, log_p_teacher, reduction="none", log_target=True).sum(-1) * temperature**2

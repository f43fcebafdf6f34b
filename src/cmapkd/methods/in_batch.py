"""In-batch comparisons of two models' `Features`, for the methods that share them."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from cmapkd.models import Features
from cmapkd.objectives import similarity_divergence


def embeddings_of(features: Features) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch dim"]]:
    """The embeddings of images and of texts."""
    return features.image.embedding, features.text.embedding


def similarity_loss(
    student: Features,
    teacher: Features,
    *,
    teacher_scale: Float[Tensor, ""] | float | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """`similarity_divergence` of two models, each with its own logit scale.

    Args:
        student, teacher: of the same pairs, of all processes; the widths may differ.
        teacher_scale: in place of the teacher's own logit scale.
        temperature: divides both models' logits on top of their scales.
    Returns:
        Mean of both directions in nats, >= 0.
    """
    return similarity_divergence(
        *embeddings_of(student),
        *embeddings_of(teacher),
        student_scale=student.logit_scale,
        teacher_scale=teacher.logit_scale if teacher_scale is None else teacher_scale,
        temperature=temperature,
    )

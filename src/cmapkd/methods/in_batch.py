"""In-batch comparisons of two models' `Features`, for the methods that share them."""

from __future__ import annotations

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from cmapkd.methods.card import MethodConfig
from cmapkd.models import Features
from cmapkd.objectives import feature_distance, similarity_divergence

PUBLISHED_FEATURE_WEIGHT = 2000 / 512  # 2000 × the mean over 512 channels, restated for the sum over channels

Pair = tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch dim"]]
"""Embeddings of images and of texts."""


class EmbeddingTerms(MethodConfig):
    """Weights of the terms that methods after CLIP-KD share."""

    task_weight: float = Field(1.0, ge=0, description="Weight of the student's own contrastive loss.")
    feature_weight: float = Field(
        PUBLISHED_FEATURE_WEIGHT,
        ge=0,
        description="Weight of the squared distance between unit embeddings, summed over both modalities. Published: "
        "2000 of the mean over channels, at width 512 this default.",
    )
    interactive_weight: float = Field(1.0, ge=0, description="Weight of InfoNCE against the teacher's other modality.")


def embeddings_of(features: Features) -> Pair:
    """The embeddings of images and of texts."""
    return features.image.embedding, features.text.embedding


def pair_distance(student: Pair, teacher: Pair) -> Float[Tensor, ""]:
    """`feature_distance` of images plus that of texts, in [0, 8]: the student's from the teacher's, of one width."""
    return feature_distance(student[0], teacher[0]) + feature_distance(student[1], teacher[1])


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

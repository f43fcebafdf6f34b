"""Contrast across models: the student's embeddings must find the teacher's of the other modality."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from cmapkd.objectives.common import check_pairs, check_same_width
from cmapkd.objectives.contrastive import matching_loss


def interactive_loss(
    student_image: Float[Tensor, "batch dim"],
    student_text: Float[Tensor, "batch dim"],
    teacher_image: Float[Tensor, "batch dim"],
    teacher_text: Float[Tensor, "batch dim"],
    *,
    logit_scale: Float[Tensor, ""] | float,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """InfoNCE with student anchors and teacher candidates: image to the teacher's texts, text to the teacher's images.

    Args:
        student_image, student_text: at the teacher's width; normalised here.
        teacher_image, teacher_text: normalised and detached here.
        logit_scale: multiplies the cosine similarities; > 0.
        chunk: rows at a time, see `chunk_rows`; value and gradient do not depend on it.
    Returns:
        Mean of both directions, in nats, > 0.
    Raises:
        ValueError: the shapes do not pair up, the widths differ, or the chunk is not positive.
    Source: interactive contrastive learning of CLIP-KD, Yang et al. 2024, arXiv:2307.12732.
    """
    check_pairs(
        student_image=student_image, student_text=student_text, teacher_image=teacher_image, teacher_text=teacher_text
    )
    check_same_width(student_image, teacher_text, "image embedding")
    check_same_width(student_text, teacher_image, "text embedding")
    image_to_text = matching_loss(student_image, teacher_text.detach(), logit_scale=logit_scale, chunk=chunk)
    text_to_image = matching_loss(student_text, teacher_image.detach(), logit_scale=logit_scale, chunk=chunk)
    return (image_to_text + text_to_image) / 2

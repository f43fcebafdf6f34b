"""Contrast across models: the student's embeddings must find the teacher's of the other modality."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cmapkd.objectives.common import check_pairs, check_same_width, similarities


def interactive_loss(
    student_image: Float[Tensor, "batch dim"],
    student_text: Float[Tensor, "batch dim"],
    teacher_image: Float[Tensor, "batch dim"],
    teacher_text: Float[Tensor, "batch dim"],
    *,
    logit_scale: Float[Tensor, ""] | float,
) -> Float[Tensor, ""]:
    """InfoNCE with student anchors and teacher candidates: image to the teacher's texts, text to the teacher's images.

    Args:
        student_image, student_text: at the teacher's width; normalised here.
        teacher_image, teacher_text: normalised and detached here.
        logit_scale: multiplies the cosine similarities; > 0.
    Returns:
        Mean of both directions, in nats, > 0.
    Raises:
        ValueError: the shapes do not pair up or the widths differ.
    Source: interactive contrastive learning of CLIP-KD, Yang et al. 2024, arXiv:2307.12732.
    """
    check_pairs(
        student_image=student_image, student_text=student_text, teacher_image=teacher_image, teacher_text=teacher_text
    )
    check_same_width(student_image, teacher_text, "image embedding")
    check_same_width(student_text, teacher_image, "text embedding")
    labels = torch.arange(len(student_image), device=student_image.device)
    image_to_text = similarities(student_image, teacher_text.detach(), logit_scale)
    text_to_image = similarities(student_text, teacher_image.detach(), logit_scale)
    return (F.cross_entropy(image_to_text, labels) + F.cross_entropy(text_to_image, labels)) / 2

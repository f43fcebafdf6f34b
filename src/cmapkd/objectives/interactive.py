"""Across models: the student's embeddings among the teacher's of the other modality."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from cmapkd.objectives.chunks import by_rows, chunk_rows
from cmapkd.objectives.common import check_two_models, similarities
from cmapkd.objectives.contrastive import matching_loss
from cmapkd.objectives.divergence import row_divergences


def interactive_loss(
    student_image: Float[Tensor, "batch dim"],
    student_text: Float[Tensor, "batch dim"],
    teacher_image: Float[Tensor, "batch dim"],
    teacher_text: Float[Tensor, "batch dim"],
    *,
    logit_scale: Float[Tensor, ""] | float,
    pictures: Int[Tensor, " batch"] | None = None,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """InfoNCE with student anchors and teacher candidates: image to the teacher's texts, text to the teacher's images.

    Args:
        student_image, student_text: at the teacher's width; normalised here.
        teacher_image, teacher_text: normalised and detached here.
        logit_scale: multiplies the cosine similarities; > 0.
        pictures: as of `contrastive_loss`.
        chunk: rows at a time, see `chunk_rows`; value and gradient do not depend on it.
    Returns:
        Mean of both directions, in nats, > 0.
    Raises:
        ValueError: the shapes do not pair up, the widths differ, or the chunk is not positive.
    Source: interactive contrastive learning of CLIP-KD, Yang et al. 2024, arXiv:2307.12732.
    """
    check_two_models(student_image, student_text, teacher_image, teacher_text)
    settings: dict[str, Any] = {"logit_scale": logit_scale, "pictures": pictures, "chunk": chunk}
    image_to_text = matching_loss(student_image, teacher_text.detach(), **settings)
    text_to_image = matching_loss(student_text, teacher_image.detach(), **settings)
    return (image_to_text + text_to_image) / 2


def interactive_divergence(
    student_image: Float[Tensor, "batch dim"],
    student_text: Float[Tensor, "batch dim"],
    teacher_image: Float[Tensor, "batch dim"],
    teacher_text: Float[Tensor, "batch dim"],
    *,
    student_scale: Float[Tensor, ""] | float,
    teacher_scale: Float[Tensor, ""] | float,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """KL(teacher || student) of the softmax over the teacher's embeddings of the other modality.

    The student's images among the teacher's texts should look as the teacher's images do there, and texts likewise.

    Args:
        student_image, student_text: at the teacher's width; normalised here.
        teacher_image, teacher_text: normalised and detached here.
        student_scale: multiplies the cosines of the student with the teacher; > 0.
        teacher_scale: multiplies those of the teacher with itself; > 0.
        chunk: rows at a time, see `chunk_rows`; value and gradient do not depend on it.
    Returns:
        Mean of both directions, in nats, >= 0, zero when the distributions agree.
    Raises:
        ValueError: the shapes do not pair up, the widths differ, or the chunk is not positive.
    Source: `cross_kd_loss` in the published code of CLIP-KD, Yang et al. 2024, arXiv:2307.12732.
    """
    check_two_models(student_image, student_text, teacher_image, teacher_text)
    size = chunk_rows(len(student_image), len(teacher_text), chunk)

    def among(candidates: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        def of_rows(student_rows: Tensor, teacher_rows: Tensor) -> Tensor:
            ours = similarities(student_rows, candidates, student_scale)
            return row_divergences(ours, similarities(teacher_rows, candidates, teacher_scale).detach())

        return of_rows

    teacher_image, teacher_text = teacher_image.detach(), teacher_text.detach()
    among_texts = by_rows(among(teacher_text), student_image, teacher_image, size=size)
    among_images = by_rows(among(teacher_image), student_text, teacher_text, size=size)
    return (among_texts + among_images).mean() / 2

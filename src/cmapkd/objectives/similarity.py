"""Agreement of two models about which texts of a batch belong to which images."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from cmapkd.objectives.chunks import by_rows, chunk_rows
from cmapkd.objectives.common import check_pairs, similarities
from cmapkd.objectives.divergence import check_temperature, kl_divergence, row_divergences


def similarity_divergence(
    student_image: Float[Tensor, "batch student_dim"],
    student_text: Float[Tensor, "batch student_dim"],
    teacher_image: Float[Tensor, "batch teacher_dim"],
    teacher_text: Float[Tensor, "batch teacher_dim"],
    *,
    student_scale: Float[Tensor, ""] | float,
    teacher_scale: Float[Tensor, ""] | float,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """KL(teacher || student) of the in-batch softmax over texts for each image, and over images for each text.

    Only similarities are compared, so the two models' widths may differ.

    Args:
        student_image, student_text, teacher_image, teacher_text: embeddings, row i of each from pair i; normalised
            here. The teacher's are detached.
        student_scale, teacher_scale: each model's own logit scale (already exponentiated).
        temperature: divides both models' logits on top of their scales; the result is multiplied by its square.
        chunk: rows at a time, see `chunk_rows`; value and gradient do not depend on it.
    Returns:
        Mean of both directions, in nats, >= 0, zero when the distributions agree.
    Raises:
        ValueError: the shapes do not pair up, or the temperature or the chunk is not positive.
    Source: contrastive relational distillation, CLIP-KD, Yang et al. 2024, arXiv:2307.12732; the same quantity, up to
        the teacher's entropy, is the distillation loss of open_clip.
    """
    check_pairs(
        student_image=student_image, student_text=student_text, teacher_image=teacher_image, teacher_text=teacher_text
    )
    size = chunk_rows(len(student_image), len(student_text), chunk)
    if size < len(student_image):
        check_temperature(temperature)

        def divergences(student_columns: Tensor, teacher_columns: Tensor) -> Callable[..., Tensor]:
            def of_rows(student_rows: Tensor, teacher_rows: Tensor) -> Tensor:
                ours = similarities(student_rows, student_columns, student_scale)
                theirs = similarities(teacher_rows, teacher_columns, teacher_scale).detach()
                return row_divergences(ours, theirs, temperature=temperature)

            return of_rows

        over_texts = by_rows(divergences(student_text, teacher_text), student_image, teacher_image, size=size)
        over_images = by_rows(divergences(student_image, teacher_image), student_text, teacher_text, size=size)
        return (over_texts + over_images).mean() / 2
    student_logits = similarities(student_image, student_text, student_scale)
    teacher_logits = similarities(teacher_image, teacher_text, teacher_scale).detach()
    return (
        kl_divergence(student_logits, teacher_logits, temperature=temperature)
        + kl_divergence(student_logits.T, teacher_logits.T, temperature=temperature)
    ) / 2

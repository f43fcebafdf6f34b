"""Agreement of two models about which texts of a batch belong to which images."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from cmapkd.objectives.common import check_pairs, similarities
from cmapkd.objectives.divergence import kl_divergence


def similarity_divergence(
    student_image: Float[Tensor, "batch student_dim"],
    student_text: Float[Tensor, "batch student_dim"],
    teacher_image: Float[Tensor, "batch teacher_dim"],
    teacher_text: Float[Tensor, "batch teacher_dim"],
    *,
    student_scale: Float[Tensor, ""] | float,
    teacher_scale: Float[Tensor, ""] | float,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """KL(teacher || student) of the in-batch softmax over texts for each image, and over images for each text.

    Only similarities are compared, so the two models' widths may differ.

    Args:
        student_image, student_text, teacher_image, teacher_text: embeddings, row i of each from pair i; normalised
            here. The teacher's are detached.
        student_scale, teacher_scale: each model's own logit scale (already exponentiated).
        temperature: divides both models' logits on top of their scales; the result is multiplied by its square.
    Returns:
        Mean of both directions, in nats, >= 0, zero when the distributions agree.
    Raises:
        ValueError: the shapes do not pair up, or the temperature is not positive.
    Source: contrastive relational distillation, CLIP-KD, Yang et al. 2024, arXiv:2307.12732; the same quantity, up to
        the teacher's entropy, is the distillation loss of open_clip.
    """
    check_pairs(
        student_image=student_image, student_text=student_text, teacher_image=teacher_image, teacher_text=teacher_text
    )
    student_logits = similarities(student_image, student_text, student_scale)
    teacher_logits = similarities(teacher_image, teacher_text, teacher_scale).detach()
    return (
        kl_divergence(student_logits, teacher_logits, temperature=temperature)
        + kl_divergence(student_logits.T, teacher_logits.T, temperature=temperature)
    ) / 2

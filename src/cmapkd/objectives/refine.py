"""Losses that refine a trained dual encoder: random references shared by both modalities, and hybrid soft targets."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from cmapkd.objectives.chunks import by_rows, chunk_rows
from cmapkd.objectives.common import at_least_float32, check_pairs, check_same_width, similarities
from cmapkd.objectives.divergence import row_divergences

Scale = Float[Tensor, ""] | float | None


def reference_distance(
    embeddings: Float[Tensor, "batch dim"], references: Float[Tensor, "batch dim"]
) -> Float[Tensor, ""]:
    """Mean squared distance to given vectors, over samples and channels; nothing is normalised.

    With references drawn from N(0, I) its expectation is 1 + |embedding|² / dim, batch mean: only single draws tell
    whether two modalities share a reference.

    Args:
        embeddings: as the tower gives them.
        references: of the same shape; detached here.
    Returns:
        >= 0, no unit; zero when they are equal.
    Raises:
        ValueError: the shapes differ.
    Source: random feature alignment of CLIP-Refine, Yamaguchi et al. 2025, arXiv:2504.12717.
    """
    check_same_width(embeddings, references, "embedding")
    return (at_least_float32(embeddings) - references.detach()).square().mean()


def hybrid_divergence(
    student_image: Float[Tensor, "batch student_dim"],
    student_text: Float[Tensor, "batch student_dim"],
    teacher_image: Float[Tensor, "batch teacher_dim"],
    teacher_text: Float[Tensor, "batch teacher_dim"],
    *,
    hard_share: float,
    student_scale: Scale,
    teacher_scale: Scale,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """KL(q || student) of the in-batch softmax both ways; q is a mixture of the own pair and the teacher's softmax.

    q = hard_share x one-hot + (1 - hard_share) x softmax of the teacher, for each image over texts and for each text
    over images.

    Args:
        student_image, student_text, teacher_image, teacher_text: embeddings, row i of each from pair i. The teacher's
            are detached.
        hard_share: in [0, 1).
        student_scale, teacher_scale: multiply the cosines. None: inner products of the embeddings as they are.
        chunk: rows at a time, see `chunk_rows`; value and gradient do not depend on it.
    Returns:
        Mean of both directions, in nats, >= 0, zero where the student's distributions are the mixtures.
    Raises:
        ValueError: the shapes do not pair up, or the share or the chunk is out of range.
    Source: hybrid contrastive-distillation of CLIP-Refine, Yamaguchi et al. 2025, arXiv:2504.12717.
    """
    check_pairs(
        student_image=student_image, student_text=student_text, teacher_image=teacher_image, teacher_text=teacher_text
    )
    if not 0 <= hard_share < 1:
        raise ValueError(f"hard_share is the own pair's part of the target, in [0, 1), got {hard_share}")
    size = chunk_rows(len(student_image), len(student_text), chunk)
    numbers = torch.arange(len(student_image), device=student_image.device)
    hard = math.log(hard_share) if hard_share else -math.inf

    def one_way(rows: Tensor, columns: Tensor, teacher_rows: Tensor, teacher_columns: Tensor) -> Tensor:
        def of_rows(ours: Tensor, theirs: Tensor, own: Tensor) -> Tensor:
            soft = _products(theirs, teacher_columns, teacher_scale).detach().log_softmax(-1) + math.log1p(-hard_share)
            target = torch.where(own[:, None] == numbers, torch.logaddexp(soft, soft.new_full((), hard)), soft)
            return row_divergences(_products(ours, columns, student_scale), target)

        return by_rows(of_rows, rows, teacher_rows, numbers, size=size).mean()

    of_images = one_way(student_image, student_text, teacher_image, teacher_text)
    return (of_images + one_way(student_text, student_image, teacher_text, teacher_image)) / 2


def _products(rows: Tensor, columns: Tensor, scale: Scale) -> Float[Tensor, "rows columns"]:
    """Scaled cosines, or inner products; outside autocast."""
    if scale is not None:
        return similarities(rows, columns, scale)
    with torch.autocast(rows.device.type, enabled=False):
        return at_least_float32(rows) @ at_least_float32(columns).T

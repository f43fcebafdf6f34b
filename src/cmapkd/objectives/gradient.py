"""Agreement of two models about where the contrastive loss would move each embedding."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cmapkd.objectives.chunks import by_rows, chunk_rows
from cmapkd.objectives.common import check_pairs, check_same_width, similarities, unit


def contrastive_gradients(
    anchors: Float[Tensor, "batch dim"],
    candidates: Float[Tensor, "batch dim"],
    *,
    logit_scale: Float[Tensor, ""] | float,
    chunk: int | None = None,
) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch dim"]]:
    """Gradients of the summed InfoNCE of the anchors with respect to the unit anchors and to the unit candidates.

    With P the softmax over candidates of s a cᵀ: s (P - I) c and s (P - I)ᵀ a. Written out, so that they can
    be differentiated once more at the cost of a loss.

    Args:
        anchors, candidates: embeddings of the pairs, row by row; normalised here.
        logit_scale: s, multiplies the cosine similarities; > 0.
        chunk: rows at a time, see `chunk_rows`; value and gradient do not depend on it.
    Returns:
        Both, float32 or wider; batch times those of the batch mean. Rows are no longer than 2 s for the anchors.
    Raises:
        ValueError: the chunk is not positive.
    Source: gradient distillation of CLIP-KD, Yang et al. 2024, arXiv:2307.12732.
    """
    size = chunk_rows(len(anchors), len(candidates), chunk)
    unit_anchors, unit_candidates = unit(anchors), unit(candidates)

    def of_anchors(rows: Tensor) -> Tensor:
        p = similarities(rows, candidates, logit_scale).softmax(-1)
        return _times(p, unit_candidates)

    def normalisers(rows: Tensor) -> Tensor:
        return similarities(rows, candidates, logit_scale).logsumexp(-1)

    def of_candidates(rows: Tensor) -> Tensor:
        p = (similarities(rows, anchors, logit_scale) - log_sums).exp()
        return _times(p, unit_anchors)

    log_sums = by_rows(normalisers, anchors, size=size)
    moved_anchors = by_rows(of_anchors, anchors, size=size) - unit_candidates
    moved_candidates = by_rows(of_candidates, candidates, size=size) - unit_anchors
    return logit_scale * moved_anchors, logit_scale * moved_candidates


def gradient_distance(
    student_image: Float[Tensor, "batch dim"],
    student_text: Float[Tensor, "batch dim"],
    teacher_image: Float[Tensor, "batch dim"],
    teacher_text: Float[Tensor, "batch dim"],
    *,
    student_scale: Float[Tensor, ""] | float,
    teacher_scale: Float[Tensor, ""] | float,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """Squared distance between the models' `contrastive_gradients`, of images over texts and of texts over images.

    A sum over channels of gradients of the loss summed over the batch: its size, and so the meaning of a weight on it,
    depends neither on the width nor on the batch.

    Args:
        student_image, student_text: at the teacher's width; normalised here.
        teacher_image, teacher_text: normalised and detached here.
        student_scale, teacher_scale: what multiplies each model's cosines: its logit scale.
        chunk: rows at a time, see `chunk_rows`; value and gradient do not depend on it.
    Returns:
        Sum over the four gradients of the batch mean, >= 0, zero when the models agree.
    Raises:
        ValueError: the shapes do not pair up, the widths differ, or the chunk is not positive.
    Source: gradient distillation of CLIP-KD, Yang et al. 2024, arXiv:2307.12732, which states it as a mean over
        channels of gradients of the batch mean: its weight w there is w / (batch² dim) here.
    """
    check_pairs(
        student_image=student_image, student_text=student_text, teacher_image=teacher_image, teacher_text=teacher_text
    )
    check_same_width(student_image, teacher_image, "image embedding")
    check_same_width(student_text, teacher_text, "text embedding")
    total = torch.zeros((), device=student_image.device)
    for ours, theirs in (
        ((student_image, student_text), (teacher_image, teacher_text)),
        ((student_text, student_image), (teacher_text, teacher_image)),
    ):
        with torch.no_grad():
            targets = contrastive_gradients(*theirs, logit_scale=teacher_scale, chunk=chunk)
        gradients = contrastive_gradients(*ours, logit_scale=student_scale, chunk=chunk)
        for gradient, target in zip(gradients, targets, strict=True):
            total = total + (gradient - target).square().sum(-1).mean()
    return total


def _times(p: Tensor, rows: Tensor) -> Tensor:
    """A product outside autocast, which would take it in bf16."""
    with torch.autocast(p.device.type, enabled=False):
        return p @ rows

"""Agreement of two models about which texts of a batch belong to which images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from cmapkd.objectives.chunks import by_rows, chunk_rows
from cmapkd.objectives.common import check_pairs, similarities, unit
from cmapkd.objectives.divergence import check_temperature, kl_divergence, row_divergences
from cmapkd.objectives.tiles import both_ways


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
        rows, columns = both_ways(
            student_scale / temperature * unit(student_image),
            unit(student_text),
            (teacher_scale / temperature * unit(teacher_image), unit(teacher_text)),
            size=size,
        )
        assert rows.divergences is not None
        assert columns.divergences is not None
        return (rows.divergences + columns.divergences).mean() / 2 * temperature**2
    student_logits = similarities(student_image, student_text, student_scale)
    teacher_logits = similarities(teacher_image, teacher_text, teacher_scale).detach()
    return (
        kl_divergence(student_logits, teacher_logits, temperature=temperature)
        + kl_divergence(student_logits.T, teacher_logits.T, temperature=temperature)
    ) / 2


def ensemble_divergence(
    student_image: Float[Tensor, "batch student_dim"],
    student_text: Float[Tensor, "batch student_dim"],
    teachers: Sequence[tuple[Float[Tensor, "batch _"], Float[Tensor, "batch _"]]],
    *,
    student_scale: Float[Tensor, ""] | float,
    teacher_scales: Sequence[Float[Tensor, ""] | float],
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """KL(mean of the teachers || student) of the in-batch softmax, in both directions.

    The mean is that of the teachers' probabilities, not of their logits, and each direction has its own: the transpose
    of a softmax over texts is no distribution over images.

    Args:
        student_image, student_text: embeddings, row i of each from pair i; normalised here.
        teachers: each one's image and text embeddings of the same pairs, of any width; normalised here, detached.
        student_scale: the student's logit scale (already exponentiated).
        teacher_scales: of each teacher, in the same order.
        chunk: rows at a time, see `chunk_rows`; value and gradient do not depend on it.
    Returns:
        Mean of both directions, in nats, >= 0, zero where the student's distributions are the mean ones.
    Raises:
        ValueError: the shapes do not pair up, there is not one scale for each teacher, or the chunk is not positive.
    Source: MobileCLIP, Vasu et al. 2024, arXiv:2311.17049; the published loss is the cross-entropy, larger by the
        entropy of the mean.
    """
    if not teachers or len(teachers) != len(teacher_scales):
        raise ValueError(f"{len(teachers)} teachers with {len(teacher_scales)} scales: each teacher has one scale")
    named = {f"teacher_{i}_{n}": side for i, pair in enumerate(teachers) for n, side in enumerate(pair)}
    check_pairs(student_image=student_image, student_text=student_text, **named)

    def one_way(rows: int, columns: int) -> Tensor:
        """0 stands for images, 1 for texts: the student's first, then every teacher's."""
        sides = [(student_image, student_text), *teachers]

        def of_rows(ours: Tensor, *theirs: Tensor) -> Tensor:
            logits = similarities(ours, sides[0][columns], student_scale)
            targets = [
                similarities(anchors, pair[columns], scale).detach().log_softmax(-1)
                for anchors, pair, scale in zip(theirs, teachers, teacher_scales, strict=True)
            ]
            mean = torch.stack(targets).logsumexp(0) - math.log(len(targets))
            return row_divergences(logits, mean, temperature=1.0)

        size = chunk_rows(len(student_image), len(student_text), chunk)
        return by_rows(of_rows, *(side[rows] for side in sides), size=size).mean()

    return (one_way(0, 1) + one_way(1, 0)) / 2

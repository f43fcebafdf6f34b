"""Contrast with the candidates of a momentum teacher: the pair is the hard target, the teacher's softmax a soft one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cmapkd.objectives.chunks import by_rows, chunk_rows
from cmapkd.objectives.common import EXCLUDED, check_two_models, unit
from cmapkd.objectives.divergence import row_divergences
from cmapkd.objectives.tiles import same_picture

Pair = tuple[Float[Tensor, "entries dim"], Float[Tensor, "entries dim"]]  # of images and of texts


class SoftContrast(NamedTuple):
    """Both parts of a mixed target, each the mean of both directions in nats.

    With a share `a` of the soft target, (1 - a) `hard` + a `soft` is the cross-entropy with the mixed target, up to `a`
    times the entropy of the teacher's softmax. That has no gradient.
    """

    hard: Float[Tensor, ""]
    soft: Float[Tensor, ""]


def soft_contrast(
    student_image: Float[Tensor, "batch dim"],
    student_text: Float[Tensor, "batch dim"],
    teacher_image: Float[Tensor, "batch dim"],
    teacher_text: Float[Tensor, "batch dim"],
    *,
    logit_scale: Float[Tensor, ""] | float,
    queue: Pair | None = None,
    exclude: Bool[Tensor, "batch entries"] | None = None,
    pictures: Int[Tensor, " batch"] | None = None,
    chunk: int | None = None,
) -> SoftContrast:
    """InfoNCE and KL(teacher || student) over the momentum teacher's embeddings of [the batch | a queue].

    An image of the student has the teacher's texts as candidates, a text its images. The teacher's own image among
    the same candidates, with the same scale, gives the soft target.

    Args:
        student_image, student_text: row i of each from pair i; normalised here.
        teacher_image, teacher_text: the momentum teacher's, normalised and detached here.
        logit_scale: multiplies all cosines; > 0. In the target it is detached.
        queue: images and texts of earlier pairs, further candidates of every row; normalised and detached here.
        exclude: True where an entry of the queue is no candidate of a pair: its own sample, or an empty place.
        pictures: of each pair; pairs of the batch with one number are no candidates of each other. None: all differ.
        chunk: rows at a time, see `chunk_rows`; value and gradient do not depend on it.
    Returns:
        `hard` > 0; `soft` >= 0, zero where the student's distributions are the teacher's.
    Raises:
        ValueError: the shapes do not pair up, the widths differ, or the chunk is not positive.
    Source: the ITC loss of ALBEF, Li et al. 2021, arXiv:2107.07651, equations 1 and 6.
    """
    check_two_models(student_image, student_text, teacher_image, teacher_text)
    of_batch, of_queue = (teacher_image, teacher_text), queue or (teacher_image[:0], teacher_text[:0])
    _check_queue(of_batch, of_queue, exclude)
    images, texts = (
        torch.cat([unit(each.detach()), unit(entries.detach())])
        for each, entries in zip(of_batch, of_queue, strict=True)
    )
    size = chunk_rows(len(student_image), len(images), chunk)
    labels = torch.arange(len(student_image), device=student_image.device)
    scale = torch.as_tensor(logit_scale, device=student_image.device)

    def one_way(anchors: Tensor, targets: Tensor, candidates: Tensor) -> Float[Tensor, "batch 2"]:
        def of_rows(
            student: Tensor, teacher: Tensor, own: Tensor, excluded: Tensor | None = None
        ) -> Float[Tensor, "rows 2"]:
            with torch.autocast(student.device.type, enabled=False):
                logits, target = scale * student @ candidates.T, scale.detach() * teacher @ candidates.T
            hidden = _hidden(own, excluded, pictures, len(candidates))
            if hidden is not None:
                logits, target = (each.masked_fill(hidden, EXCLUDED) for each in (logits, target))
            hard = logits.logsumexp(-1) - logits.gather(1, own[:, None])[:, 0]
            return torch.stack([hard, row_divergences(logits, target)], 1)

        rows = (unit(anchors), unit(targets.detach()), labels, *(() if exclude is None else (exclude,)))
        return by_rows(of_rows, *rows, size=size)

    both = one_way(student_image, teacher_image, texts) + one_way(student_text, teacher_text, images)
    return SoftContrast(both[:, 0].mean() / 2, both[:, 1].mean() / 2)


def _hidden(
    own: Int[Tensor, " rows"], excluded: Tensor | None, pictures: Tensor | None, num: int
) -> Bool[Tensor, "rows candidates"] | None:
    """Where a candidate of a row is none, of the batch's and then of the queue's; None where nothing is hidden."""
    if excluded is None and pictures is None:
        return None
    entries = num if excluded is None else num - excluded.shape[1]  # of the batch, or of all where none is excluded
    hidden = torch.zeros(len(own), num, dtype=torch.bool, device=own.device)
    if pictures is not None:
        hidden[:, : len(pictures)] = same_picture(pictures, own)
    if excluded is not None:
        hidden[:, entries:] = excluded
    return hidden


def _check_queue(of_batch: Pair, of_queue: Pair, exclude: Tensor | None) -> None:
    """Refuses a queue of another width than the batch, and an exclusion of another size than the queue."""
    for each, entries in zip(of_batch, of_queue, strict=True):
        if entries.ndim != 2 or entries.shape[1] != each.shape[1] or len(entries) != len(of_queue[0]):
            raise ValueError(
                f"the queue has shapes {[tuple(one.shape) for one in of_queue]} beside a batch of {tuple(each.shape)}: "
                "give as many images as texts, [entries, dim] at the batch's width"
            )
    shape = (len(of_batch[0]), len(of_queue[0]))
    if exclude is not None and (exclude.shape != shape or exclude.dtype != torch.bool):
        raise ValueError(
            f"exclude has shape {tuple(exclude.shape)} and type {exclude.dtype}: give one bool for each of {shape[0]} "
            f"pairs and {shape[1]} entries of the queue"
        )

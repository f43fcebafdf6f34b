"""Agreement with the teacher about a frozen reference set: a bank of teacher embeddings in place of the batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cmapkd.objectives.chunks import columns_at_once, map_split_rows
from cmapkd.objectives.common import EXCLUDED, check_pairs, check_same_width, unit
from cmapkd.objectives.derivatives import differentiable_once

_WIDENED = 2**19  # numbers of a bank in half precision that are widened at once


def bank_divergence(
    student: Float[Tensor, "batch dim"],
    teacher: Float[Tensor, "batch dim"],
    bank: Float[Tensor, "entries dim"],
    *,
    student_scale: Float[Tensor, ""] | float,
    teacher_scale: Float[Tensor, ""] | float,
    exclude: Bool[Tensor, "batch entries"] | None = None,
    frozen: bool = False,
    chunk: int | None = None,
) -> Float[Tensor, " batch"]:
    """KL(teacher || student) of the softmax over a bank's entries by their cosines with each sample.

    The bank is as large as one likes and never stale, so what a sample is compared with does not depend on the batch.

    Args:
        student: at the teacher's width; normalised here.
        teacher: of the same samples; normalised and detached here.
        bank: the teacher's embeddings of other samples, of either modality; normalised and detached here. In half
            precision it is widened a few entries at a time, and the result that of the widened bank.
        student_scale, teacher_scale: logit scales (already exponentiated).
        exclude: True where an entry is no reference for a sample (its own, or empty): probability zero in both models.
        frozen: the bank's rows have length one (as near as their type holds it), and nothing writes into them before
            the backward pass: then they are neither normalised nor copied.
        chunk: entries at a time. Memory then grows with batch x chunk instead of batch x entries, for the same value
            and gradient, and each chunk's logits are computed again in the backward pass; None chooses as
            `columns_at_once` does.
    Returns:
        For each sample in nats, >= 0 up to rounding; zero when the distributions agree, and for a sample with every
        entry excluded, whose gradient is zero too. float32 or wider.
    Raises:
        ValueError: the shapes do not fit each other, the bank is empty, or the chunk is not positive.
    Source: the bank alignment term of the CMAPKD design, sections 5 and 9.11.
    """
    _check(student, teacher, bank, exclude)
    size = columns_at_once(len(bank), len(student), chunk)
    anchors, targets = unit(student), unit(teacher.detach())
    entries = bank.detach()
    if not frozen:
        entries = unit(entries)  # a copy, else refilling it would change the gradient

    def of_rows(
        anchors: Float[Tensor, "rows dim"], targets: Float[Tensor, "rows dim"], *excluded: Tensor
    ) -> Float[Tensor, " rows"]:
        values: Tensor = _Divergence.apply(anchors, targets, entries, excluded[0] if excluded else None, size)
        return values

    excluded = () if exclude is None else (exclude,)
    with torch.autocast(student.device.type, enabled=False):
        return map_split_rows(of_rows, student_scale * anchors, teacher_scale * targets, *excluded)


def bank_relation_distance(
    student: Float[Tensor, "batch dim"],
    teacher: Float[Tensor, "batch dim"],
    bank: Float[Tensor, "entries dim"],
    *,
    exclude: Bool[Tensor, "batch entries"] | None = None,
) -> Float[Tensor, " batch"]:
    """Mean squared difference of a sample's cosines with a bank's entries, student against teacher.

    Args:
        student: at the teacher's width; normalised here.
        teacher: of the same samples; normalised and detached here.
        bank: the teacher's embeddings of other samples, of either modality; normalised and detached here.
        exclude: True where an entry is no reference for a sample: left out of its mean.
    Returns:
        For each sample in [0, 4], no unit; zero when the cosines agree, and with every entry excluded. float32 or
        wider.
    Raises:
        ValueError: the shapes do not fit each other, or the bank is empty.
    Source: the relation term over a bank of the CMAPKD design, section 10.
    """
    _check(student, teacher, bank, exclude)
    with torch.autocast(student.device.type, enabled=False):
        squares = ((unit(student) - unit(teacher.detach())) @ unit(bank.detach()).T).square()
    if exclude is None:
        return squares.mean(-1)
    return squares.masked_fill(exclude, 0).sum(-1) / (~exclude).sum(-1).clamp(min=1)


class _Divergence(torch.autograd.Function):
    """`bank_divergence` of scaled anchors and targets, with its gradient by the anchors written out.

    By a logit of the student's that is the difference of the two probabilities. Of one chunk this is kept, so that each
    logit is exponentiated once for each model; of several only their log-sum-exps, and the backward pass computes the
    logits of a chunk again.
    """

    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, targets: Tensor, entries: Tensor, exclude: Tensor | None, size: int
    ) -> Tensor:
        sums, difference = [], None
        for _, student_logits, teacher_logits in _logits(anchors, targets, entries, exclude, size):
            gaps = teacher_logits - student_logits
            log_z_student, log_z_teacher = _to_softmax(student_logits), _to_softmax(teacher_logits)
            sums.append((log_z_student, log_z_teacher, gaps.mul_(teacher_logits).sum(-1)))
            difference = student_logits.sub_(teacher_logits) if size >= len(entries) else None
        of_chunks, log_of_chunks, gaps_of_chunks = (torch.stack(column) for column in zip(*sums, strict=True))
        log_z_student, log_z_teacher = of_chunks.logsumexp(0), log_of_chunks.logsumexp(0)
        ctx.size = size
        kept = anchors, targets, entries, exclude, log_z_student, log_z_teacher, difference
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)
        return (log_of_chunks.softmax(0) * gaps_of_chunks).sum(0) - log_z_teacher + log_z_student

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, of_values: Tensor) -> Any:
        return _by_anchors(of_values, *ctx.saved_tensors, size=ctx.size), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, along: Tensor, *_: object) -> Tensor:
        slopes = _by_anchors(along.new_ones(len(along)), *ctx.saved_tensors, size=ctx.size)
        return (slopes * along).sum(-1)


def _by_anchors(
    of_values: Float[Tensor, " batch"],
    anchors: Float[Tensor, "batch dim"],
    targets: Float[Tensor, "batch dim"],
    entries: Float[Tensor, "entries dim"],
    exclude: Bool[Tensor, "batch entries"] | None,
    log_z_student: Float[Tensor, " batch"],
    log_z_teacher: Float[Tensor, " batch"],
    difference: Float[Tensor, "batch entries"] | None,
    *,
    size: int,
) -> Float[Tensor, "batch dim"]:
    """The gradient by the anchors, for a gradient by each divergence."""
    of_anchors = torch.zeros_like(anchors)
    if difference is not None:
        _add_product(of_anchors, of_values[:, None] * difference, entries)
        return of_anchors
    for here, student_logits, teacher_logits in _logits(anchors, targets, entries, exclude, size):
        student_logits.sub_(log_z_student[:, None]).exp_()
        teacher_logits.sub_(log_z_teacher[:, None]).exp_()
        _add_product(of_anchors, student_logits.sub_(teacher_logits).mul_(of_values[:, None]), entries[here])
    return of_anchors


def _logits(
    anchors: Float[Tensor, "batch dim"],
    targets: Float[Tensor, "batch dim"],
    entries: Float[Tensor, "entries dim"],
    exclude: Bool[Tensor, "batch entries"] | None,
    size: int,
) -> Iterator[tuple[slice, Float[Tensor, "batch chunk"], Float[Tensor, "batch chunk"]]]:
    """Places and both models' logits of `size` entries at a time, each time in the same memory, to be written into."""
    memory = anchors.new_empty(2, len(anchors) * min(size, len(entries)))
    for start in range(0, len(entries), size):
        here = slice(start, min(start + size, len(entries)))
        student_logits, teacher_logits = (
            one[: len(anchors) * (here.stop - start)].view(len(anchors), -1) for one in memory
        )
        for columns, some in _widened(entries[here], anchors.dtype):
            torch.mm(anchors, some.T, out=student_logits[:, columns])
            torch.mm(targets, some.T, out=teacher_logits[:, columns])
        if exclude is not None:
            student_logits.masked_fill_(exclude[:, here], EXCLUDED)
            teacher_logits.masked_fill_(exclude[:, here], EXCLUDED)
        yield here, student_logits, teacher_logits


def _add_product(
    total: Float[Tensor, "batch dim"], of_logits: Float[Tensor, "batch chunk"], entries: Float[Tensor, "chunk dim"]
) -> None:
    """Adds to the gradient by the anchors what comes through the logits of some entries."""
    for columns, some in _widened(entries, total.dtype):
        total.addmm_(of_logits[:, columns], some)


def _widened(entries: Float[Tensor, "chunk dim"], dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The entries in a type with their places: as they are where they have it, else some at a time, in one memory."""
    if entries.dtype == dtype:
        yield slice(len(entries)), entries
        return
    size = min(len(entries), max(1, _WIDENED // entries.shape[1]))
    memory = entries.new_empty(size, entries.shape[1], dtype=dtype)
    for start in range(0, len(entries), size):
        here = slice(start, min(start + size, len(entries)))
        yield here, memory[: here.stop - start].copy_(entries[here])


def _to_softmax(logits: Float[Tensor, "batch chunk"]) -> Float[Tensor, " batch"]:
    """Turns each row into its softmax; returns the log-sum-exps."""
    largest = logits.amax(-1, keepdim=True)
    sums = logits.sub_(largest).exp_().sum(-1, keepdim=True)
    logits.div_(sums)
    return (largest + sums.log())[:, 0]


def _check(student: Tensor, teacher: Tensor, bank: Tensor, exclude: Tensor | None) -> None:
    check_pairs(student=student, teacher=teacher)
    check_same_width(student, teacher, "embedding")
    if bank.ndim != 2 or bank.shape[1] != student.shape[1] or not len(bank):
        raise ValueError(
            f"bank has shape {tuple(bank.shape)} but the embeddings {tuple(student.shape)}: give at least one entry, "
            "as [entries, dim] at the embeddings' width"
        )
    if exclude is not None and (exclude.shape != (len(student), len(bank)) or exclude.dtype != torch.bool):
        raise ValueError(
            f"exclude has shape {tuple(exclude.shape)} and type {exclude.dtype}, but there are {len(student)} samples "
            f"and {len(bank)} entries: give one bool for each of them, shape {(len(student), len(bank))}"
        )

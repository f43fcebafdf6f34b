"""Agreement with the teacher about a frozen reference set: a bank of teacher embeddings in place of the batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from cmapkd.objectives.chunks import chunk_rows
from cmapkd.objectives.common import check_pairs, check_same_width, unit

# A logit whose probability underflows to zero beside any other, yet finite: from -inf less -inf would come NaN. In a
# row that is excluded as a whole both models have it everywhere, so they agree.
_EXCLUDED = -1e30


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
        bank: the teacher's embeddings of other samples, of either modality; normalised and detached here.
        student_scale, teacher_scale: logit scales (already exponentiated).
        exclude: True where an entry is no reference for a sample (its own, or empty): probability zero in both models.
        frozen: the bank's rows have length one, and nothing writes into them before the backward pass: then they are
            neither normalised nor copied.
        chunk: entries at a time. Memory then grows with batch x chunk instead of batch x entries, for the same value
            and gradient, and each chunk's logits are computed again in the backward pass; None chooses as
            `chunk_rows` does.
    Returns:
        For each sample in nats, >= 0 up to rounding; zero when the distributions agree, and for a sample with every
        entry excluded, whose gradient is zero too. float32 or wider.
    Raises:
        ValueError: the shapes do not fit each other, the bank is empty, or the chunk is not positive.
    Source: the bank alignment term of the CMAPKD design, sections 5 and 9.11.
    """
    _check(student, teacher, bank, exclude)
    size = chunk_rows(len(bank), len(student), chunk)
    anchors, targets = unit(student), unit(teacher.detach())
    entries = bank.detach()
    parts = (entries if frozen else unit(entries)).split(size)  # a copy, else refilling it would change the gradient
    masks = (None,) * len(parts) if exclude is None else exclude.split(size, dim=1)
    run: Callable[..., tuple[Tensor, Tensor, Tensor]] = _part
    if len(parts) > 1:
        run = partial(checkpoint, _part, use_reentrant=False, preserve_rng_state=False)
    sums = [
        run(anchors, targets, part, mask, student_scale, teacher_scale) for part, mask in zip(parts, masks, strict=True)
    ]
    log_student, log_teacher, gaps = (torch.stack(of_parts) for of_parts in zip(*sums, strict=True))
    gap = (log_teacher.softmax(0) * gaps).sum(0)
    return gap - log_teacher.logsumexp(0) + log_student.logsumexp(0)


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


def _part(
    anchors: Float[Tensor, "batch dim"],
    targets: Float[Tensor, "batch dim"],
    entries: Float[Tensor, "part dim"],
    exclude: Bool[Tensor, "batch part"] | None,
    student_scale: Tensor | float,
    teacher_scale: Tensor | float,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Student's and teacher's log-sum-exp over some entries, and the teacher's mean of how far its logits lie above."""
    with torch.autocast(anchors.device.type, enabled=False):
        scaled = student_scale * anchors
        result: tuple[Tensor, Tensor, Tensor] = _OverEntries.apply(scaled, teacher_scale * targets, entries, exclude)
    return result


class _OverEntries(torch.autograd.Function):
    """`_part` of scaled anchors and targets, with its gradient written out.

    Each logit is exponentiated once for each model and the two probabilities are what the backward pass reads: half the
    passes over [batch, entries], which is where the time goes, that autograd would need.
    """

    @staticmethod
    def forward(ctx: Any, anchors: Tensor, targets: Tensor, entries: Tensor, exclude: Tensor | None) -> Any:
        ours, theirs = anchors @ entries.T, targets @ entries.T
        if exclude is not None:
            ours.masked_fill_(exclude, _EXCLUDED)
            theirs.masked_fill_(exclude, _EXCLUDED)
        p_ours, log_ours = _softmax(ours)
        p_theirs, log_theirs = _softmax(theirs)
        gap = theirs.sub_(ours).mul_(p_theirs).sum(-1)
        ctx.save_for_backward(entries, p_ours, p_theirs, exclude)
        ctx.mark_non_differentiable(log_theirs)
        return log_ours, log_theirs, gap

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_log: Tensor, _: Tensor, of_gap: Tensor) -> Any:
        entries, p_ours, p_theirs, exclude = ctx.saved_tensors
        of_logits = torch.addcmul(of_log[:, None] * p_ours, of_gap[:, None], p_theirs, value=-1)
        if exclude is not None:
            of_logits.masked_fill_(exclude, 0)
        return of_logits @ entries, None, None, None


def _softmax(logits: Float[Tensor, "batch part"]) -> tuple[Float[Tensor, "batch part"], Float[Tensor, " batch"]]:
    """The softmax and the log-sum-exp of each row."""
    largest = logits.amax(-1, keepdim=True)
    powers = (logits - largest).exp_()
    sums = powers.sum(-1, keepdim=True)
    return powers.div_(sums), (largest + sums.log())[:, 0]


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

"""Softmaxes over all pairs some rows at a time, with their gradients written out: no logits outlive their tile.

Both directions of a loss come from the same tiles: a tile's logits are summed along its rows and along its columns. A
product is [rows, columns, dim] in each count below.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cmapkd.objectives.chunks import own_rows
from cmapkd.objectives.derivatives import differentiable_once


@dataclass(frozen=True, slots=True)
class Sums:
    """What is known of every row's softmax, or of every column's.

    Attributes:
        log_sums: log-sum-exps of the student's logits.
        divergences: KL(teacher || student) in nats; None without a teacher.
    """

    log_sums: Float[Tensor, " softmaxes"]
    divergences: Float[Tensor, " softmaxes"] | None


def both_ways(
    rows: Float[Tensor, "rows dim"],
    columns: Float[Tensor, "columns dim"],
    teacher: tuple[Float[Tensor, "rows teacher_dim"], Float[Tensor, "columns teacher_dim"]] | None = None,
    *,
    pictures: Int[Tensor, " rows"] | None = None,
    size: int,
) -> tuple[Sums, Sums]:
    """Of the softmaxes of `rows @ columns.T`: over the columns for each row, and over the rows for each column.

    One product in the forward pass, three in the backward pass; with a teacher two and four. Within `split_rows` each
    process takes tiles of its own rows only. Of the columns each then knows a part, which the others complete.

    Args:
        rows: scaled, so that products are logits.
        teacher: rows and columns whose products are the teacher's logits; detached.
        pictures: of each pair, where rows and columns are pairs; see `contrastive_loss`. Not with a teacher.
        size: rows of a tile.
    Returns:
        Of the rows and of the columns. Gradients are differentiated once only; forward-mode derivatives are had, too.
    """
    here, gather = own_rows(len(rows))
    others: list[Tensor | None] = [None, None]
    if teacher is not None:
        others = [teacher[0].detach()[here].to(rows.dtype), teacher[1].detach().to(rows.dtype)]
    with torch.autocast(rows.device.type, enabled=False):
        of_rows, of_columns = _BothWays.apply(rows[here], columns, *others, pictures, here.start, size)
    if gather is not None:
        of_rows, of_columns = gather(of_rows.T).T, _joined(gather(of_columns[None]))
    return _named(of_rows), _named(of_columns)


def row_log_sums(
    rows: Float[Tensor, "rows dim"],
    columns: Float[Tensor, "columns dim"],
    *,
    pictures: Int[Tensor, " columns"] | None = None,
    size: int,
) -> Float[Tensor, " rows"]:
    """Log-sum-exps of the logits `rows @ columns.T` over the columns, which are detached.

    Two products in the forward pass, where a softmax is at hand whole, and none in the backward pass.

    Args:
        rows: scaled, so that products are logits.
        pictures: as of `both_ways`.
        size: rows of a tile.
    """
    here, gather = own_rows(len(rows))
    with torch.autocast(rows.device.type, enabled=False):
        sums: Tensor = _RowLogSums.apply(rows[here], columns.detach(), pictures, here.start, size)
    return sums if gather is None else gather(sums)


def same_picture(pictures: Int[Tensor, " batch"], labels: Int[Tensor, " rows"]) -> Bool[Tensor, "rows batch"]:
    """Where a row and a column show the same picture without being a pair; `labels` says which pair each row is."""
    own = torch.zeros(len(labels), len(pictures), dtype=torch.bool, device=pictures.device)
    same: Tensor = (pictures[labels][:, None] == pictures[None]) & ~own.scatter(1, labels[:, None], True)
    return same


class _BothWays(torch.autograd.Function):
    """Of rows and columns, [1, rows] and [1, columns]: log-sum-exps; with a teacher [3, ...], see `_sums`."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        teacher_rows: Tensor | None,
        teacher_columns: Tensor | None,
        pictures: Tensor | None,
        first: int,
        size: int,
    ) -> tuple[Tensor, Tensor]:
        of_rows: list[Tensor] = []
        of_columns: Tensor | None = None
        given = rows, columns, teacher_rows, teacher_columns, pictures
        for _, student, teacher, _ in _tiles(*given, first=first, size=size):
            of_rows.append(_sums(student, teacher, 1))
            more = _sums(student, teacher, 0)
            of_columns = more if of_columns is None else _joined(torch.stack([of_columns, more]))
        assert of_columns is not None
        result = torch.cat(of_rows, 1), of_columns
        ctx.first, ctx.size = first, size
        ctx.save_for_backward(*given, *result)
        ctx.save_for_forward(*given, *result)
        return result

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, by_rows: Tensor, by_columns: Tensor) -> Any:
        *given, of_rows, of_columns = ctx.saved_tensors
        rows, columns = given[:2]
        of_both: list[Tensor | None] = [
            torch.zeros_like(each) if needed else None
            for each, needed in zip((rows, columns), ctx.needs_input_grad[:2], strict=True)
        ]
        with torch.autocast(rows.device.type, enabled=False):
            for here, student, teacher, hidden in _tiles(*given, first=ctx.first, size=ctx.size):
                slopes = _weighted(student, of_rows[0, here], by_rows[0, here], of_columns[0], by_columns[0])
                if teacher is not None:  # a gap falls with the student's logits, as the teacher expects them
                    of_mean = _weighted(teacher, of_rows[2, here], by_rows[1, here], of_columns[2], by_columns[1])
                    slopes.sub_(of_mean)
                if hidden is not None:
                    slopes.masked_fill_(hidden, 0.0)
                if of_both[0] is not None:
                    torch.mm(slopes, columns, out=of_both[0][here])
                if of_both[1] is not None:
                    of_both[1].addmm_(slopes.T, rows[here])
        return *of_both, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, along_rows: Tensor | None, along_columns: Tensor | None, *_: object) -> tuple[Tensor, Tensor]:
        *given, of_rows, of_columns = ctx.saved_tensors
        rows, columns = given[:2]
        moved = torch.zeros_like(of_rows), torch.zeros_like(of_columns)
        for here, student, teacher, hidden in _tiles(*given, first=ctx.first, size=ctx.size):
            along = _along(rows[here], columns, None if along_rows is None else along_rows[here], along_columns)
            if hidden is not None:
                along.masked_fill_(hidden, 0.0)
            moved[0][0, here] = _mean(student, of_rows[0, here, None], along, hidden).sum(1)
            moved[1][0] += _mean(student, of_columns[0], along, hidden).sum(0)
            if teacher is not None:
                moved[0][1, here] = -_mean(teacher, of_rows[2, here, None], along, hidden).sum(1)
                moved[1][1] -= _mean(teacher, of_columns[2], along, hidden).sum(0)
        return moved


class _RowLogSums(torch.autograd.Function):
    """Log-sum-exps [rows], whose gradient by a row is its softmax's mean of the columns: taken where it is needed."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, pictures: Tensor | None, first: int, size: int
    ) -> Float[Tensor, " rows"]:
        sums = rows.new_empty(len(rows))
        means = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        for here, logits, _, _ in _tiles(rows, columns, None, None, pictures, first=first, size=size):
            sums[here] = logits.logsumexp(1)
            if means is not None:
                torch.mm(logits.sub_(sums[here, None]).exp_(), columns, out=means[here])
        ctx.first, ctx.size = first, size
        ctx.save_for_backward(means, rows)  # the rows for `differentiable_once` alone
        ctx.save_for_forward(rows, columns, pictures, sums)
        return sums

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, by_sums: Tensor) -> Any:
        means, _ = ctx.saved_tensors
        return by_sums[:, None] * means, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, along: Tensor, *_given: object) -> Tensor:
        rows, columns, pictures, sums = ctx.saved_tensors
        moved = torch.zeros_like(sums)
        for here, logits, _, _ in _tiles(rows, columns, None, None, pictures, first=ctx.first, size=ctx.size):
            moved[here] = (logits.sub_(sums[here, None]).exp_() * (along[here] @ columns.T)).sum(1)
        return moved


def _tiles(
    rows: Tensor,
    columns: Tensor,
    teacher_rows: Tensor | None,
    teacher_columns: Tensor | None,
    pictures: Tensor | None,
    *,
    first: int,
    size: int,
) -> Iterator[tuple[slice, Tensor, Tensor | None, Tensor | None]]:
    """Places of `size` rows at a time, both models' logits in the same memory each time, and which of them are hidden.

    Args:
        first: the number of the first row among all pairs, by which `pictures` knows it.
    """
    size = min(size, len(rows))
    memory = rows.new_empty(1 if teacher_rows is None else 2, size, len(columns))
    for start in range(0, len(rows), size):
        here = slice(start, min(start + size, len(rows)))
        student = torch.mm(rows[here], columns.T, out=memory[0, : here.stop - start])
        teacher = hidden = None
        if teacher_rows is not None and teacher_columns is not None:
            teacher = torch.mm(teacher_rows[here], teacher_columns.T, out=memory[1, : here.stop - start])
        if pictures is not None:
            labels = torch.arange(first + here.start, first + here.stop, device=rows.device)
            hidden = same_picture(pictures, labels)
            student.masked_fill_(hidden, -torch.inf)
        yield here, student, teacher, hidden


def _sums(student: Tensor, teacher: Tensor | None, dim: int) -> Float[Tensor, "kinds softmaxes"]:
    """Log-sum-exps of the student, the gap that the teacher expects between both models, its own log-sum-exps."""
    log_sums = student.logsumexp(dim)
    if teacher is None:
        return log_sums[None]
    of_teacher = teacher.logsumexp(dim)
    gaps = ((teacher - of_teacher.unsqueeze(dim)).exp_().mul_(teacher - student)).sum(dim)
    return torch.stack([log_sums, gaps, of_teacher])


def _joined(parts: Float[Tensor, "parts kinds softmaxes"]) -> Float[Tensor, "kinds softmaxes"]:
    """`_sums` of whole softmaxes from those of their parts."""
    log_sums = parts[:, 0].logsumexp(0)
    if parts.shape[1] == 1:
        return log_sums[None]
    gaps = (parts[:, 2].softmax(0) * parts[:, 1]).sum(0)
    return torch.stack([log_sums, gaps, parts[:, 2].logsumexp(0)])


def _named(sums: Float[Tensor, "kinds softmaxes"]) -> Sums:
    return Sums(sums[0], sums[1] - sums[2].detach() + sums[0] if len(sums) > 1 else None)


def _weighted(logits: Tensor, of_rows: Tensor, by_rows: Tensor, of_columns: Tensor, by_columns: Tensor) -> Tensor:
    """Both softmaxes of a tile, each times its weight, added. Writes over the logits."""
    slopes = (logits - of_rows[:, None]).exp_().mul_(by_rows[:, None])
    return slopes.add_(logits.sub_(of_columns).exp_().mul_(by_columns))


def _mean(logits: Tensor, log_sums: Tensor, values: Tensor, hidden: Tensor | None) -> Tensor:
    """What is summed for the means of `values` under a tile's softmaxes."""
    p = (logits - log_sums).exp_()
    if hidden is not None:
        p.masked_fill_(hidden, 0.0)  # of a column without anything else in this part it is no number
    return p.mul_(values)


def _along(rows: Tensor, columns: Tensor, along_rows: Tensor | None, along_columns: Tensor | None) -> Tensor:
    """The derivative of a tile's logits."""
    moved = rows.new_zeros(len(rows), len(columns))
    if along_rows is not None:
        moved.addmm_(along_rows, columns.T)
    if along_columns is not None:
        moved.addmm_(rows, along_columns.T)
    return moved

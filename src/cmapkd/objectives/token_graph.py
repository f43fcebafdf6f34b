"""Agreement of two models about how the tokens of a batch's pictures relate: neighbours, positions, contexts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cmapkd.objectives.chunks import by_rows, chunk_rows
from cmapkd.objectives.common import at_least_float32, check_pairs, check_same_width, similarities


def neighbour_divergence(
    student: Float[Tensor, "nodes student_dim"],
    teacher: Float[Tensor, "nodes teacher_dim"],
    *,
    neighbours: int,
    bandwidth: float,
    temperature: float,
    chunk: int | None = None,
) -> Float[Tensor, " nodes"]:
    """KL(σ(A_S / temperature) ‖ σ(A_T / temperature)) of each node, over all nodes.

    A_ij = exp(-|x_i - x_j|² / (2 bandwidth)) where j is among the nearest of i, and 0 elsewhere and for j = i. Each
    model has its own neighbours. The x are tokens of mean 0 over channels and length 1, so that |x_i - x_j|² is in
    [0, 4] whatever the width.

    Args:
        student, teacher: tokens of many pictures, row i of both from one place. The teacher's are detached. The widths
            may differ.
        neighbours: >= 1; all others where there are fewer.
        bandwidth: > 0, in squared distances.
        temperature: > 0. A lies in [0, 1]: at 1 the softmax is nearly flat, and few neighbours have hardly any weight.
        chunk: rows at a time, see `chunk_rows`; value and gradient do not depend on it.
    Returns:
        For each node in nats, >= 0, zero where the rows agree. Which nodes are neighbours has no gradient.
    Raises:
        ValueError: the rows do not pair up, or a number is out of its range.
    Source: Zhang et al. 2023, arXiv:2306.12442 (its local preserving loss, of a third party's notes).
    """
    check_pairs(student=student, teacher=teacher)
    if neighbours < 1 or bandwidth <= 0 or temperature <= 0:
        raise ValueError(
            f"neighbours must be at least 1, bandwidth and temperature positive; got {neighbours}, {bandwidth:g} and "
            f"{temperature:g}"
        )
    student, teacher = centred(student), centred(teacher.detach())
    numbers = torch.arange(len(student), device=student.device)
    near = min(neighbours, max(1, len(student) - 1))

    def log_p(rows: Tensor, columns: Tensor, own: Int[Tensor, " rows"]) -> Float[Tensor, "rows nodes"]:
        cosines = similarities(rows, columns, 1.0)
        itself = own[:, None] == numbers
        nearest = cosines.detach().masked_fill(itself, -torch.inf).topk(near, dim=1).indices
        linked = torch.zeros_like(itself).scatter_(1, nearest, True) & ~itself
        affinity = ((cosines - 1) / bandwidth).exp().masked_fill(~linked, 0.0)
        return F.log_softmax(affinity / temperature, dim=1)

    def divergence(ours: Tensor, theirs: Tensor, own: Tensor) -> Float[Tensor, " rows"]:
        of_student, of_teacher = log_p(ours, student, own), log_p(theirs, teacher, own)
        return (of_student.exp() * (of_student - of_teacher)).sum(1)

    size = chunk_rows(len(student), len(student), chunk)
    return by_rows(divergence, student, teacher, numbers, size=size)


def token_contrast(
    student: Float[Tensor, "nodes dim"],
    teacher: Float[Tensor, "nodes dim"],
    *,
    temperature: float,
    chunk: int | None = None,
) -> Float[Tensor, " nodes"]:
    """InfoNCE of each student token: the teacher's token of the same place against those of all other places.

    Args:
        student: already at the teacher's width; normalised here.
        teacher: row i of the same place; normalised and detached here.
        temperature: divides the cosines, > 0.
        chunk: rows at a time, see `chunk_rows`; value and gradient do not depend on it.
    Returns:
        For each node in nats, >= 0; log(nodes) where all of the teacher's tokens are alike.
    Raises:
        ValueError: the shapes differ, or the temperature is not positive.
    Source: Zhang et al. 2023, arXiv:2306.12442 (its global relationship loss, of a third party's notes).
    """
    check_same_width(student, teacher, "tokens")
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, got {temperature:g}")
    teacher = teacher.detach()

    def losses(rows: Tensor, own: Tensor) -> Float[Tensor, " rows"]:
        return F.cross_entropy(similarities(rows, teacher, 1 / temperature), own, reduction="none")

    numbers = torch.arange(len(student), device=student.device)
    return by_rows(losses, student, numbers, size=chunk_rows(len(student), len(student), chunk))


def context_distance(
    student: Float[Tensor, "batch tokens student_dim"],
    teacher: Float[Tensor, "batch tokens teacher_dim"],
    *,
    temperature: float,
) -> Float[Tensor, " batch"]:
    """Squared distance of the softmaxes over a picture's own tokens, mean over its tokens.

    Row i of a model is σ_j(cos(x_i, x_j) / temperature), with the x of mean 0 over channels.

    Args:
        student, teacher: tokens at the same places. The teacher's are detached. The widths may differ.
        temperature: > 0. The published form is 1 / sqrt(width), for standardised tokens.
    Returns:
        For each picture in [0, 2], no unit; zero where the rows agree.
    Raises:
        ValueError: pictures or places do not pair up, or the temperature is not positive.
    Source: Zhang et al. 2023, arXiv:2306.12442 (its contextual loss, of a third party's notes, as a mean over all
        pairs of tokens: this is that mean times the number of tokens).
    """
    if student.ndim != 3 or student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"student has shape {tuple(student.shape)} but teacher {tuple(teacher.shape)}: give both as "
            "[batch, tokens, dim] at the same places (the widths may differ)"
        )
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, got {temperature:g}")
    of_student, of_teacher = (_contexts(tokens, temperature) for tokens in (student, teacher.detach()))
    return (of_student - of_teacher).square().sum(-1).mean(-1)


def centred(tokens: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
    """Tokens less their mean over channels, float32 or wider: their cosines are correlations over channels."""
    wide = at_least_float32(tokens)
    return wide - wide.mean(-1, keepdim=True)


def _contexts(tokens: Tensor, temperature: float) -> Float[Tensor, "batch tokens tokens"]:
    directions = F.normalize(centred(tokens), dim=-1)
    with torch.autocast(tokens.device.type, enabled=False):
        return (directions @ directions.mT / temperature).softmax(-1)

"""Differences between the largest logits of a token: their order and their gaps, not their level (BiLD, DBiLD)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from cmapkd.objectives.common import at_least_float32
from cmapkd.objectives.divergence import check_temperature

Leader = Literal["teacher", "student"]
PairDivergence = Literal["forward", "reverse"]


def knees(falling: Float[Tensor, "rows candidates"]) -> Int[Tensor, " rows"]:
    """How many of each row's logits stand up to its knee, where the curve is furthest below its chord; at least 2.

    Both axes are scaled to [0, 1]. A row whose logits are all equal has its knee at once.

    Args:
        falling: the largest logits of each row, largest first; 2 or more.
    Source: Kneedle, Satopaa et al. 2011, for a falling convex curve.
    """
    number = falling.shape[-1]
    height = falling - falling[:, -1:]
    scaled = height / height[:, :1].clamp(min=torch.finfo(falling.dtype).tiny)
    chord = torch.linspace(1, 0, number, dtype=falling.dtype, device=falling.device)
    return (chord - scaled).argmax(-1).add(1).clamp(min=2)


def logit_differences(
    student_logits: Float[Tensor, "rows tokens"],
    teacher_logits: Float[Tensor, "rows tokens"],
    *,
    leader: Leader,
    top_k: int | None = None,
    candidates: int = 64,
    temperature: float = 3.0,
    divergence: PairDivergence = "reverse",
) -> Float[Tensor, " rows"]:
    """The divergence of two softmaxes over the differences of each pair of the leader's largest logits.

    With the leader's k largest logits in falling order, each model has d_ij = (z_i - z_j) / temperature for i < j. The
    softmax is over all k (k - 1) / 2 pairs. `forward` is KL(teacher || student), as in BiLD; `reverse` the other, as in
    DBiLD. There is no squared temperature.

    Args:
        student_logits, teacher_logits: over the same tokens; no gradient reaches the teacher, and none the choice of k.
        leader: whose largest logits are compared.
        top_k: k of every row; None: at the knee of each row's `candidates` largest logits.
        candidates: at most all tokens; read where `top_k` is None.
    Returns:
        In nats, >= 0, zero where all differences agree, and unchanged by a constant added to a row; float32 or wider.
    Raises:
        ValueError: the shapes differ, or fewer than two logits are compared.
    Source: BiLD, Li et al. 2024, arXiv:2406.13555; DBiLD, Sun et al. 2026, arXiv:2604.14629.
    """
    if student_logits.shape != teacher_logits.shape or student_logits.ndim != 2:
        raise ValueError(
            f"student_logits has shape {tuple(student_logits.shape)} and teacher_logits "
            f"{tuple(teacher_logits.shape)}: give [rows, tokens] over one vocabulary"
        )
    check_temperature(temperature)
    if leader not in get_args(Leader) or divergence not in get_args(PairDivergence):
        raise ValueError(f"leader is {leader!r} and divergence {divergence!r}: see the description of both")
    number = min(candidates if top_k is None else top_k, student_logits.shape[1])
    if number < 2:
        raise ValueError(f"{number} logits are compared: differences need two or more")
    student, teacher = at_least_float32(student_logits), at_least_float32(teacher_logits.detach())
    falling, ids = (teacher if leader == "teacher" else student).detach().topk(number, dim=-1)
    first, second = torch.triu_indices(number, number, offset=1, device=ids.device)
    log_q, log_p = (each.gather(-1, ids) for each in (student, teacher))
    log_q, log_p = ((each[:, first] - each[:, second]) / temperature for each in (log_q, log_p))
    left_out = None if top_k is not None else second >= knees(falling)[:, None]
    if left_out is not None:
        log_q, log_p = (each.masked_fill(left_out, -torch.inf) for each in (log_q, log_p))
    log_q, log_p = F.log_softmax(log_q, -1), F.log_softmax(log_p, -1)
    gaps = log_p - log_q if divergence == "forward" else log_q - log_p
    if left_out is not None:
        gaps = gaps.masked_fill(left_out, 0)  # of -inf from -inf, which is not a number
    return ((log_p if divergence == "forward" else log_q).exp() * gaps).sum(-1)

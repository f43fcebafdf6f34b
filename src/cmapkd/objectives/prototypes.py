"""Tokens compared by how they divide among prototypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from cmapkd.objectives.common import at_least_float32
from cmapkd.objectives.divergence import check_temperature


def prototype_divergence(
    student: Float[Tensor, "batch cells dim"],
    teacher: Float[Tensor, "batch cells dim"],
    prototypes: Float[Tensor, "prototypes dim"],
    *,
    student_temperature: float,
    teacher_temperature: float,
    counted: Bool[Tensor, "batch cells"] | None = None,
) -> Float[Tensor, " batch"]:
    """KL(teacher || student) of each cell's softmax over its cosines with the prototypes; the mean over the cells.

    Args:
        student, teacher: tokens at the same places, at the teacher's width; normalised here. The teacher's are
            detached.
        prototypes: unit vectors.
        student_temperature, teacher_temperature: divide the cosines; > 0.
        counted: cells that count, at least one of each picture; None: all.
    Returns:
        In nats, >= 0. With two temperatures it is not zero where student and teacher agree.
    Raises:
        ValueError: the shapes differ, or a temperature is not positive.
    """
    if student.shape != teacher.shape or student.shape[-1:] != prototypes.shape[-1:]:
        raise ValueError(
            f"student has shape {tuple(student.shape)}, teacher {tuple(teacher.shape)} and prototypes "
            f"{tuple(prototypes.shape)}: tokens are compared place by place, at the prototypes' width"
        )
    check_temperature(student_temperature)
    check_temperature(teacher_temperature)
    with torch.autocast(student.device.type, enabled=False):  # which would round the cosines before they are divided
        log_p, log_q = (
            F.log_softmax(F.normalize(at_least_float32(tokens), dim=-1) @ prototypes.T / temperature, dim=-1)
            for tokens, temperature in ((teacher.detach(), teacher_temperature), (student, student_temperature))
        )
    cells = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return cells.mean(1) if counted is None else (cells * counted).sum(1) / counted.sum(1)

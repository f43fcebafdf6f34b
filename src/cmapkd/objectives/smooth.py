"""Distance of raw features that grows only linearly where they are far apart."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cmapkd.objectives.common import at_least_float32, check_same_width


def smooth_distance(
    student: Float[Tensor, "batch dim"], teacher: Float[Tensor, "batch dim"], *, beta: float = 1.0
) -> Float[Tensor, ""]:
    """Smooth L1: d² / (2 beta) where a channel is nearer than beta, |d| - beta/2 elsewhere.

    Args:
        student, teacher: features as the towers give them, of one width, not normalised; the teacher's are detached.
        beta: > 0, in the features' own unit.
    Returns:
        Mean over the batch and the channels, >= 0, zero at agreement; float32 or wider.
    Raises:
        ValueError: the shapes differ, or beta is not positive.
    Source: Girshick 2015, arXiv:1504.08083, equation 3 (beta = 1).
    """
    check_same_width(student, teacher, "feature")
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    return F.smooth_l1_loss(at_least_float32(student), at_least_float32(teacher.detach()), beta=beta)

"""How far what a layer makes of given states is from what another layer made of them; padding counts for nothing."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cmapkd.objectives.common import at_least_float32


def squared_errors(
    student: Float[Tensor, "batch length width"],
    teacher: Float[Tensor, "batch length width"],
    real: Bool[Tensor, "batch length"],
) -> Float[Tensor, " batch"]:
    """Sums of squared differences over the tokens of each dialogue, and over the width.

    Args:
        teacher: detached here, so no gradient reaches it.
        real: which tokens are no padding.
    Returns:
        Of each dialogue, >= 0; float32 or wider. Divided by tokens times width it is the mean squared error.
    Raises:
        ValueError: the shapes differ.
    Source: mean squared errors of layers in mmMamba (arXiv:2502.13145) and InfiniteVL (hustvl/InfiniteVL).
    """
    return _differences(student, teacher, real).square().sum((1, 2))


def error_norms(
    student: Float[Tensor, "batch length width"],
    teacher: Float[Tensor, "batch length width"],
    real: Bool[Tensor, "batch length"],
) -> Float[Tensor, " batch"]:
    """Lengths of the differences as one vector for each dialogue: roots of `squared_errors`, with gradient 0 at 0.

    Source: MaTVLM (arXiv:2503.13440), whose code takes the norm of a whole tensor, of one dialogue on each device.
    """
    lengths: Tensor = torch.linalg.vector_norm(_differences(student, teacher, real), dim=(1, 2))
    return lengths


def _differences(student: Tensor, teacher: Tensor, real: Tensor) -> Tensor:
    if student.shape != teacher.shape or real.shape != student.shape[:2]:
        raise ValueError(
            f"states have shapes {tuple(student.shape)} and {tuple(teacher.shape)}, and real {tuple(real.shape)}: give "
            "[batch, length, width] twice and [batch, length]"
        )
    return (at_least_float32(student) - at_least_float32(teacher.detach())) * real[..., None]

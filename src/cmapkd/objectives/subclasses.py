"""Agreement about parts of classes: which part of a class a sample belongs to, for every class that it may be of."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cmapkd.objectives.common import at_least_float32
from cmapkd.objectives.divergence import check_temperature, row_divergences


def subclass_divergence(
    student_parts: Float[Tensor, "batch classes parts"],
    teacher_parts: Float[Tensor, "batch classes parts"],
    teacher_classes: Float[Tensor, "batch classes"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """What parts add to KL(teacher || student) over all classes: by the chain rule, Σ_c p(c) KL(q_c || q'_c).

    The divergence over classes and this one sum to the divergence over classes times parts.

    Args:
        student_parts, teacher_parts: scores of the parts of each class; a softmax within the class is taken here.
        teacher_classes: unnormalised scores of the classes. Both of the teacher's are detached.
        temperature: divides the scores of the classes alone; the result is multiplied by its square.
    Returns:
        Batch mean in nats, >= 0, zero when the parts agree; float32 or wider.
    Raises:
        ValueError: the shapes do not fit, or the temperature is not positive.
    Source: the product of class and sub-class probability, Loo et al. 2024, arXiv:2409.20449, as reviews describe it.
    """
    if student_parts.shape != teacher_parts.shape or teacher_parts.shape[:2] != teacher_classes.shape:
        raise ValueError(
            f"student_parts has shape {tuple(student_parts.shape)}, teacher_parts {tuple(teacher_parts.shape)} and "
            f"teacher_classes {tuple(teacher_classes.shape)}: expected [batch, classes, parts] twice, and "
            "[batch, classes]"
        )
    check_temperature(temperature)
    p_class = F.softmax(at_least_float32(teacher_classes.detach()) / temperature, dim=-1)
    of_classes = row_divergences(student_parts, teacher_parts.detach())
    return (p_class * of_classes).sum(-1).mean() * temperature**2

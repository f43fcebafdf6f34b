"""What texts attend to in pictures: attention maps of two models, and visual tokens that a teacher looks at."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cmapkd.objectives.common import at_least_float32, check_same_width


def attention_error(
    student: Float[Tensor, "heads queries keys"],
    teacher: Float[Tensor, "teacher_heads queries keys"],
    weight: Float[Tensor, "heads teacher_heads"],
    bias: Float[Tensor, " heads"],
) -> Float[Tensor, ""]:
    """Squared differences between a student's attention maps and mixtures of its teacher's.

    Args:
        student, teacher: of the same queries and keys, in [0, 1]. The teacher's are detached.
        weight, bias: how much of each of the teacher's maps a student's head shall have.
    Returns:
        The sum over heads, queries and keys, >= 0, no unit; float32 or wider.
    Raises:
        ValueError: queries or keys differ in number.
    Source: Align-KD, arXiv:2412.01282.
    """
    if student.shape[1:] != teacher.shape[1:]:
        raise ValueError(
            f"the student's attention has shape {tuple(student.shape)} but the teacher's {tuple(teacher.shape)}: both "
            "must have the same queries and keys, so give both models one chat template"
        )
    wide = at_least_float32(teacher.detach())
    with torch.autocast(student.device.type, enabled=False):
        aim = torch.einsum("st,tqk->sqk", weight.to(wide.dtype), wide) + bias.to(wide.dtype)[:, None, None]
    return (at_least_float32(student) - aim).square().sum()


def focused_distance(
    student: Float[Tensor, "tokens width"],
    teacher: Float[Tensor, "tokens width"],
    attention: Float[Tensor, " tokens"],
    *,
    focus: int,
) -> Float[Tensor, ""]:
    """Mean squared distance of a picture's visual tokens, and once more of those that most attention goes to.

    Args:
        teacher: mapped to the student's width; a gradient reaches the map.
        attention: what each token gets of the teacher's attention, >= 0. Of equal ones the first count.
        focus: how many tokens count twice; where a picture has fewer, all do. 0: none.
    Returns:
        Mean over all tokens and channels plus that over the chosen ones, >= 0, no unit; float32 or wider.
    Raises:
        ValueError: the shapes differ.
    Source: Align-KD, arXiv:2412.01282.
    """
    check_same_width(student, teacher, "visual tokens")
    errors = (at_least_float32(student) - at_least_float32(teacher)).square().mean(-1)
    if not focus:
        return errors.mean()
    chosen = attention.detach().sort(descending=True, stable=True).indices[:focus]
    return errors.mean() + errors[chosen].mean()

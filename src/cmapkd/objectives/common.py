"""What every objective does to its inputs: widen, normalise, check."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

EXCLUDED = -1e30
"""A logit whose probability underflows to zero beside any other, yet finite: from -inf less -inf would come NaN.

In a row that is excluded as a whole both models have it everywhere, so they agree.
"""


def at_least_float32(x: Tensor) -> Tensor:
    """bf16 and fp16 to float32; float32 and float64 unchanged. Losses in half precision lose what they measure."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def unit(embeddings: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
    """Rows scaled to length one, float32 or wider."""
    return F.normalize(at_least_float32(embeddings), dim=-1)


def similarities(
    rows: Float[Tensor, "batch dim"], columns: Float[Tensor, "columns dim"], logit_scale: Float[Tensor, ""] | float
) -> Float[Tensor, "batch columns"]:
    """Cosines of every row with every column, times `logit_scale`; float32 or wider.

    Outside autocast, which would take the product in bf16: at a logit scale of 100 that is off by whole nats.
    """
    with torch.autocast(rows.device.type, enabled=False):
        return logit_scale * unit(rows) @ unit(columns).T


def check_pairs(**embeddings: Tensor) -> None:
    """Refuses tensors that are not [batch, dim] with one common batch.

    Raises:
        ValueError: names each tensor with its shape.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in embeddings.items()}
    if any(len(shape) != 2 for shape in shapes.values()) or len({shape[0] for shape in shapes.values()}) != 1:
        raise ValueError(
            f"expected [batch, dim] tensors with one row for each pair, got {shapes}: row i of every tensor must "
            "belong to pair i"
        )


def check_same_width(student: Tensor, teacher: Tensor, what: str) -> None:
    """Refuses embeddings of different width.

    Raises:
        ValueError: with both widths and what to do.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student {what} has shape {tuple(student.shape)} but the teacher's is {tuple(teacher.shape)}: they are "
            "compared element by element, so project the student to the teacher's width first"
        )


def check_two_models(
    student_image: Float[Tensor, "batch dim"],
    student_text: Float[Tensor, "batch dim"],
    teacher_image: Float[Tensor, "batch dim"],
    teacher_text: Float[Tensor, "batch dim"],
) -> None:
    """Refuses embeddings of two models that do not pair up, or are not of one width.

    Raises:
        ValueError: numbers of rows or widths differ; says which.
    """
    check_pairs(
        student_image=student_image, student_text=student_text, teacher_image=teacher_image, teacher_text=teacher_text
    )
    check_same_width(student_image, teacher_image, "image embedding")
    check_same_width(student_text, teacher_text, "text embedding")

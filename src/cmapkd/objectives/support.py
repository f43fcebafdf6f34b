"""Pictures scored by how near they are to labelled pictures of each class."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cmapkd.objectives.common import EXCLUDED, at_least_float32, unit


def support_scores(
    images: Float[Tensor, "batch dim"],
    support: Float[Tensor, "classes shots dim"],
    counted: Bool[Tensor, "batch classes shots"],
    logit_scale: Float[Tensor, ""] | float,
) -> Float[Tensor, "batch classes"]:
    """`logit_scale` times the product of a unit image with the mean of a class's unit pictures, which is not unit.

    Args:
        images, support: embeddings, normalised here.
        counted: which pictures of a class count for which image. A class without any has a score so low that
            no image can be of it, and finite: a sample without a label has a loss that is counted with zero.
    Returns:
        In [-logit_scale, logit_scale], or `EXCLUDED`; float32 or wider.
    Raises:
        ValueError: the shapes do not fit.
    """
    if counted.shape != (len(images), *support.shape[:2]) or images.shape[-1:] != support.shape[-1:]:
        raise ValueError(
            f"images has shape {tuple(images.shape)}, support {tuple(support.shape)} and counted "
            f"{tuple(counted.shape)}: expected [batch, dim], [classes, shots, dim] and [batch, classes, shots]"
        )
    with torch.autocast(images.device.type, enabled=False):  # as in `similarities`
        own, theirs = (unit(at_least_float32(each)) for each in (images, support))
        cosines = torch.einsum("bd,ckd->bck", own, theirs)
    number = counted.sum(-1)
    means = torch.where(counted, cosines, 0.0).sum(-1) / number.clamp_min(1)
    return torch.where(number > 0, logit_scale * means, EXCLUDED)

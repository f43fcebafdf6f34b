"""Banks of prompts: which prompts agree with the others on pictures, and the class vectors of those."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from cmapkd.objectives.common import at_least_float32, similarities


def prompt_scores(
    images: Float[Tensor, "batch dim"],
    bank: Float[Tensor, "classes prompts dim"],
    mask: Bool[Tensor, "classes prompts"],
) -> Float[Tensor, " prompts"]:
    """The mean over the pictures of the cosine with the nearest class, for each prompt alone.

    Args:
        images: embeddings, normalised here.
        bank: unit vectors of every class's prompts. mask: which of them are there; a class without a prompt takes no
            part in its score.
    Returns:
        In [-1, 1], without gradient.
    Raises:
        ValueError: the shapes do not fit.
    """
    if images.ndim != 2 or bank.ndim != 3 or images.shape[1] != bank.shape[2] or bank.shape[:2] != mask.shape:
        raise ValueError(
            f"images has shape {tuple(images.shape)}, bank {tuple(bank.shape)} and mask {tuple(mask.shape)}: expected "
            "[batch, dim], [classes, prompts, dim] and [classes, prompts]"
        )
    with torch.no_grad():
        columns = zip(bank.unbind(1), mask.unbind(1), strict=True)  # one at a time: [batch classes] in memory
        cosines = ((similarities(images, one, 1.0), there) for one, there in columns)
        return torch.stack([cosine.masked_fill(~there, -torch.inf).amax(1).mean() for cosine, there in cosines])


def kept_prompts(scores: Float[Tensor, " prompts"], threshold: float) -> Bool[Tensor, " prompts"]:
    """The prompts whose score is at most `threshold` standard deviations from the mean of all scores.

    The deviation has the divisor n - 1. Where it is 0, and of a single prompt, every prompt is kept. Otherwise the
    nearest one always is.

    Args:
        threshold: > 0, no unit.
    Source: Koleilat et al. 2025, BiomedCoOp, arXiv:2411.15232. The published code first subtracts the median and
        divides by the median absolute deviation. Both cancel in the standardisation, and the second may be 0.
    """
    if not threshold > 0:
        raise ValueError(f"the threshold is {threshold}: give a number above 0, in standard deviations")
    if len(scores) < 2:
        return torch.ones_like(scores, dtype=torch.bool)
    wide = at_least_float32(scores)
    distance = (wide - wide.mean()).abs()
    distance = distance / wide.std().clamp_min(torch.finfo(wide.dtype).tiny)
    return distance <= distance.amin().clamp_min(threshold)


def kept_class_vectors(
    bank: Float[Tensor, "classes prompts dim"],
    mask: Bool[Tensor, "classes prompts"],
    kept: Bool[Tensor, " prompts"],
) -> Float[Tensor, "classes dim"]:
    """The mean of each class's kept prompts, normalised; of a class that has none of them, of all its prompts."""
    chosen = mask & kept
    chosen = torch.where(chosen.any(1, keepdim=True), chosen, mask)
    return F.normalize((bank * chosen[..., None]).sum(1), dim=-1)

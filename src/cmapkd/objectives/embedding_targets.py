"""Predicted embeddings against those of an expert: their distance, and which of a batch each one is nearest to."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cmapkd.objectives.common import at_least_float32, check_pairs, similarities


def embedding_distance(
    predicted: Float[Tensor, "batch tokens width"], target: Float[Tensor, "batch tokens width"]
) -> Float[Tensor, " batch"]:
    """Smooth L1 (Huber at 1) of every number, its mean over tokens and channels.

    Args:
        target: detached here.
    Returns:
        For each sample, >= 0, in units of the target below a distance of 1; float32 or wider.
    Raises:
        ValueError: the shapes differ.
    Source: OLA-VLM, Jain et al. 2024, arXiv:2412.09585.
    """
    check_pairs(predicted=predicted.flatten(1), target=target.flatten(1))
    own, theirs = at_least_float32(predicted), at_least_float32(target.detach())
    return F.smooth_l1_loss(own, theirs.to(own.dtype), reduction="none").flatten(1).mean(-1)


def embedding_contrast(
    predicted: Float[Tensor, "batch tokens width"],
    target: Float[Tensor, "batch tokens width"],
    *,
    logit_scale: Float[Tensor, ""] | float,
) -> Float[Tensor, " batch"]:
    """InfoNCE from predictions to targets: each must be nearest to the target of its own sample.

    All tokens of a sample are one vector, which is normalised here.

    Args:
        target: detached here; those of other samples are the negatives.
        logit_scale: multiplies the cosines; > 0.
    Returns:
        For each sample in nats, > 0; log(batch) of predictions that say nothing.
    Raises:
        ValueError: the shapes differ.
    Source: OLA-VLM, Jain et al. 2024, arXiv:2412.09585.
    """
    own, theirs = at_least_float32(predicted).flatten(1), at_least_float32(target.detach()).flatten(1)
    check_pairs(predicted=own, target=theirs)
    logits = similarities(own, theirs.to(own.dtype), logit_scale)
    return logits.logsumexp(-1) - logits.diagonal()

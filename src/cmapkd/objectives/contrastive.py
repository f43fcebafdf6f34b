"""The losses that dual encoders are trained with: symmetric softmax (CLIP) and pairwise sigmoid (SigLIP)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cmapkd.objectives.common import check_pairs, similarities


def contrastive_loss(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch dim"],
    *,
    logit_scale: Float[Tensor, ""] | float,
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE: each image must find its text in the batch, and each text its image.

    Args:
        image, text: embeddings of the pairs, row by row; normalised here.
        logit_scale: multiplies the cosine similarities; > 0.
    Returns:
        Mean of both directions, in nats, > 0; log(batch) for uninformative embeddings.
    Raises:
        ValueError: the shapes do not pair up.
    Source: CLIP, Radford et al. 2021, arXiv:2103.00020, figure 3.
    """
    check_pairs(image=image, text=text)
    logits = similarities(image, text, logit_scale)
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def sigmoid_loss(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch dim"],
    *,
    logit_scale: Float[Tensor, ""] | float,
    logit_bias: Float[Tensor, ""] | float,
) -> Float[Tensor, ""]:
    """Every image-text combination as a yes/no question.

    Args:
        image, text: embeddings of the pairs, row by row; normalised here.
        logit_scale, logit_bias: multiply and shift the cosine similarities.
    Returns:
        Sum over the batch's combinations divided by the batch size, in nats, > 0.
    Raises:
        ValueError: the shapes do not pair up.
    Source: SigLIP, Zhai et al. 2023, arXiv:2303.15343, equation in section 3.2.
    """
    check_pairs(image=image, text=text)
    logits = similarities(image, text, logit_scale) + logit_bias
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)

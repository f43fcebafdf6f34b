"""The losses that dual encoders are trained with: symmetric softmax (CLIP) and pairwise sigmoid (SigLIP)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cmapkd.objectives.chunks import by_rows, chunk_rows
from cmapkd.objectives.common import check_pairs, similarities


def contrastive_loss(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch dim"],
    *,
    logit_scale: Float[Tensor, ""] | float,
    pictures: Int[Tensor, " batch"] | None = None,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE: each image must find its text in the batch, and each text its image.

    Args:
        image, text: embeddings of the pairs, row by row; normalised here.
        logit_scale: multiplies the cosine similarities; > 0.
        pictures: of each pair; pairs with one number are no negatives of each other. None: all differ.
        chunk: rows at a time, see `chunk_rows`; value and gradient do not depend on it.
    Returns:
        Mean of both directions, in nats, > 0; log(batch) for uninformative embeddings.
    Raises:
        ValueError: the shapes do not pair up, or the chunk is not positive.
    Source: CLIP, Radford et al. 2021, arXiv:2103.00020, figure 3.
    """
    check_pairs(image=image, text=text)
    if chunk_rows(len(image), len(text), chunk) < len(image):
        there, back = (
            matching_loss(*pair, logit_scale=logit_scale, pictures=pictures, chunk=chunk)
            for pair in ((image, text), (text, image))
        )
        return (there + back) / 2
    logits = similarities(image, text, logit_scale)
    labels = torch.arange(len(logits), device=logits.device)
    if pictures is not None:
        logits = logits.masked_fill(_same_picture(pictures, labels), -torch.inf)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def matching_loss(
    anchors: Float[Tensor, "batch dim"],
    candidates: Float[Tensor, "batch dim"],
    *,
    logit_scale: Float[Tensor, ""] | float,
    pictures: Int[Tensor, " batch"] | None = None,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """InfoNCE in one direction: each anchor must find the candidate of its own row.

    Args:
        anchors, candidates: embeddings of the pairs, row by row; normalised here.
        logit_scale: multiplies the cosine similarities; > 0.
        pictures: as of `contrastive_loss`.
        chunk: anchors at a time, see `chunk_rows`; value and gradient do not depend on it.
    Returns:
        Batch mean, in nats, > 0.
    Raises:
        ValueError: the chunk is not positive.
    """

    def losses(rows: Tensor, labels: Tensor) -> Tensor:
        logits = similarities(rows, candidates, logit_scale)
        if pictures is not None:
            logits = logits.masked_fill(_same_picture(pictures, labels), -torch.inf)
        return F.cross_entropy(logits, labels, reduction="none")

    labels = torch.arange(len(anchors), device=anchors.device)
    return by_rows(losses, anchors, labels, size=chunk_rows(len(anchors), len(candidates), chunk)).mean()


def sigmoid_loss(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch dim"],
    *,
    logit_scale: Float[Tensor, ""] | float,
    logit_bias: Float[Tensor, ""] | float,
    pictures: Int[Tensor, " batch"] | None = None,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """Every image-text combination as a yes/no question.

    Args:
        image, text: embeddings of the pairs, row by row; normalised here.
        logit_scale, logit_bias: multiply and shift the cosine similarities.
        pictures: of each pair; pairs with one number are no negatives of each other. None: all differ.
        chunk: rows at a time, see `chunk_rows`; value and gradient do not depend on it.
    Returns:
        Sum over the batch's combinations divided by the batch size, in nats, > 0.
    Raises:
        ValueError: the shapes do not pair up, or the chunk is not positive.
    Source: SigLIP, Zhai et al. 2023, arXiv:2303.15343, equation in section 3.2.
    """
    check_pairs(image=image, text=text)

    def losses(rows: Tensor, labels: Tensor) -> Tensor:
        logits = similarities(rows, text, logit_scale) + logit_bias
        signs = torch.full_like(logits, -1).scatter(1, labels[:, None], 1)
        nats = -F.logsigmoid(signs * logits)
        if pictures is not None:
            nats = nats.masked_fill(_same_picture(pictures, labels), 0.0)
        return nats.sum(-1)

    labels = torch.arange(len(image), device=image.device)
    return by_rows(losses, image, labels, size=chunk_rows(len(image), len(text), chunk)).mean()


def _same_picture(pictures: Int[Tensor, " batch"], labels: Int[Tensor, " rows"]) -> Bool[Tensor, "rows batch"]:
    """Where a row and a column show the same picture without being a pair; `labels` says which pair each row is."""
    own = torch.zeros(len(labels), len(pictures), dtype=torch.bool, device=pictures.device)
    same: Tensor = (pictures[labels][:, None] == pictures[None]) & ~own.scatter(1, labels[:, None], True)
    return same

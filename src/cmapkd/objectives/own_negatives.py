"""Contrast with texts that are false of a pair: as further candidates of the batch, and each pair's own alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cmapkd.objectives.chunks import by_rows, chunk_rows
from cmapkd.objectives.common import check_pairs, unit
from cmapkd.objectives.tiles import same_picture


def contrast_with_negatives(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch dim"],
    negatives: Float[Tensor, "negatives dim"],
    *,
    logit_scale: Float[Tensor, ""] | float,
    pictures: Int[Tensor, " batch"] | None = None,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE in which images must also tell their text from all negatives of the batch.

    Args:
        image, text: embeddings of the pairs, row by row; normalised here.
        negatives: further texts, of any pairs; normalised here. They learn, and no text is compared with them.
        logit_scale: multiplies the cosine similarities; > 0.
        pictures: of each pair; pairs with one number are no negatives of each other. None: all differ.
        chunk: rows at a time, see `chunk_rows`; value and gradient do not depend on it.
    Returns:
        1/2 [CE(s V [T; N]^T, own text) + CE(s T V^T, own image)], batch means in nats, > 0.
    Raises:
        ValueError: the shapes do not pair up, or the chunk is not positive.
    Source: NegCLIP, Yuksekgonul et al. 2023, arXiv:2210.01936, section 5.
    """
    check_pairs(image=image, text=text)
    images, texts = unit(image), torch.cat([unit(text), unit(negatives)])
    size = chunk_rows(len(image), len(texts), chunk)
    labels = torch.arange(len(image), device=image.device)

    def losses(rows: Tensor, own: Tensor, columns: Tensor) -> Float[Tensor, " rows"]:
        with torch.autocast(rows.device.type, enabled=False):
            logits = logit_scale * rows @ columns.T
        if pictures is not None:
            hidden = F.pad(same_picture(pictures, own), (0, len(columns) - len(pictures)))
            logits = logits.masked_fill(hidden, -torch.inf)
        return F.cross_entropy(logits, own, reduction="none")

    of_images = by_rows(lambda rows, own: losses(rows, own, texts), images, labels, size=size)
    of_texts = by_rows(lambda rows, own: losses(rows, own, images), texts[: len(image)], labels, size=size)
    return (of_images + of_texts).mean() / 2


def own_negatives_loss(
    anchors: Float[Tensor, "batch dim"],
    positives: Float[Tensor, "batch dim"],
    negatives: Float[Tensor, "batch per_sample dim"],
    *,
    logit_scale: Float[Tensor, ""] | float,
) -> Float[Tensor, ""]:
    """InfoNCE of each anchor with its own positive and its own negatives alone.

    Args:
        anchors, positives: row by row; normalised here.
        negatives: some of each row; normalised here.
        logit_scale: multiplies the cosine similarities; > 0.
    Returns:
        Batch mean in nats, > 0; log(1 + per_sample) for uninformative embeddings.
    Raises:
        ValueError: the shapes do not pair up.
    Source: the image- and text-grounded contrast of DeGLA, Hu et al. 2025, arXiv:2504.16801.
    """
    check_pairs(anchors=anchors, positives=positives)
    if negatives.ndim != 3 or len(negatives) != len(anchors):
        raise ValueError(
            f"negatives have shape {tuple(negatives.shape)} beside {len(anchors)} anchors: give [batch, per_sample, "
            "dim], the same number for each"
        )
    candidates = torch.cat([unit(positives)[:, None], F.normalize(negatives.to(unit(positives).dtype), dim=-1)], 1)
    with torch.autocast(anchors.device.type, enabled=False):
        logits = logit_scale * (candidates @ unit(anchors)[:, :, None])[:, :, 0]
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))

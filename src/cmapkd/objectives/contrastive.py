"""The losses that dual encoders are trained with: symmetric softmax (CLIP) and pairwise sigmoid (SigLIP)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cmapkd.objectives.chunks import by_rows, chunk_rows
from cmapkd.objectives.common import at_least_float32, check_pairs, similarities, unit
from cmapkd.objectives.tiles import both_ways, row_log_sums, same_picture


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
    size = chunk_rows(len(image), len(text), chunk)
    if size < len(image):
        anchors, candidates = logit_scale * unit(image), unit(text)
        rows, columns = both_ways(anchors, candidates, pictures=pictures, size=size)
        return ((rows.log_sums + columns.log_sums) / 2 - (anchors * candidates).sum(-1)).mean()
    logits = similarities(image, text, logit_scale)
    labels = torch.arange(len(logits), device=logits.device)
    if pictures is not None:
        logits = logits.masked_fill(same_picture(pictures, labels), -torch.inf)
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
        anchors, candidates: embeddings of the pairs, row by row; normalised here. Candidates are detached.
        logit_scale: multiplies the cosine similarities; > 0.
        pictures: as of `contrastive_loss`.
        chunk: anchors at a time, see `chunk_rows`; value and gradient do not depend on it.
    Returns:
        Batch mean, in nats, > 0.
    Raises:
        ValueError: the chunk is not positive.
    """
    size = chunk_rows(len(anchors), len(candidates), chunk)
    if size < len(anchors):
        rows, columns = logit_scale * unit(anchors), unit(candidates.detach())
        return (row_log_sums(rows, columns, pictures=pictures, size=size) - (rows * columns).sum(-1)).mean()
    labels = torch.arange(len(anchors), device=anchors.device)
    logits = similarities(anchors, candidates.detach(), logit_scale)
    if pictures is not None:
        logits = logits.masked_fill(same_picture(pictures, labels), -torch.inf)
    return F.cross_entropy(logits, labels, reduction="none").mean()


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
            nats = nats.masked_fill(same_picture(pictures, labels), 0.0)
        return nats.sum(-1)

    labels = torch.arange(len(image), device=image.device)
    return by_rows(losses, image, labels, size=chunk_rows(len(image), len(text), chunk)).mean()


def contrast_of_views(
    anchors: Float[Tensor, "batch views dim"],
    candidates: Float[Tensor, "batch others dim"],
    *,
    logit_scale: Float[Tensor, ""] | float,
    pictures: Int[Tensor, " batch"] | None = None,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE of every view on one side with every view on the other; negatives are other samples' alone.

    Args:
        anchors, candidates: embeddings of some views of each sample, row by row; normalised here.
        logit_scale, pictures, chunk: as of `contrastive_loss`.
    Returns:
        Mean over all pairs of views and the batch, in nats, > 0.
    Raises:
        ValueError: the shapes do not pair up, or the chunk is not positive.
    Source: COSMOS, Kim et al. 2025, arXiv:2412.01814, equation 3.
    """
    check_pairs(anchors=anchors[:, 0], candidates=candidates[:, 0])
    batch = len(anchors)
    if chunk_rows(batch, batch, chunk) < batch:
        losses = [
            contrastive_loss(one, other, logit_scale=logit_scale, pictures=pictures, chunk=chunk)
            for one in anchors.unbind(1)
            for other in candidates.unbind(1)
        ]
        return torch.stack(losses).mean()
    rows, columns = (F.normalize(at_least_float32(side), dim=-1).transpose(0, 1) for side in (anchors, candidates))
    with torch.autocast(rows.device.type, enabled=False):
        logits = logit_scale * rows[:, None] @ columns[None].mT  # all pairs at once: [views others batch batch]
    labels = torch.arange(batch, device=logits.device)
    if pictures is not None:
        logits = logits.masked_fill(same_picture(pictures, labels), -torch.inf)
    own = logits.diagonal(dim1=-2, dim2=-1)
    return ((logits.logsumexp(-1) + logits.logsumexp(-2)) / 2 - own).mean()

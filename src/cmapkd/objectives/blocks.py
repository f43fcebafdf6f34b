"""The sigmoid loss of a block of images and texts, with its gradients: what a process has of it who knows no others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cmapkd.objectives.chunks import columns_at_once


@dataclass(frozen=True, slots=True)
class SigmoidBlock:
    """Sums over the combinations of a block.

    Attributes:
        nats: the loss.
        by_images, by_texts, by_bias: its gradients; zero where none were asked for.
    """

    nats: Float[Tensor, ""]
    by_images: Float[Tensor, "images dim"]
    by_texts: Float[Tensor, "texts dim"]
    by_bias: Float[Tensor, ""]


@torch.no_grad()
def sigmoid_block(
    images: Float[Tensor, "images dim"],
    texts: Float[Tensor, "texts dim"],
    bias: Float[Tensor, ""],
    *,
    first_image: int,
    first_text: int,
    pictures: Int[Tensor, " batch"] | None = None,
    gradients: bool = True,
    chunk: int | None = None,
) -> SigmoidBlock:
    """`sigmoid_loss` of some images with some texts of a batch, as a sum: three products, one without gradients.

    Args:
        images: unit embeddings times the logit scale.
        texts: unit embeddings.
        bias: added to every logit.
        first_image, first_text: which pair of the batch the first row of each belongs to; the others follow it.
        pictures: of each pair of the batch, see `sigmoid_loss`.
        gradients: whether they are computed.
        chunk: images at a time; None chooses by the size of the block.
    Raises:
        ValueError: the chunk is not positive.
    """
    size = columns_at_once(len(images), len(texts), chunk)
    of_texts = torch.arange(first_text, first_text + len(texts), device=texts.device)
    nats, by_images, by_texts, by_bias = bias.new_zeros(()), images * 0, texts * 0, bias.new_zeros(())
    with torch.autocast(images.device.type, enabled=False):
        for start in range(0, len(images), size):
            some = images[start : start + size]
            logits = some @ texts.T + bias
            of_images = torch.arange(first_image + start, first_image + start + len(some), device=texts.device)
            own = of_images[:, None] == of_texts
            hidden = None if pictures is None else (pictures[of_images, None] == pictures[of_texts]) & ~own
            each = F.softplus(torch.where(own, -logits, logits))
            nats += (each if hidden is None else each.masked_fill_(hidden, 0.0)).sum()
            if gradients:
                slopes = logits.sigmoid_().sub_(own.to(logits.dtype))
                if hidden is not None:
                    slopes.masked_fill_(hidden, 0.0)
                torch.mm(slopes, texts, out=by_images[start : start + size])
                by_texts.addmm_(slopes.T, some)
                by_bias += slopes.sum()
    return SigmoidBlock(nats, by_images, by_texts, by_bias)

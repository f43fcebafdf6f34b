"""Image-text retrieval by the COCO and Flickr protocol: recall@k, median and mean rank, mAP, both directions."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cmapkd.evaluation.ranking import Ranks, check_finite, rank_positives

RECALL_AT = (1, 5, 10)


def retrieval(
    images: Float[Tensor, "images dim"],
    texts: Float[Tensor, "texts dim"],
    image_of_text: Int[Tensor, " texts"],
    *,
    also_positive: Int[Tensor, "pairs 2"] | None = None,
    min_texts_per_image: int | None = None,
    queries_per_block: int | None = None,
) -> dict[str, Any]:
    """Recall@1, 5 and 10 in both directions, over all captions.

    Text to image: every caption queries all images, and hits when its image is among the first k. Image to text: every
    image that has a caption queries all captions, and hits when any caption of its own is among the first k. Images
    without a caption are candidates and do not query. Ties count as the expectation over random order, so identical
    embeddings score chance and not 100.

    Args:
        images, texts: embeddings of one joint space, compared by inner product: unit vectors for the cosine.
        image_of_text: the image (row of `images`) that each caption describes.
        also_positive: further (text, image) pairs that count as right, as `shared_captions` finds them.
        min_texts_per_image: captions that every image must have, 5 for COCO and Flickr30k; None: whatever there is.
        queries_per_block: bounds memory, see `rank_positives`; no influence on the result.
    Returns:
        `{"i2t": {...}, "t2i": {...}, "mean_r@1", "mean_r@5", "mean_r@10", "num_images", "num_texts",
        "min_texts_per_image"}`; each direction holds `r@1`, `r@5`, `r@10` and `map` in percent and `median_rank`,
        `mean_rank` of the best positive, from 1. The minimum is over the images that have a caption.
    Raises:
        ValueError: there is no image or no caption, the shapes do not fit, an embedding is not finite, or an image has
            too few captions.
    """
    ranks = rank_both_ways(
        images,
        texts,
        image_of_text,
        also_positive=also_positive,
        min_texts_per_image=min_texts_per_image,
        queries_per_block=queries_per_block,
    )
    return retrieval_scores(ranks, image_of_text, num_images=len(images))


class RanksBothWays(NamedTuple):
    """Ranks of the best positive: of each image that has a caption, among all captions, and of each caption."""

    i2t: Ranks
    t2i: Ranks


def rank_both_ways(
    images: Float[Tensor, "images dim"],
    texts: Float[Tensor, "texts dim"],
    image_of_text: Int[Tensor, " texts"],
    *,
    also_positive: Int[Tensor, "pairs 2"] | None = None,
    min_texts_per_image: int | None = None,
    queries_per_block: int | None = None,
) -> RanksBothWays:
    """The ranks that `retrieval` is made of; see there for arguments and errors."""
    _check(images, texts, image_of_text)
    check_finite("image embeddings", images)
    check_finite("text embeddings", texts)
    if min_texts_per_image is not None:
        _check_counts(_texts_per_image(image_of_text, len(images)), min_texts_per_image)
    described = torch.stack([torch.arange(len(texts)), image_of_text.cpu().long()], dim=1)
    pairs = described if also_positive is None else torch.cat([described, also_positive.cpu().long()])
    return RanksBothWays(
        i2t=rank_positives(images, texts, pairs.flip(1), queries_per_block=queries_per_block),
        t2i=rank_positives(texts, images, pairs, queries_per_block=queries_per_block),
    )


def retrieval_scores(ranks: RanksBothWays, image_of_text: Int[Tensor, " texts"], *, num_images: int) -> dict[str, Any]:
    """What `retrieval` returns, from the ranks."""
    counts = _texts_per_image(image_of_text, num_images)
    i2t, t2i = map(_summary, ranks)
    return {
        "i2t": i2t,
        "t2i": t2i,
        **{f"mean_r@{k}": (i2t[f"r@{k}"] + t2i[f"r@{k}"]) / 2 for k in RECALL_AT},
        "num_images": num_images,
        "num_texts": len(image_of_text),
        "min_texts_per_image": int(counts[counts > 0].min()),
    }


def _texts_per_image(image_of_text: Int[Tensor, " texts"], num_images: int) -> Int[Tensor, " images"]:
    return image_of_text.cpu().long().bincount(minlength=num_images)


def shared_captions(captions: Sequence[str], image_of_text: Int[Tensor, " texts"]) -> Int[Tensor, "pairs 2"]:
    """The (text, image) pairs that identical captions add: a sentence said of several images is right for each.

    Captions are identical when they agree in letters, whatever the case, spacing and final full stop. The standard
    protocol counts none of these pairs; they matter where few sentences describe many images, as in NLVR.
    """
    members: defaultdict[str, list[int]] = defaultdict(list)
    for text, caption in enumerate(captions):
        members[normalised_caption(caption)].append(text)
    added = []
    for texts in members.values():
        group = torch.tensor(texts)
        images = torch.unique(image_of_text.cpu().long()[group])
        if len(images) > 1:
            pairs = torch.cartesian_prod(group, images)
            added.append(pairs[image_of_text.cpu().long()[pairs[:, 0]] != pairs[:, 1]])
    return torch.cat(added) if added else torch.empty(0, 2, dtype=torch.long)


def normalised_caption(caption: str) -> str:
    """A caption without what `shared_captions` overlooks: case, spacing and the final full stop."""
    return " ".join(unicodedata.normalize("NFKC", caption).casefold().split()).rstrip(" .")


def _summary(ranks: Ranks) -> dict[str, float]:
    expected = ranks.expected()
    recall = {f"r@{k}": ranks.percent(k) for k in RECALL_AT}
    return recall | {
        "median_rank": float(expected.quantile(0.5)),
        "mean_rank": float(expected.mean()),
        "map": 100 * float(ranks.average_precision.mean()),
    }


def _check_counts(counts: Int[Tensor, " images"], least: int) -> None:
    few = (counts < least).nonzero().flatten()
    if len(few):
        raise ValueError(
            f"{len(few)} of {len(counts)} images have fewer than {least} captions, the first at row {int(few[0])} with "
            f"{int(counts[few[0]])}: recall over fewer captions is another measure, harder from image to text. Load "
            "all captions of every image (rows of one image must share its name or id), or ask for no minimum."
        )


def _check(images: Tensor, texts: Tensor, image_of_text: Tensor) -> None:
    if not len(images):
        raise ValueError("there are no images to retrieve: the source is empty, or none of its samples could be read.")
    if not len(texts):
        raise ValueError(
            f"none of the {len(images)} images has a caption, and retrieval compares images with captions: give a "
            "source with captions, or leave retrieval out of the tasks."
        )
    if images.shape[1:] != texts.shape[1:]:
        raise ValueError(
            f"images are {tuple(images.shape)} and texts {tuple(texts.shape)}: both must be embeddings of one joint "
            "space, so of one model."
        )
    if image_of_text.shape != (len(texts),):
        raise ValueError(
            f"image_of_text has shape {tuple(image_of_text.shape)}: give one image for each of {len(texts)} texts."
        )
    low, high = int(image_of_text.min()), int(image_of_text.max())
    if low < 0 or high >= len(images):
        raise ValueError(f"image_of_text names images {low} to {high}, but there are {len(images)}, numbered from 0.")

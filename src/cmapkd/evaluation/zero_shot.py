"""Zero-shot classification: class names become texts, and an image belongs to the class whose texts are nearest."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cmapkd.evaluation.ranking import Ranks, check_finite, rank_positives


def zero_shot(
    images: Float[Tensor, "images dim"], labels: Int[Tensor, " images"], weights: Float[Tensor, "classes dim"]
) -> dict[str, Any]:
    """Accuracy of the nearest class, in percent; classes of equal score count as the expectation over random order.

    Args:
        labels: row of `weights` that is right for each image; images with a negative label are left out.
    Returns:
        `top1`, `top5` (None with five classes or fewer, where it says nothing), `mean_per_class` (top-1 within each
        class that has images, then their mean), `num_classes`, `num_images` (labelled ones).
    Raises:
        ValueError: no image is labelled, a label has no class, or an embedding is not finite.
    """
    return zero_shot_scores(rank_classes(images, labels, weights), labels, num_classes=len(weights))


def rank_classes(
    images: Float[Tensor, "images dim"], labels: Int[Tensor, " images"], weights: Float[Tensor, "classes dim"]
) -> Ranks:
    """The rank of the right class of each labelled image; see `zero_shot` for arguments and errors."""
    check_finite("image embeddings", images)
    check_finite("class weights", weights)
    labelled = (labels >= 0).nonzero().flatten()
    if not len(labelled):
        raise ValueError(f"none of the {len(images)} images has a label, and accuracy compares with labels.")
    truth = labels[labelled]
    if int(truth.max()) >= len(weights):
        raise ValueError(
            f"there are labels up to {int(truth.max())}, but only {len(weights)} class names, for labels 0 to "
            f"{len(weights) - 1}: give the list of names that the labels were numbered by."
        )
    pairs = torch.stack([torch.arange(len(truth), device=truth.device), truth], dim=1)
    return rank_positives(images[labelled], weights, pairs)


def zero_shot_scores(ranks: Ranks, labels: Int[Tensor, " images"], *, num_classes: int) -> dict[str, Any]:
    """What `zero_shot` returns, from the ranks of the labelled images."""
    truth = labels[labels >= 0]
    top1 = ranks.hits(1)
    sums = top1.new_zeros(num_classes).index_add_(0, truth, top1)
    counts = truth.bincount(minlength=num_classes)
    return {
        "top1": ranks.percent(1),
        "top5": ranks.percent(5) if num_classes > 5 else None,
        "mean_per_class": 100 * float((sums[counts > 0] / counts[counts > 0]).mean()),
        "num_classes": num_classes,
        "num_images": len(truth),
    }

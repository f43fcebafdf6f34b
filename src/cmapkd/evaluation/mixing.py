"""How two heads of a classifier answer together: α and β by the accuracy on validation data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cmapkd.models.classifier import mixed
from cmapkd.objectives.classes import check_labels

ALPHAS = tuple(step / 20 for step in range(21))
BETAS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0)
"""Where the published code of DHO looks."""


class Mix(NamedTuple):
    """α σ(first) + (1 - α) σ(second / β), and how often it is right, in percent."""

    alpha: float
    beta: float
    accuracy: float


def best_mix(
    first: Float[Tensor, "images classes"],
    second: Float[Tensor, "images classes"],
    labels: Int[Tensor, " images"],
    *,
    alphas: Sequence[float] = ALPHAS,
    betas: Sequence[float] = BETAS,
) -> Mix:
    """The mix of two heads that is right most often; of equals the one with the largest likelihood of the labels.

    Args:
        first, second: scores of the heads.
        labels: images with a negative label are left out.
    Raises:
        ValueError: the shapes do not fit, or no image has a label.
    """
    check_labels(first, labels)
    if first.shape != second.shape:
        raise ValueError(f"two heads have scores of shape {tuple(first.shape)} and {tuple(second.shape)}")
    known = labels >= 0
    if not bool(known.any()):
        raise ValueError(f"none of the {len(labels)} images has a label, and a mix is chosen by labels")
    one, two, truth = first[known].double(), second[known].double(), labels[known]
    best: tuple[int, float] | None = None
    found = Mix(alphas[0], betas[0], 0.0)
    for beta in betas:
        for alpha in alphas:
            p = mixed(one, two, alpha=alpha, beta=beta)
            right = int((p.argmax(-1) == truth).sum())
            likelihood = float(p.gather(1, truth[:, None]).clamp_min(torch.finfo(p.dtype).tiny).log().mean())
            if best is None or (right, likelihood) > best:
                best, found = (right, likelihood), Mix(alpha, beta, 100 * right / len(truth))
    return found

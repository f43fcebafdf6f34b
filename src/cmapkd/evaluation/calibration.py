"""Calibration: whether a zero-shot classifier's probabilities are the shares in which it is right."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

NUM_BINS = 15


def expected_calibration_error(
    confidence: Float[Tensor, " images"], correct: Bool[Tensor, " images"], *, num_bins: int = NUM_BINS
) -> float:
    """Mean distance of confidence and accuracy over bins of equal width (low, high], weighted by their images; 0 to 1.

    Args:
        confidence: probability of the predicted class, in [0, 1].
        correct: whether that class is right.
    Raises:
        ValueError: there are no images, the shapes differ, or a confidence is no probability.
    Source: Guo et al. 2017, arXiv:1706.04599, equation 3 (15 bins).
    """
    if confidence.shape != correct.shape or not len(confidence):
        raise ValueError(
            f"calibration needs one confidence and one outcome for each image, got {tuple(confidence.shape)} and "
            f"{tuple(correct.shape)}"
        )
    values = confidence.double()
    if not bool(((values >= 0) & (values <= 1 + 1e-6)).all()):
        raise ValueError(
            f"confidences lie in [{float(values.min()):g}, {float(values.max()):g}]: give probabilities, 0 to 1"
        )
    place = ((values * num_bins).ceil().long() - 1).clamp(0, num_bins - 1)
    counts = torch.bincount(place, minlength=num_bins).double()
    gap = torch.zeros_like(counts).index_add_(0, place, correct.double() - values)
    return float(gap.abs().sum() / len(values))


def zero_shot_calibration(
    images: Float[Tensor, "images dim"],
    labels: Int[Tensor, " images"],
    weights: Float[Tensor, "classes dim"],
    *,
    logit_scale: float,
) -> dict[str, Any]:
    """How well p = softmax(logit_scale x cosine) over the classes is calibrated, with the model's own logit scale.

    No temperature is fitted: on no split, so nothing has to be held out, and what is measured is the probability that
    the model itself would report. A SigLIP bias cancels in the softmax.

    Args:
        images, weights: unit vectors.
        labels: right class of each image; images with a negative label are left out.
        logit_scale: > 0, already exponentiated.
    Returns:
        `ece` (percent), `confidence` (mean, percent), `accuracy` (percent; of several classes with the same highest
        probability the first counts), `nll` (nats), `brier` (0 to 2), `logit_scale`, `num_bins`, `num_images`.
    Raises:
        ValueError: no image is labelled.
    """
    log_p = (logit_scale * (images.double() @ weights.double().T)).log_softmax(dim=-1)
    return {**calibration(log_p, labels), "logit_scale": logit_scale}


def calibration(log_p: Float[Tensor, "images classes"], labels: Int[Tensor, " images"]) -> dict[str, Any]:
    """How well probabilities are calibrated.

    Args:
        log_p: their logarithms, in nats.
        labels: right class of each image; images with a negative label are left out.
    Returns:
        As `zero_shot_calibration`, without `logit_scale`.
    Raises:
        ValueError: no image is labelled.
    """
    labelled = (labels >= 0).nonzero().flatten()
    if not len(labelled):
        raise ValueError(f"none of the {len(log_p)} images has a label, and calibration compares with labels.")
    truth, log_p = labels[labelled], log_p[labelled]
    confidence, predicted = log_p.exp().max(dim=-1)
    correct = predicted == truth
    p_truth = log_p.exp().gather(1, truth[:, None])[:, 0]
    brier = (log_p.exp().square().sum(-1) - 2 * p_truth + 1).mean()
    return {
        "ece": 100 * expected_calibration_error(confidence, correct),
        "confidence": 100 * float(confidence.mean()),
        "accuracy": 100 * float(correct.double().mean()),
        "nll": float(-log_p.gather(1, truth[:, None]).mean()),
        "brier": float(brier),
        "num_bins": NUM_BINS,
        "num_images": len(truth),
    }

"""How well labels can be read off frozen image embeddings: linear probe and nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cmapkd.evaluation.ranking import check_finite

STRENGTHS = tuple(10.0**exponent for exponent in range(-6, 3))  # of the linear probe's penalty, strongest last

_BLOCK_SCORES = 4_000_000
_NO_VALIDATION = 1  # training images of a class below which none of it is held out


@dataclass(frozen=True, slots=True)
class ClassificationScores:
    """Accuracies in percent over the labelled images.

    Attributes:
        top1: classes of equal score count as the expectation over random order.
        top5: None with five classes or fewer, where it says nothing.
        mean_per_class: top-1 within each class that has images, then their mean.
        settings: what was chosen, such as the penalty and the accuracy on the held-out training images.
    """

    top1: float
    top5: float | None
    mean_per_class: float
    num_classes: int
    num_images: int
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data ready for JSON."""
        return asdict(self)


def score_classes(scores: Float[Tensor, "images classes"], labels: Int[Tensor, " images"]) -> ClassificationScores:
    """Accuracy of the class with the highest score.

    Args:
        labels: column of `scores` that is right for each image; images with a negative label are left out.
    Raises:
        ValueError: no image is labelled, a label has no class, or a score is not finite.
    """
    check_finite("class scores", scores)
    if labels.shape != scores.shape[:1]:
        raise ValueError(f"labels have shape {tuple(labels.shape)}: give one for each of {len(scores)} images")
    labelled = labels >= 0
    scores, labels = scores[labelled], labels[labelled].long()
    if not len(labels):
        raise ValueError("no image has a label, and accuracy compares with labels.")
    if int(labels.max()) >= scores.shape[1]:
        raise ValueError(
            f"there are labels up to {int(labels.max())}, but scores of only {scores.shape[1]} classes, for labels 0 "
            f"to {scores.shape[1] - 1}."
        )
    of_label = scores.gather(1, labels[:, None])
    better, tied = (scores > of_label).sum(1), (scores == of_label).sum(1)  # the class itself is one of the tied
    first, fifth = (((k - better) / tied.double()).clamp(0, 1) for k in (1, 5))
    per_class = torch.zeros(scores.shape[1], dtype=torch.float64, device=scores.device).index_add_(0, labels, first)
    counts = labels.bincount(minlength=scores.shape[1])
    return ClassificationScores(
        top1=100 * float(first.mean()),
        top5=100 * float(fifth.mean()) if scores.shape[1] > 5 else None,
        mean_per_class=100 * float((per_class[counts > 0] / counts[counts > 0]).mean()),
        num_classes=scores.shape[1],
        num_images=len(labels),
    )


def linear_probe(
    train: Float[Tensor, "train dim"],
    train_labels: Int[Tensor, " train"],
    test: Float[Tensor, "test dim"],
    test_labels: Int[Tensor, " test"],
    *,
    num_classes: int | None = None,
    strengths: Sequence[float] = STRENGTHS,
    validation_share: float = 0.2,
    seed: int = 0,
    max_steps: int = 1_000,
) -> ClassificationScores:
    """Multinomial logistic regression on frozen embeddings, its penalty chosen on held-out training images.

    Minimises the mean cross-entropy + strength / 2 x the sum of squared weights (not of the biases) by L-BFGS, in
    float64. Of each class `validation_share` of the training images is held out to choose the strength by top-1, the
    stronger of equals; then all training images are fitted with it. The test images take part in nothing but the score.

    Args:
        train, test: embeddings as they are: normalise them first where their length means nothing.
        train_labels, test_labels: images with a negative label are left out.
        num_classes: None: one above the largest training label.
        strengths: of the penalty, > 0; scikit-learn's C is 1 / (strength x number of training images). With a single
            one nothing is held out.
        validation_share: of the training images of a class, in (0, 1); a class with one image keeps it for training.
        seed: which images are held out.
        max_steps: iterations of L-BFGS for each fit.
    Returns:
        Accuracies on `test`; `settings` holds `strength`, `validation_top1` by strength, `num_train`, and `converged`.
    Raises:
        ValueError: shapes or labels do not fit, an embedding is not finite, or an option is out of range.
    Source: Radford et al. 2021, arXiv:2103.00020, appendix A.3 (L-BFGS, penalty chosen on a validation split).
    """
    train, train_labels, num_classes = _training(train, train_labels, test, num_classes)
    grid = sorted({float(strength) for strength in strengths}, reverse=True)
    if not grid or grid[-1] <= 0 or not 0 < validation_share < 1:
        raise ValueError(
            f"strengths must be positive and validation_share between 0 and 1, got {list(strengths)} and "
            f"{validation_share}"
        )
    accuracies: dict[float, float] = {}
    if len(grid) > 1:
        held_out = _hold_out(train_labels, validation_share, seed)
        if not bool(held_out.any()):
            raise ValueError(
                f"the {len(train)} training images hold one image a class, so none can be held out to choose the "
                "penalty on: give more images, or a single strength."
            )
        model = None
        for strength in grid:  # from the smoothest problem on, each starting at the last one's solution
            model, _ = _fit(train[~held_out], train_labels[~held_out], num_classes, strength, max_steps, model)
            scores = _apply(model, train[held_out])
            accuracies[strength] = score_classes(scores, train_labels[held_out]).top1
    best = max(grid, key=lambda strength: (accuracies.get(strength, 0.0), strength))
    model, converged = _fit(train, train_labels, num_classes, best, max_steps, None)
    result = score_classes(_apply(model, test.double()), test_labels)
    settings = {
        "strength": best, "validation_top1": {f"{strength:g}": value for strength, value in accuracies.items()},
        "num_train": len(train), "converged": converged,
    }  # fmt: skip
    return ClassificationScores(
        result.top1, result.top5, result.mean_per_class, num_classes, result.num_images, settings
    )


def knn_probe(
    train: Float[Tensor, "train dim"],
    train_labels: Int[Tensor, " train"],
    test: Float[Tensor, "test dim"],
    test_labels: Int[Tensor, " test"],
    *,
    neighbours: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
) -> ClassificationScores:
    """Votes of the nearest training images by cosine, each weighted by exp(cosine / temperature).

    Args:
        train, test: embeddings, normalised here.
        neighbours: how many vote; all training images where there are fewer.
        temperature: divides the cosine; > 0.
    Returns:
        Accuracies on `test`; `settings` holds `neighbours`, `temperature` and `num_train`.
    Raises:
        ValueError: shapes or labels do not fit, an embedding is not finite, or an option is out of range.
    Source: Wu et al. 2018, arXiv:1805.01978, section 3.4; 20 neighbours as in Caron et al. 2021, arXiv:2104.14294.
    """
    if neighbours < 1 or not temperature > 0:
        raise ValueError(f"neighbours must be at least 1 and temperature above 0, got {neighbours} and {temperature}")
    train, train_labels, num_classes = _training(train, train_labels, test, num_classes)
    train, test = (F.normalize(values.float(), dim=-1) for values in (train, test))
    k = min(neighbours, len(train))
    votes = torch.zeros(len(test), num_classes, dtype=torch.float64, device=test.device)
    size = max(1, _BLOCK_SCORES // len(train))
    for first in range(0, len(test), size):
        nearest = (test[first : first + size] @ train.T).topk(k, dim=1)
        weights = ((nearest.values - 1) / temperature).double().exp()  # of the cosine's distance from 1: no overflow
        votes[first : first + size].scatter_add_(1, train_labels[nearest.indices], weights)
    result = score_classes(votes, test_labels)
    settings = {"neighbours": k, "temperature": temperature, "num_train": len(train)}
    return ClassificationScores(
        result.top1, result.top5, result.mean_per_class, num_classes, result.num_images, settings
    )


class _LinearClassifier(NamedTuple):
    weight: Float[Tensor, "classes dim"]
    bias: Float[Tensor, " classes"]


def _fit(
    features: Float[Tensor, "train dim"],
    labels: Int[Tensor, " train"],
    num_classes: int,
    strength: float,
    max_steps: int,
    start: _LinearClassifier | None,
) -> tuple[_LinearClassifier, bool]:
    """The minimum, and whether the gradient vanished there (below 1e-6) within `max_steps`."""
    weight = features.new_zeros(num_classes, features.shape[1]) if start is None else start.weight.clone()
    bias = features.new_zeros(num_classes) if start is None else start.bias.clone()
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=max_steps, tolerance_grad=1e-7, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(features, weight, bias), labels) + strength / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
        closure()
    steepest = max(float(tensor.grad.abs().max()) for tensor in parameters if tensor.grad is not None)
    return _LinearClassifier(weight.detach(), bias.detach()), steepest < 1e-6


def _apply(model: _LinearClassifier, features: Float[Tensor, "images dim"]) -> Float[Tensor, "images classes"]:
    return F.linear(features, model.weight, model.bias)


def _hold_out(labels: Int[Tensor, " train"], fraction: float, seed: int) -> Bool[Tensor, " train"]:
    """Which images are held out: of every class the same fraction, rounded, but never all of it."""
    draws = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    held_out = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        if len(members) > _NO_VALIDATION:
            number = min(max(1, round(fraction * len(members))), len(members) - 1)
            held_out[members[draws[members].argsort()[:number]]] = True
    return held_out


def _training(
    train: Float[Tensor, "train dim"],
    labels: Int[Tensor, " train"],
    test: Float[Tensor, "test dim"],
    num_classes: int | None,
) -> tuple[Float[Tensor, "train dim"], Int[Tensor, " train"], int]:
    """The labelled training images, float64, and the number of classes."""
    if train.ndim != 2 or train.shape[1:] != test.shape[1:] or labels.shape != train.shape[:1]:
        raise ValueError(
            f"train has shape {tuple(train.shape)}, its labels {tuple(labels.shape)} and test {tuple(test.shape)}: "
            "embeddings of both must be as wide, with one label for each image."
        )
    check_finite("training embeddings", train)
    check_finite("test embeddings", test)
    labelled = labels >= 0
    train, labels = train[labelled].detach().double(), labels[labelled].long()
    if len(labels.unique()) < 2:
        raise ValueError(
            f"the {len(labels)} labelled training images are of {len(labels.unique())} classes, not of two"
        )
    occurring = int(labels.max()) + 1
    if num_classes is not None and num_classes < occurring:
        raise ValueError(f"there are labels up to {occurring - 1}, but num_classes is {num_classes}")
    return train, labels, num_classes or occurring

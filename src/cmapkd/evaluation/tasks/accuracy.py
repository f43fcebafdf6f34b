"""Task `accuracy`: how often a classifier is right, also each head alone; of an image-text model by its texts."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from cmapkd.evaluation.subject import Subject
from cmapkd.evaluation.tasks.base import Column, Headline
from cmapkd.evaluation.tasks.zero_shot import ZeroShot
from cmapkd.evaluation.zero_shot import rank_classes, zero_shot_scores
from cmapkd.models.base import ImageEncoder, Model
from cmapkd.models.classifier import Classifier


class Accuracy(ZeroShot):
    title = "Accuracy of classifiers, percent"
    reads = ImageEncoder
    headline: ClassVar[Headline | None] = Headline("accuracy", ("top1",), "accuracy")
    columns: ClassVar[tuple[Column, ...]] = (
        Column("top-1", ("top1",)),
        Column("top-5", ("top5",)),
        Column("mean per class", ("mean_per_class",)),
        Column("head labels", ("heads", "labels")),
        Column("head teacher", ("heads", "teacher")),
    )

    @classmethod
    def is_automatic(cls, models: Collection[Model]) -> bool:
        """Beside a classifier; image-text models alone have `zero_shot`, which is the same of them."""
        return any(isinstance(model, Classifier) for model in models)

    def missing(self, subject: Subject) -> str | None:
        return super().missing(subject) or unlike_classes(subject)

    def score(self, subject: Subject) -> dict[str, Any]:
        model, embedded = subject.model, subject.embedded
        if not isinstance(model, Classifier):
            ranks = rank_classes(embedded.images, embedded.labels, subject.class_weights)
            subject.ranks["accuracy"] = ranks
            return zero_shot_scores(ranks, embedded.labels, num_classes=len(subject.class_weights))
        size = len(model.class_names)
        ranks = rank_classes(model.probabilities(embedded.logits), embedded.labels, torch.eye(size))
        subject.ranks["accuracy"] = ranks
        scores = zero_shot_scores(ranks, embedded.labels, num_classes=size)
        scores["per_class"] = _per_class(model.probabilities(embedded.logits), embedded.labels, model.class_names)
        scores["heads"] = {
            name: rank_classes(logits, embedded.labels, torch.eye(size)).percent(1)
            for name, logits in embedded.logits.items()
        }
        assert model.rule is not None
        return scores | {"rule": model.rule.model_dump(mode="json")}


def unlike_classes(subject: Subject) -> str | None:
    """Why labels of the source are no classes of the model; None where they are."""
    model = subject.model
    if not isinstance(model, Classifier):
        return None
    if model.rule is None:
        return f"{subject.name} has no classes yet: it was built, and no method has trained it"
    own, named = model.class_names, subject.class_names
    if named is None:
        largest = int(subject.embedded.labels.max())
        return None if largest < len(own) else f"it has a label {largest}, and {subject.name} knows {len(own)} classes"
    if len(named) != len(own):
        return f"it has {len(named)} classes, and {subject.name} knows {len(own)}"
    for number, (theirs, ours) in enumerate(zip(named, own, strict=True)):
        if theirs != ours:
            return f"its class {number} is {theirs!r}, and that of {subject.name} is {ours!r}"
    return None


def _per_class(scores: Float[Tensor, "images classes"], labels: Tensor, names: tuple[str, ...]) -> dict[str, float]:
    """Percent right by class, of the classes that have images; of equal scores the first counts."""
    known = labels >= 0
    truth, right = labels[known], (scores[known].argmax(-1) == labels[known]).double()
    counts = truth.bincount(minlength=len(names))
    hits = torch.zeros(len(names), dtype=torch.float64).index_add_(0, truth, right)
    return {name: 100 * float(hits[place] / counts[place]) for place, name in enumerate(names) if counts[place]}

"""Tasks `zero_shot` and `calibration`: classification by class names, and whether its probabilities are right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from cmapkd.data.templates import ClassPrompts, get_class_names, get_class_prompts, get_templates
from cmapkd.data.types import Source
from cmapkd.evaluation.calibration import calibration, zero_shot_calibration
from cmapkd.evaluation.config import EvaluationConfig
from cmapkd.evaluation.subject import Subject
from cmapkd.evaluation.tasks.base import Column, Headline, Task
from cmapkd.evaluation.zero_shot import rank_classes, zero_shot_scores
from cmapkd.models.base import ImageEncoder
from cmapkd.models.classifier import Classifier


def check_prompts(config: EvaluationConfig, source: Source) -> None:
    """Refuses names, templates or texts of classes that cannot be had; no model is asked.

    Raises:
        ConfigError: one of them does not exist, or a class has no prompt.
        ValueError: the source has another number of classes.
    """
    names, templates = get_class_names(config.class_names, source), get_templates(config.templates, source)
    if names is not None:
        _ = ClassPrompts(names, templates, get_class_prompts(config.class_prompts, names, source)).of_class


class ZeroShot(Task):
    title = "Zero-shot classification, percent"
    alone = automatic = True
    headline: ClassVar[Headline | None] = Headline("zero_shot", ("top1",), "zero-shot")
    columns: ClassVar[tuple[Column, ...]] = (
        Column("top-1", ("top1",)),
        Column("top-5", ("top5",)),
        Column("mean per class", ("mean_per_class",)),
    )

    def prepare(self, subject: Subject) -> None:
        check_prompts(subject.bench.config, subject.bench.scored)

    def missing(self, subject: Subject) -> str | None:
        if not bool((subject.embedded.labels >= 0).any()):
            return f"none of its {len(subject.embedded.ids)} images has a label"
        if subject.class_names is None:
            return "its labels have no names; give class_names, a set or a file"
        return None

    def score(self, subject: Subject) -> dict[str, Any]:
        embedded, weights = subject.embedded, subject.class_weights
        ranks = rank_classes(embedded.images, embedded.labels, weights)
        subject.ranks["zero_shot"] = ranks
        return zero_shot_scores(ranks, embedded.labels, num_classes=len(weights))


def _wide(logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In float64, where small probabilities keep their logarithms."""
    return {name: scores.double() for name, scores in logits.items()}


class Calibration(ZeroShot):
    title = "Calibration of probabilities; of image-text models zero-shot, by the model's own logit scale"
    reads = ImageEncoder
    automatic = False
    headline = None
    columns = (
        Column("ECE %", ("ece",)),
        Column("confidence %", ("confidence",)),
        Column("accuracy %", ("accuracy",)),
        Column("NLL", ("nll",), 3),
        Column("Brier", ("brier",), 3),
    )

    def score(self, subject: Subject) -> dict[str, Any]:
        model, embedded = subject.model, subject.embedded
        if isinstance(model, Classifier):
            return calibration(model.probabilities(_wide(embedded.logits)).log(), embedded.labels)
        scale = float(subject.dual.log_logit_scale.detach().exp())
        return zero_shot_calibration(embedded.images, embedded.labels, subject.class_weights, logit_scale=scale)

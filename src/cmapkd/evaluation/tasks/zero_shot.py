"""Tasks `zero_shot` and `calibration`: classification by class names, and whether its probabilities are right."""

from __future__ import annotations

from typing import Any, ClassVar

from cmapkd.data.templates import ClassPrompts, get_templates
from cmapkd.evaluation.calibration import zero_shot_calibration
from cmapkd.evaluation.subject import Subject
from cmapkd.evaluation.tasks.base import Column, Headline, Task
from cmapkd.evaluation.zero_shot import rank_classes, zero_shot_scores


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
        assert subject.class_names is None or subject.class_names
        templates = get_templates(subject.bench.config.templates, subject.bench.scored)
        if subject.class_names is not None:
            _ = ClassPrompts(subject.class_names, templates, subject.class_prompts).of_class  # refuses classes without

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


class Calibration(ZeroShot):
    title = "Calibration of zero-shot probabilities, the model's own logit scale"
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
        embedded = subject.embedded
        scale = float(subject.dual.log_logit_scale.detach().exp())
        return zero_shot_calibration(embedded.images, embedded.labels, subject.class_weights, logit_scale=scale)

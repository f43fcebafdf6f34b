"""Cross-entropy with labels: a classifier without a teacher, which the others are compared with."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from cmapkd.data.types import Batch
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.classifying import LABELS_HEAD, ClassifierMethod, ClassifyingConfig
from cmapkd.methods.terms import Term
from cmapkd.models.classifier import ClassHeadConfig
from cmapkd.objectives import labelled_cross_entropy


class SupervisedConfig(ClassifyingConfig):
    """How hard the labels are."""

    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Probability that is spread over all classes, in place of the right one."
    )


class Supervised(ClassifierMethod):
    """One linear head on the image tower learns the labels; samples without a label count for nothing."""

    Config: ClassVar[type[MethodConfig]] = SupervisedConfig
    uses_teacher: ClassVar[bool] = False
    card: ClassVar[MethodCard] = MethodCard(
        title="Cross-entropy with labels, without a teacher",
        paper="none; label smoothing: Szegedy et al. 2016, arXiv:1512.00567",
        equations=("z = W f + b", "L = CE(z, (1 - ε) onehot(y) + ε / C), the mean over labelled samples"),
        needs="labels, and the names of the classes",
        trainable="the student: its image tower and a linear head",
        departures=(),
        checked_against="torch's cross_entropy",
    )

    def __init__(self, config: SupervisedConfig, **models: object) -> None:
        super().__init__(config, **models)  # type: ignore[arg-type]
        self.config = config
        self.set_heads({LABELS_HEAD: ClassHeadConfig()})

    @property
    def term_names(self) -> tuple[str, ...]:
        return ("labels",)

    @property
    def needs_labels(self) -> bool:
        return True

    def terms(self, batch: Batch) -> dict[str, Term]:
        logits = self.student.logits(LABELS_HEAD, self.features(batch))
        loss = labelled_cross_entropy(logits, self.labels(batch), smoothing=self.config.label_smoothing)
        return {"labels": Term(loss)}

"""Supervised fine-tuning: a model that writes learns the answers of the data, without a teacher.

The scratch baseline of every distillation of models that write, and how a teacher is trained.
"""

from __future__ import annotations

from typing import ClassVar

from cmapkd.data.types import Batch
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.generative import Counted, GenerativeConfig, GenerativeMethod
from cmapkd.models import FrozenTeacher
from cmapkd.models.generative import GenerativeModel
from cmapkd.models.token_types import TokenFeatures


class SFTConfig(GenerativeConfig):
    """What a mean is taken over; no other settings."""


class SFT(GenerativeMethod):
    """Each token of an answer is predicted from the picture, the question and the tokens before it."""

    Config: ClassVar[type[MethodConfig]] = SFTConfig
    uses_teacher: ClassVar[bool] = False
    card: ClassVar[MethodCard] = MethodCard(
        title="Supervised fine-tuning, no teacher",
        paper="Liu et al. 2023, arXiv:2304.08485, section 4.2 (visual instruction tuning)",
        equations=("L = -(1/N) Σ_i log q(y_i | picture, question, y_<i), over the N tokens of all answers, ends too",),
        needs="final states of the answers' tokens",
        trainable="the student",
        departures=(
            "The mean is over the tokens of the whole batch, of all micro-batches and processes.",
            "The end token of an answer is always learned.",
        ),
        checked_against="the sum written out; the loss of transformers' own classes with labels",
    )

    def __init__(self, config: SFTConfig, *, student: GenerativeModel, teacher: FrozenTeacher | None = None) -> None:
        super().__init__(config, student=student, teacher=teacher)
        self.config, self.weights = config, {"answers": 1.0}

    def sums(self, part: Batch, student: TokenFeatures, teacher: TokenFeatures | None) -> dict[str, Counted]:  # noqa: ARG002
        return self.losses(student, self.weigh(part, student.hidden["answer"]))

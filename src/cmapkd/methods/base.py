"""What a distillation method is: named loss terms of a batch, and everything with weights that is not the student."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from cmapkd.config import Config
from cmapkd.data.types import Batch
from cmapkd.features import gather_features
from cmapkd.models import DualEncoder, Features, FrozenTeacher, Needs
from cmapkd.objectives import contrastive_loss, sigmoid_loss


@dataclass(frozen=True, slots=True)
class Term:
    """One part of the loss: its raw value (a batch mean) and how much it counts. The trainer sums weight × value."""

    value: Tensor
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class MethodCard:
    """What a reader must know before trusting a method."""

    title: str
    paper: str
    equations: tuple[str, ...]
    needs: str
    trainable: str
    departures: tuple[str, ...]
    checked_against: str


class MethodConfig(Config):
    """Base of every method's settings. In a recipe they stand beside the method's name."""

    name: str = Field("", description="The method's name in METHODS.")


class Method(nn.Module, ABC):
    """A student, a frozen teacher where there is one, and the terms that tie them.

    The student and a method's own modules are submodules: trained, checkpointed and wrapped for distributed training.
    The teacher is none of these.
    """

    card: ClassVar[MethodCard]
    Config: ClassVar[type[MethodConfig]]
    uses_teacher: ClassVar[bool] = True

    def __init__(
        self,
        config: MethodConfig,  # noqa: ARG002  kept by the methods, each with its own type
        *,
        student: DualEncoder,
        teacher: FrozenTeacher | None = None,
    ) -> None:
        super().__init__()
        if self.uses_teacher and teacher is None:
            raise ValueError(f"method {type(self).__name__} distils from a teacher: name one with teacher=...")
        self.student = student
        self.teacher = teacher

    @property
    def student_needs(self) -> Needs:
        """Levels of the student that the terms read."""
        return Needs()

    @property
    def teacher_needs(self) -> Needs:
        """Levels of the teacher that the terms read; it computes and a cache stores no others."""
        return Needs()

    @abstractmethod
    def terms(self, batch: Batch) -> dict[str, Term]:
        """The loss terms of the batch, by name."""

    def forward(self, batch: Batch) -> dict[str, Term]:
        return self.terms(batch)

    @torch.no_grad()
    def after_step(self) -> None:
        """Called after every optimizer step: puts back what must stay in a range."""
        self.student.clamp_logit_scale()

    def encode_student(self, batch: Batch) -> Features:
        """The student's features; embeddings are those of the whole batch, over all processes."""
        return gather_features(self.student(batch.inputs["student"], self.student_needs))

    def encode_teacher(self, batch: Batch) -> Features:
        """The teacher's features, likewise, without gradient."""
        assert self.teacher is not None
        return gather_features(self.teacher(batch, self.teacher_needs))


def task_loss(student: Features) -> Tensor:
    """The loss the student would be trained with alone: SigLIP's where it has a logit bias, else CLIP's."""
    image, text, scale = student.image.embedding, student.text.embedding, student.logit_scale
    if student.logit_bias is not None:
        return sigmoid_loss(image, text, logit_scale=scale, logit_bias=student.logit_bias)
    return contrastive_loss(image, text, logit_scale=scale)

"""Methods whose student is a classifier: what they have in common beside their terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.data.labels import LabelReader
from cmapkd.data.templates import ClassPrompts
from cmapkd.data.types import Batch
from cmapkd.methods.card import ClassesConfig
from cmapkd.methods.dual import PictureMethod
from cmapkd.models import Classifier, DualEncoder, FrozenTeacher, Model
from cmapkd.models.classifier import AnswerRule, ClassHeadConfig
from cmapkd.models.reach import example_output, last_matrix_behind

LABELS_HEAD, TEACHER_HEAD = "labels", "teacher"
"""Heads by what they learn from."""


class ClassifyingConfig(ClassesConfig):
    """What all methods over classifiers can set."""

    label_share: float = Field(
        1.0, ge=0, le=1, description="Share of the labelled samples whose label is read; the others are unlabelled."
    )


class ClassifierMethod(PictureMethod):
    """A method whose student is a `Classifier`, and whose teacher an image-text model with the classes' texts."""

    reads: ClassVar[type[Model]] = Classifier
    learns_from: ClassVar[type[Model] | None] = DualEncoder
    scratch: ClassVar[str] = "supervised"
    steady = True
    student: Classifier  # type: ignore[assignment]  # it is encoded in the same way

    def __init__(
        self,
        config: ClassifyingConfig,
        *,
        student: Classifier,
        teacher: FrozenTeacher | None = None,
        more_teachers: Sequence[FrozenTeacher] = (),
        classes: ClassPrompts | None = None,
    ) -> None:
        super().__init__(config, student=student, teacher=teacher, more_teachers=more_teachers)
        assert classes is not None
        self.classes, self.label_reader = classes, LabelReader(config.label_share, len(classes.names))

    def set_heads(self, heads: Mapping[str, ClassHeadConfig], rule: AnswerRule | None = None) -> None:
        """Gives the student its classes and heads.

        Raises:
            ConfigError: there are fewer than two classes, or the student has learned others.
        """
        try:
            self.student.set_heads(self.classes.names, heads, rule)
        except ValueError as error:
            raise ConfigError(f"student: {error}") from None

    @property
    def mix(self) -> tuple[float | None, float | None] | None:
        """α and β of the student's two heads, each None where validation data choose it; None where none is chosen."""
        return None

    def shared_parameters(self) -> Mapping[str, nn.Parameter]:
        """The last layer of the image tower, which all heads read."""
        name = last_matrix_behind(self.student, partial(example_output, self.student, "image"))
        return {name: dict(self.student.named_parameters())[name]}

    def features(self, batch: Batch) -> Float[Tensor, "batch width"]:
        """The student's features of all processes' samples."""
        return self.encode_student(batch).image.embedding

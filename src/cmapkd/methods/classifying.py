"""Methods whose student is a classifier: what they have in common beside their terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.data.batches import Extra
from cmapkd.data.labels import LabelReader
from cmapkd.data.templates import ClassPrompts
from cmapkd.data.types import Batch
from cmapkd.methods.card import MethodConfig
from cmapkd.methods.dual import LABELS, DualEncoderMethod
from cmapkd.models import Classifier, DualEncoder, FrozenTeacher, LevelRequest, Model
from cmapkd.models.classifier import AnswerRule, ClassHeadConfig
from cmapkd.models.reach import example_output, last_matrix_behind
from cmapkd.models.types import Tower

_IMAGE: tuple[Tower, ...] = ("image",)
LABELS_HEAD, TEACHER_HEAD = "labels", "teacher"
"""Heads by what they learn from."""


class ClassifyingConfig(MethodConfig):
    """What all methods over classifiers can set."""

    label_share: float = Field(
        1.0, ge=0, le=1, description="Share of the labelled samples whose label is read; the others are unlabelled."
    )

    @property
    def reads_classes(self) -> bool:
        return True

    @property
    def reads_captions(self) -> bool:
        return False


class ClassifierMethod(DualEncoderMethod):
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
        self.label_share, self.classes = config.label_share, classes

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

    @property
    def extras(self) -> Mapping[str, Extra]:
        return {**super().extras, LABELS: LabelReader(self.label_share, len(self.classes.names))}

    @property
    def student_needs(self) -> LevelRequest:
        return LevelRequest(towers=_IMAGE)

    @property
    def teacher_needs(self) -> LevelRequest:
        return LevelRequest(towers=_IMAGE)

    def shared_parameters(self) -> Mapping[str, nn.Parameter]:
        """The last layer of the image tower, which all heads read."""
        name = last_matrix_behind(self.student, partial(example_output, self.student, "image"))
        return {name: dict(self.student.named_parameters())[name]}

    def features(self, batch: Batch) -> Float[Tensor, "batch width"]:
        """The student's features of all processes' samples."""
        return self.encode_student(batch).image.embedding

"""One level of both image towers, cell by cell on the student's grid, for methods that compare patch tokens."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from cmapkd.features.level_pairs import LevelPairs
from cmapkd.features.taps import Layer
from cmapkd.methods.card import MethodConfig
from cmapkd.methods.dual import DualEncoderMethod
from cmapkd.models import DualEncoder, Features, LevelInfo, LevelRequest


class TokenLayers(MethodConfig):
    """Which levels of the image towers are compared."""

    student_layer: Layer = Field(
        1.0, description="The student's image level: its name (blocks.3), or a share of the depth. 1: the last."
    )
    teacher_layer: Layer = Field(1.0, description="The teacher's image level, likewise.")


class ImageTokens:
    """The pair of levels that the settings name.

    Raises:
        ValueError: a tower exposes no level, or none of that name.
    """

    def __init__(self, config: TokenLayers, *, student: DualEncoder, teacher: DualEncoder) -> None:
        self._pairs = LevelPairs(student, teacher, {"image": (config.student_layer, config.teacher_layer)})

    @property
    def student(self) -> LevelInfo:
        return self._pairs.student["image"]

    @property
    def teacher(self) -> LevelInfo:
        return self._pairs.teacher["image"]

    @property
    def widths(self) -> tuple[int, int]:
        """Channels of the student's and of the teacher's level."""
        return self._pairs.widths("image")

    @property
    def student_needs(self) -> LevelRequest:
        return self._pairs.needs("student")

    @property
    def teacher_needs(self) -> LevelRequest:
        return self._pairs.needs("teacher")

    def cells(
        self, student: Features, teacher: Features
    ) -> tuple[Float[Tensor, "batch cells width"], Float[Tensor, "batch cells teacher_width"]]:
        """Both levels row by row, without prefix tokens; the teacher's resampled to the student's grid, detached."""
        ours, theirs, _ = self._pairs.cells(student, teacher)
        return ours, theirs


class TokenMethod(DualEncoderMethod):
    """A method of which some terms read the pair of levels, and the others embeddings alone."""

    token_terms: ClassVar[tuple[str, ...]]
    """Those that read the levels."""
    levels: ImageTokens

    @property
    def reads_tokens(self) -> bool:
        """Whether the stage wants a term that reads the levels."""
        return any(self.wants(name) for name in self.token_terms)

    @property
    def student_needs(self) -> LevelRequest:
        return self.levels.student_needs if self.reads_tokens else LevelRequest()

    @property
    def teacher_needs(self) -> LevelRequest:
        return self.levels.teacher_needs if self.reads_tokens else LevelRequest()

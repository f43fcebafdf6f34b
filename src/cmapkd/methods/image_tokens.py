"""One level of both image towers, cell by cell on the student's grid, for methods that compare patch tokens."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from pydantic import Field, field_validator
from torch import Tensor

from cmapkd.features.pyramid import grid_of, level_grid
from cmapkd.features.taps import level_at
from cmapkd.methods.card import MethodConfig
from cmapkd.models import DualEncoder, Features, LevelRequest


class TokenLayers(MethodConfig):
    """Which levels of the image towers are compared."""

    student_layer: str | float = Field(
        1.0, description="The student's image level: its name (blocks.3), or a share of the depth. 1: the last."
    )
    teacher_layer: str | float = Field(1.0, description="The teacher's image level, likewise.")

    @field_validator("student_layer", "teacher_layer")
    @classmethod
    def _shares_are_shares(cls, value: Any) -> Any:
        if isinstance(value, float) and not 0 < value <= 1:
            raise ValueError(f"{value:g} is no share of the depth: give a number in (0, 1], or a level's name")
        return value


class ImageTokens:
    """The pair of levels that the settings name.

    Raises:
        ValueError: a tower exposes no level, or none of that name.
    """

    def __init__(self, config: TokenLayers, *, student: DualEncoder, teacher: DualEncoder) -> None:
        self.student = level_at(student.image_levels, config.student_layer, tower="image")
        self.teacher = level_at(teacher.image_levels, config.teacher_layer, tower="image")

    @property
    def widths(self) -> tuple[int, int]:
        """Channels of the student's and of the teacher's level."""
        return self.student.width, self.teacher.width

    @property
    def student_needs(self) -> LevelRequest:
        return LevelRequest((self.student.name,))

    @property
    def teacher_needs(self) -> LevelRequest:
        return LevelRequest((self.teacher.name,))

    def cells(
        self, student: Features, teacher: Features
    ) -> tuple[Float[Tensor, "batch cells width"], Float[Tensor, "batch cells teacher_width"]]:
        """Both levels row by row, without prefix tokens; the teacher's resampled to the student's grid, detached."""
        ours, theirs = student.image.levels[self.student.name], teacher.image.levels[self.teacher.name]
        return level_grid(ours), level_grid(theirs, grid_of(ours)).detach()

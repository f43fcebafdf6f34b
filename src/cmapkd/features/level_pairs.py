"""One level of a student's towers and the one of its teacher's that it is compared with, at the same places."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Bool, Float
from torch import Tensor

from cmapkd.data.types import Batch
from cmapkd.features.hierarchy import token_level
from cmapkd.features.pyramid import grid_of, level_grid
from cmapkd.features.taps import level_at
from cmapkd.features.words import Role, WordAligner
from cmapkd.models import DualEncoder, Features, LevelInfo, LevelRequest
from cmapkd.models.types import Tower

Places = tuple[
    Float[Tensor, "batch places width"],
    Float[Tensor, "batch places teacher_width"],
    Bool[Tensor, "batch places"] | None,
]
"""The student's level, the teacher's, which is detached, and which places are real; None where all are."""


class LevelPairs:
    """The pair of levels that settings name for each tower.

    Args:
        layers: of each tower that is compared, the student's level and the teacher's, as `level_at` takes them.
    Raises:
        ValueError: a tower exposes no level, or none of that name.
    """

    def __init__(
        self, student: DualEncoder, teacher: DualEncoder, layers: Mapping[Tower, tuple[str | float, str | float]]
    ) -> None:
        self.student: dict[Tower, LevelInfo] = {}
        self.teacher: dict[Tower, LevelInfo] = {}
        for tower, (own, other) in layers.items():
            self.student[tower] = level_at(_levels(student, tower), own, tower=tower)
            self.teacher[tower] = level_at(_levels(teacher, tower), other, tower=tower)
        self.align_words = WordAligner()

    def widths(self, tower: Tower) -> tuple[int, int]:
        """Channels of the student's and of the teacher's level."""
        return self.student[tower].width, self.teacher[tower].width

    def needs(self, role: Role) -> LevelRequest:
        """What a model must expose."""
        levels = self.student if role == "student" else self.teacher
        image, text = (tuple(info.name for tower, info in levels.items() if tower == of) for of in ("image", "text"))
        return LevelRequest(image, text)

    def cells(self, student: Features, teacher: Features) -> Places:
        """The image levels row by row, without prefix tokens; the teacher's resampled to the student's grid."""
        ours, theirs = (
            student.image.levels[self.student["image"].name],
            teacher.image.levels[self.teacher["image"].name],
        )
        return level_grid(ours), level_grid(theirs, grid_of(ours)).detach(), None

    def words(self, part: Batch, student: Features, teacher: Features) -> Places:
        """The text levels at the words that both tokenizers have in common.

        Args:
            part: of whose texts these are the features.
        """
        words = self.align_words(part.inputs["student"].texts, part.inputs["teacher"].texts)
        ours, theirs = student.text.levels[self.student["text"].name], teacher.text.levels[self.teacher["text"].name]
        values, mask = words.pool("student", token_level(ours)[0])
        return values, words.pool("teacher", token_level(theirs)[0])[0].detach(), mask


def _levels(model: DualEncoder, tower: Tower) -> tuple[LevelInfo, ...]:
    return tuple(model.image_levels if tower == "image" else model.text_levels)

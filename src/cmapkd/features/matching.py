"""Both models' levels at the same places: the student's projected, the teacher's as they are."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cmapkd.data.types import Batch
from cmapkd.features.hierarchy import (
    LanguageProjectors,
    phrases,
    sentence_level,
    token_level,
)
from cmapkd.features.key_tokens import KeyTokens, take_tokens
from cmapkd.features.pyramid import VisualProjectors, cells_at, pooled, target_grids, teacher_grids
from cmapkd.features.taps import (
    LANGUAGE_LEVELS,
    VISUAL_LEVELS,
    Depths,
    language_groups,
    tapped_groups,
    visual_groups,
)
from cmapkd.features.words import Role, WordAligner, Words
from cmapkd.models import DualEncoder, Features, Level, LevelInfo, LevelRequest

Places = Literal["dense", "key_tokens", "pooled"]
"""Where the inner levels are compared: everywhere, at the teacher's key tokens, or as one vector a level."""


_Groups = dict[str, tuple[LevelInfo, ...]]


@dataclass(frozen=True, slots=True)
class Matched:
    """One level of both models, place by place."""

    student: Float[Tensor, "batch places width"]  # in the teacher's width
    teacher: Float[Tensor, "batch places width"]
    mask: Bool[Tensor, "batch places"] | None  # None where every place is real


class LevelMatcher(nn.Module):
    """Reads the pyramid (P2 to P4) and the hierarchy (L1 to L3) of a pair of models; has the student's projectors.

    Args:
        levels: the inner levels that will be matched place by place; only these have projectors. Pooled vectors can be
            had of every level.
        grids, top_down: see `target_grids` and `VisualProjectors`; only where places are dense.
        places, key_tokens: where they are matched. At key tokens L2 is single words at its depth: a phrase would need
            the teacher's words beside them. L3 is one vector everywhere.
        phrase_window: words in a phrase of L2.
        depths: what an inner level is of its depth group: the last block's output, or the mean over the blocks'.
    Raises:
        ValueError: a tower exposes no levels, or key tokens are asked for of means, whose blocks each have their own.
    """

    def __init__(
        self,
        student: DualEncoder,
        teacher: DualEncoder,
        *,
        levels: Collection[str],
        grids: Literal["native"] | Mapping[str, float] = "native",
        top_down: bool = False,
        phrase_window: int = 3,
        places: Places = "dense",
        key_tokens: KeyTokens | None = None,
        depths: Depths = "last",
    ) -> None:
        super().__init__()
        if depths == "mean" and places == "key_tokens":
            raise ValueError(
                "a mean over blocks has no key tokens, each block has its own: take depths last, or places"
            )
        self.grids, self.phrase_window = grids, phrase_window
        self.places, self.key_tokens = places, key_tokens or KeyTokens()
        self.visual: dict[Role, _Groups] = {}
        self.language: dict[Role, _Groups] = {}
        models: dict[Role, DualEncoder] = {"student": student, "teacher": teacher}
        for role, model in models.items():
            groups = visual_groups(model.image_levels), language_groups(model.text_levels)
            if depths == "last":
                groups = _last(groups[0]), _last(groups[1])
            self.visual[role], self.language[role] = groups
        visual = [_ends(_only(groups, levels)) for groups in self.visual.values()]
        language = [_ends(_only(groups, levels)) for groups in self.language.values()]
        self.project_visual = VisualProjectors(*visual, top_down=top_down)
        self.project_language = LanguageProjectors(*language)
        self.align_words = WordAligner()

    @property
    def reads_words(self) -> bool:
        """Whether levels are matched at words, which two tokenizers have in common."""
        return self.places != "pooled" and not {"L1", "L2"}.isdisjoint(self.project_language.linear)

    def needs(self, role: Role, levels: Collection[str]) -> LevelRequest:
        """What the model must expose for these levels."""
        return LevelRequest(
            tuple(dict.fromkeys(info.name for group in _only(self.visual[role], levels).values() for info in group)),
            tuple(dict.fromkeys(info.name for group in _only(self.language[role], levels).values() for info in group)),
        )

    def widths(self, role: Role, levels: Collection[str]) -> tuple[dict[str, int], dict[str, int]]:
        """Channels of the inner visual and language levels among `levels`."""
        towers = self.visual[role], self.language[role]
        visual, language = (
            {name: info.width for name, info in _ends(_only(groups, levels)).items()} for groups in towers
        )
        return visual, language

    def match_visual(self, student: Features, teacher: Features, levels: Collection[str]) -> dict[str, Matched]:
        """P2, P3, P4 as far as asked for, on common grids; this process's samples only."""
        if self.places == "key_tokens":
            teacher = self.key_tokens.of(teacher)
        student_levels, teacher_levels = (
            self._taken("student", student, levels)[0],
            self._taken("teacher", teacher, levels)[0],
        )
        if self.places != "dense":
            taken = {name: self._at(level, teacher_levels[name]) for name, level in student_levels.items()}
            mapped = self.project_visual.map_cells({name: cells for name, (cells, _) in taken.items()})
            return {name: Matched(mapped[name], target, None) for name, (_, target) in taken.items()}
        grids = target_grids(student_levels, self.grids)
        projected, targets = self.project_visual(student_levels, grids), teacher_grids(teacher_levels, grids)
        return {name: Matched(projected[name], targets[name], None) for name in student_levels}

    def match_language(
        self, batch: Batch, student: Features, teacher: Features, levels: Collection[str]
    ) -> dict[str, Matched]:
        """L1, L2, L3 as far as asked for, at common words, phrases and the sentence; this process's samples only.

        Raises:
            ValueError: L1 or L2 is asked for, the tokens differ, and a tokenizer gives no character spans.
        """
        if self.places == "key_tokens":
            teacher = self.key_tokens.of(teacher)
        student_levels, teacher_levels = (
            self._taken("student", student, levels)[1],
            self._taken("teacher", teacher, levels)[1],
        )
        words: Words | None = None
        if {"L1", "L2"} & student_levels.keys() and self.places != "pooled":
            words = self.align_words(batch.inputs["student"].texts, batch.inputs["teacher"].texts)

        def places(role: Role, name: str, level: Level) -> tuple[Tensor, Tensor | None]:
            if words is None or name == "L3":
                return sentence_level(level)[:, None], None
            if self.places == "key_tokens":
                numbers = _words_at(words.teacher, teacher_levels[name])
                if role == "teacher":
                    return level.values, numbers >= 0
                return take_tokens(words.pool(role, token_level(level)[0])[0], numbers.clamp_min(0)), None
            values, mask = words.pool(role, token_level(level)[0])
            return (values, mask) if name == "L1" else phrases(values, mask, window=self.phrase_window)

        student_places = {name: places("student", name, level) for name, level in student_levels.items()}
        projected = self.project_language({name: values for name, (values, _) in student_places.items()})
        return {
            name: Matched(projected[name], *places("teacher", name, teacher_levels[name])) for name in student_levels
        }

    def _at(
        self, student: Level, teacher: Level
    ) -> tuple[Float[Tensor, "batch places width"], Float[Tensor, "batch places teacher_width"]]:
        """The student's level at the teacher's key tokens, or both as one place, the mean."""
        if self.places == "pooled":
            return pooled(student)[:, None], pooled(teacher)[:, None]
        assert teacher.places is not None
        assert teacher.grid is not None
        return cells_at(student, teacher.places, teacher.grid), teacher.values

    def pooled(
        self, role: Role, features: Features, levels: Collection[str]
    ) -> dict[str, Float[Tensor, "batch width"]]:
        """One vector a sample for each of `levels`, P5 and L4 (the embeddings) included; this process's samples."""
        visual, language = self._taken(role, features, levels)
        vectors = {name: pooled(level) for name, level in (visual | language).items()}
        tops = {"P5": features.image.embedding, "L4": features.text.embedding}
        vectors |= {name: embedding for name, embedding in tops.items() if name in levels}
        return {name: vectors[name] for name in (*VISUAL_LEVELS, *LANGUAGE_LEVELS) if name in vectors}

    def _taken(
        self, role: Role, features: Features, levels: Iterable[str]
    ) -> tuple[dict[str, Level], dict[str, Level]]:
        towers = (self.visual[role], features.image.levels), (self.language[role], features.text.levels)
        visual, language = (tapped_groups(_only(groups, levels), levels_of_tower) for groups, levels_of_tower in towers)
        return visual, language


def _words_at(word_of_token: Int[Tensor, "batch tokens"], level: Level) -> Int[Tensor, "batch places"]:
    """The word that each of the teacher's key tokens belongs to, -1 where to none."""
    assert level.places is not None
    return word_of_token.gather(1, level.places.clamp_min(0)).masked_fill(level.places < 0, -1)


def _only(groups: _Groups, levels: Iterable[str]) -> _Groups:
    wanted = set(levels)
    return {name: group for name, group in groups.items() if name in wanted}


def _last(groups: _Groups) -> _Groups:
    return {name: group[-1:] for name, group in groups.items()}


def _ends(groups: _Groups) -> dict[str, LevelInfo]:
    """The level with which each group ends; all of a group have its width."""
    return {name: group[-1] for name, group in groups.items()}

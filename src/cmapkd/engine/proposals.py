"""What is asked of a picture: the data's own questions, or what a model asks itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Self

from pydantic import Field, model_validator

from cmapkd.config import Config
from cmapkd.data.records import Unusable, check_caption
from cmapkd.data.types import Sample
from cmapkd.engine.candidates import PARSED, READABLE, Candidate
from cmapkd.engine.written import AskConfig, Panel

_QUESTION = re.compile(r"Question:\s*(.*?)\?", re.IGNORECASE)
_ANSWER = re.compile(r"Answer:\s*(.*)", re.IGNORECASE)
PROPOSAL = "proposal"
"""Names the draws of proposals. Draws of answers bear names of the recipe, behind `answers.`."""


class QuestionsConfig(AskConfig):
    """The data's own questions. Their answers are never read: a model gives the answer that would be written."""


class WritingConfig(AskConfig):
    """A model writes question and answer itself, as `Question: ...?` and `Answer: ...`."""

    instruction: str = Field(min_length=1, description="What the model is told.")
    number: int = Field(1, ge=1, le=64, description="Questions to each picture; several need a temperature.")

    @model_validator(mode="after")
    def _several_differ(self) -> Self:
        if self.number > 1 and self.temperature == 0:
            raise ValueError(f"{self.number} questions at temperature 0 are all the same: set a temperature above 0")
        return self


class ProposeConfig(Config):
    """What is asked of each picture; exactly one of these is set."""

    questions: QuestionsConfig | None = Field(None, description="The data's own questions, answered by a model.")
    written: WritingConfig | None = Field(None, description="Questions with answers that a model writes.")

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            known = ", ".join(type(self).model_fields)
            raise ValueError(f"set exactly one of {known}, not {', '.join(given) or 'none'}")
        return self

    @property
    def kind(self) -> QuestionsConfig | WritingConfig:
        """The one that is set."""
        found = self.questions or self.written
        assert found is not None
        return found

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models that are asked."""
        return (self.kind.by,)

    @property
    def has_answers(self) -> bool:
        """Whether candidates begin with an answer."""
        return True

    @property
    def has_boxes(self) -> bool:
        """Whether candidates have regions."""
        return False


def propose(samples: Sequence[tuple[int, Sample]], config: ProposeConfig, panel: Panel) -> list[Candidate]:
    """The candidates of some samples, in the order of the samples.

    A proposal that lacks a question or an answer is there too, dropped as `parsed`; one that the model cannot read is
    dropped as `readable`.

    Args:
        samples: each with its place in the source.
    """
    if config.written is not None:
        return written(samples, config.written, panel)
    assert config.questions is not None
    return own_questions(samples, config.questions, panel)


def own_questions(samples: Sequence[tuple[int, Sample]], config: QuestionsConfig, panel: Panel) -> list[Candidate]:
    """Every question of the samples, with the model's answer."""
    found = [
        Candidate(sample, index, number, asked.question)
        for index, sample in samples
        for number, asked in enumerate(sample.questions)
        if asked.question
    ]
    for each, drafts in zip(found, panel.drafts(found, config, name=PROPOSAL), strict=True):
        each.answer = (drafts[0] if drafts else "") or None
        if each.answer is None:
            each.dropped = PARSED if drafts else READABLE
        elif not _is_text(each.answer):
            each.dropped = READABLE
    return found


def written(samples: Sequence[tuple[int, Sample]], config: WritingConfig, panel: Panel) -> list[Candidate]:
    """Questions and answers that the model writes; `parse` reads them."""
    found = [
        Candidate(sample, index, number, config.instruction)
        for index, sample in samples
        for number in range(config.number)
    ]
    for each, drafts in zip(found, panel.drafts(found, config, name=PROPOSAL), strict=True):
        each.question, each.answer = parse(drafts[0]) if drafts else ("", None)
        if not (each.question and each.answer):
            each.dropped = PARSED if drafts else READABLE
        elif not _is_text(each.question, each.answer):
            each.dropped = READABLE
    return found


def parse(text: str) -> tuple[str, str | None]:
    """The first question, up to its question mark, and the first answer, up to the end of its line; empty, or None.

    Source: scripts/PA/PA.py of vl2g/MPA@4e69e39, whose patterns these are. There the question loses its mark.
    """
    question, answer = _QUESTION.search(text), _ANSWER.search(text)
    asked = question[1].strip() if question else ""
    return f"{asked}?" if asked else "", answer[1].strip() or None if answer else None


def _is_text(*texts: str) -> bool:
    """Whether the sources of cmapkd would read these texts again."""
    try:
        for text in texts:
            check_caption(text)
    except Unusable:
        return False
    return True

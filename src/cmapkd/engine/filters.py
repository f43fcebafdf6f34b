"""What is kept of the candidates: small functions of a candidate's answers, each with its settings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from cmapkd.config import Config
from cmapkd.engine.candidates import Candidate
from cmapkd.evaluation.vqa import normalise_answer

_BLANKS, _OTHER_SIGNS = re.compile(r"\s+"), re.compile(r"\W+")

Match = Literal["contained", "equal"]
_ABOUT_MATCH = (
    "contained: the answer's letters and digits stand in the model's, as published; equal: both are the same answer by "
    "the rules of VQA v2."
)


class ParityConfig(Config):
    """Kept where the large model gives the candidate's answer and the small one does not.

    Source: MPA (EMNLP 2025), `Parity_Identifier` of vl2g/MPA@4e69e39.
    """

    right: str = Field(description="A name under answers: those of the large model.")
    wrong: str = Field(description="A name under answers: those of the small model.")
    match: Match = Field("contained", description=_ABOUT_MATCH)


class RightConfig(Config):
    """Kept where a model gives the candidate's answer: one half of parity, or a check of the answer by itself."""

    answers: str = Field(description="A name under answers.")
    match: Match = Field("contained", description=_ABOUT_MATCH)


class FilterConfig(Config):
    """One filter; exactly one of these is set."""

    parity: ParityConfig | None = Field(None, description="The large model is right, and the small one is wrong.")
    right: RightConfig | None = Field(None, description="A model is right.")

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            known = ", ".join(type(self).model_fields)
            raise ValueError(f"set exactly one of {known}, not {', '.join(given) or 'none'}")
        return self

    @property
    def kind(self) -> str:
        """Which one is set."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def answers(self) -> tuple[str, ...]:
        """Names of the answers that it reads."""
        if self.parity is not None:
            return (self.parity.right, self.parity.wrong)
        assert self.right is not None
        return (self.right.answers,)

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models that it asks itself."""
        return ()

    @property
    def gives_answers(self) -> bool:
        """Whether it gives candidates the answer that would be written."""
        return False


def verify(candidates: Sequence[Candidate], config: FilterConfig, label: str) -> None:
    """Drops those of `candidates` that the filter does not keep; its answers are there."""
    for each in candidates:
        if not _keeps(each, config):
            each.dropped = label


def _keeps(candidate: Candidate, config: FilterConfig) -> bool:
    answer = candidate.answer or ""
    if config.parity is not None:
        own = config.parity
        return parity(answer, candidate.answers[own.right][0], candidate.answers[own.wrong][0], match=own.match)
    assert config.right is not None
    return says(candidate.answers[config.right.answers][0], answer, match=config.right.match)


def parity(answer: str, large: str, small: str, *, match: Match = "contained") -> bool:
    """Whether the large model's text says the answer and the small one's does not."""
    return says(large, answer, match=match) and not says(small, answer, match=match)


def says(text: str, answer: str, *, match: Match) -> bool:
    """Whether a model's text says an answer; an answer without letters and digits is said by every text."""
    if match == "equal":
        return normalise_answer(text) == normalise_answer(answer)
    return letters(answer) in letters(text)


def letters(text: str) -> str:
    """Lower case, without blanks and signs; an underscore stays.

    Source: `preprocess` of vl2g/MPA@4e69e39, scripts/utils/utils.py.
    """
    return _OTHER_SIGNS.sub("", _BLANKS.sub("", text.lower()))

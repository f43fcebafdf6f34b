"""What is asked of a picture: the data's own questions, or what a model asks itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Self

from pydantic import Field, field_validator, model_validator

from cmapkd.config import Config
from cmapkd.data.types import Sample
from cmapkd.engine.candidates import PARSED, READABLE, REPEATED, Candidate, Corners, kept
from cmapkd.engine.one_of import OneOf
from cmapkd.engine.programs import ProgramsConfig, programs
from cmapkd.engine.regions import regions_of
from cmapkd.engine.written import AskConfig, Panel, check_place
from cmapkd.evaluation.vqa import normalise_answer

_QUESTION = re.compile(r"Question:\s*(.*?)\?", re.IGNORECASE)
_ANSWER = re.compile(r"Answer:\s*(.*)", re.IGNORECASE)
PROPOSAL = "proposal"
"""Names the draws of proposals. Draws of answers bear names of the recipe, behind `answers.`."""


class QuestionsConfig(AskConfig):
    """The data's own questions. A model gives the answer that would be written; the data's are for `label` alone."""


class SelfAskedConfig(AskConfig):
    """A model writes question and answer itself, as `Question: ...?` and `Answer: ...`."""

    instruction: str = Field(min_length=1, description="What the model is told.")
    number: int = Field(1, ge=1, le=64, description="Questions to each picture; several need a temperature.")

    @model_validator(mode="after")
    def _several_differ(self) -> Self:
        if self.number > 1 and self.temperature == 0:
            raise ValueError(f"{self.number} questions at temperature 0 are all the same: set a temperature above 0")
        return self


class RelationConfig(Config):
    """One kind of fact: what is asked, and how an answer, the tail, becomes a statement."""

    question: str = Field(min_length=1, description="What the model is asked.")
    statement: str = Field(min_length=1, description="A sentence with {} in the place of the answer.")
    tails: tuple[str, ...] = Field((), description="Usual answers, which a critic of two towers compares.")

    @field_validator("statement")
    @classmethod
    def _has_one_place(cls, value: str) -> str:
        return check_place(value, "statement", "answer")

    def states(self, tail: str) -> str:
        """The answer as a sentence."""
        return self.statement.replace("{}", tail)


class FactsConfig(AskConfig):
    """Facts of each picture, or of its regions: the different answers that a model draws for each relation."""

    relations: dict[str, RelationConfig] = Field(min_length=1, description="Name -> a kind of fact.")
    drafts: int = Field(
        4, ge=1, le=64, description="Answers that are drawn for each relation; equal ones are one fact."
    )
    regions: bool = Field(False, description="Facts are of small regions, as those of crops; or of whole pictures.")
    most_area: float = Field(0.1, gt=0, le=1, description="Regions of this share of the picture and more are left out.")

    @model_validator(mode="after")
    def _drafts_differ(self) -> Self:
        if self.drafts > 1 and self.temperature == 0:
            raise ValueError(f"{self.drafts} drafts at temperature 0 are all the same: set a temperature above 0")
        return self

    @model_validator(mode="after")
    def _regions_are_shown(self) -> Self:
        if self.regions and self.sees == "whole":
            raise ValueError("regions: true asks about each region, and sees: whole shows none: set sees crop or boxed")
        if not self.regions and self.changed("most_area"):
            raise ValueError(f"most_area: {self.most_area:g} limits regions, and regions is false: leave most_area out")
        return self


class CropsConfig(Config):
    """Questions about the regions of the data's boxes: small ones, whose name no other box of the picture bears."""

    questions: tuple[str, ...] = Field((), description="Asked of every region; or none, where a model writes them.")
    written: SelfAskedConfig | None = Field(None, description="A model writes the questions; what it sees is its own.")
    most_area: float = Field(0.1, gt=0, le=1, description="Regions of this share of the picture and more are left out.")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if bool(self.questions) == (self.written is not None):
            raise ValueError("give questions, or written: a model that writes them; not both")
        return self


class ProposeConfig(OneOf):
    """What is asked of each picture; exactly one of these is set."""

    questions: QuestionsConfig | None = Field(None, description="The data's own questions, answered by a model.")
    written: SelfAskedConfig | None = Field(None, description="Questions with answers that a model writes.")
    facts: FactsConfig | None = Field(None, description="Facts: relations that a model completes.")
    crops: CropsConfig | None = Field(None, description="Questions about small regions. No answers yet.")
    programs: ProgramsConfig | None = Field(None, description="Questions that are answered in steps.")

    @property
    def asks(self) -> dict[str, AskConfig]:
        """How models are asked, by the key of the settings."""
        if self.programs is not None:
            return {f"propose.programs.tools.{name}": each for name, each in self.programs.tools.items()}
        one = self.questions or self.written or self.facts or (self.crops.written if self.crops else None)
        return {} if one is None else {"propose": one}

    @property
    def regions(self) -> bool:
        """Whether each candidate is about a region."""
        return self.crops is not None or (self.facts is not None and self.facts.regions)

    @property
    def needs(self) -> tuple[str, ...]:
        """What of the samples it cannot do without: `questions`, `boxes`; nothing: pictures alone."""
        programs = self.programs
        asked = self.questions is not None or (programs is not None and programs.asks_the_datas)
        looks = self.regions or (programs is not None and programs.looks)
        return (*(("questions",) if asked else ()), *(("boxes",) if looks else ()))

    def takes(self, question: str) -> bool:
        """Whether a question of the data is asked at all."""
        return bool(question) and (self.programs is None or self.programs.kind_of(question) is not None)


def propose(samples: Sequence[tuple[int, Sample]], config: ProposeConfig, panel: Panel) -> list[Candidate]:
    """The candidates of some samples, in the order of the samples.

    A proposal that lacks a question or an answer is there too, dropped as `parsed`; one that the model cannot read is
    dropped as `readable`. What a model writes a second time of the same picture is dropped as `repeated`.

    Args:
        samples: each with its place in the source.
    """
    if config.written is not None:
        return written(samples, config.written, panel)
    if config.facts is not None:
        return facts(samples, config.facts, panel)
    if config.crops is not None:
        return crops(samples, config.crops, panel)
    if config.programs is not None:
        return programs(samples, config.programs, panel)
    assert config.questions is not None
    return own_questions(samples, config.questions, panel)


def own_questions(samples: Sequence[tuple[int, Sample]], config: QuestionsConfig, panel: Panel) -> list[Candidate]:
    """Every question of the samples, with the model's answer."""
    found = [
        Candidate(sample, index, number, asked.question, relation=asked.kind, accepted=asked.answers)
        for index, sample in samples
        for number, asked in enumerate(sample.questions)
        if asked.question
    ]
    for each, drafts in zip(found, panel.drafts(found, config, name=PROPOSAL), strict=True):
        each.answer = (drafts[0] if drafts else "") or None
        if each.answer is None:
            each.dropped = PARSED if drafts else READABLE
        elif not panel.readable(each.answer):
            each.dropped = READABLE
    return found


def written(samples: Sequence[tuple[int, Sample]], config: SelfAskedConfig, panel: Panel) -> list[Candidate]:
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
        elif not panel.readable(each.question, each.answer):
            each.dropped = READABLE
    _drop_repeated(found)
    return found


def facts(samples: Sequence[tuple[int, Sample]], config: FactsConfig, panel: Panel) -> list[Candidate]:
    """The different facts among the drafts of each relation, in the order in which they were drawn."""
    asked: list[Candidate] = []
    for index, sample in samples:
        places: Sequence[Corners | None] = regions_of(sample, config.most_area) if config.regions else (None,)
        pairs = [(box, name, each) for box in places for name, each in config.relations.items()]
        asked += [
            Candidate(sample, index, number, relation.question, relation=name, box=box)
            for number, (box, name, relation) in enumerate(pairs)
        ]
    found: list[Candidate] = []
    number = {sample.id: 0 for _, sample in samples}
    for each, drafts in zip(asked, panel.drafts(asked, config, name=PROPOSAL, number=config.drafts), strict=True):
        relation = config.relations[str(each.relation)]
        if not drafts:
            found.append(replace(each, number=number[each.sample.id], dropped=READABLE))
            number[each.sample.id] += 1
        different: dict[str, str] = {}
        for draft in drafts:
            different.setdefault(normalise_answer(draft), draft)
        for tail in different.values():
            fact = replace(each, number=number[each.sample.id], answers={}, scores={})
            number[each.sample.id] += 1
            found.append(fact)
            if not normalise_answer(tail) or not panel.readable(tail):
                fact.dropped = READABLE if normalise_answer(tail) else PARSED
                continue
            fact.answer, fact.statement = tail, relation.states(tail)
            fact.alternatives = tuple(map(relation.states, relation.tails))
    return found


def crops(samples: Sequence[tuple[int, Sample]], config: CropsConfig, panel: Panel) -> list[Candidate]:
    """Questions about every small region whose name is the only one of its picture."""
    found: list[Candidate] = []
    for index, sample in samples:
        asked = [config.written.instruction] * config.written.number if config.written else config.questions
        regions = [(box, question) for box in regions_of(sample, config.most_area) for question in asked]
        found += [Candidate(sample, index, place, asks, box=box) for place, (box, asks) in enumerate(regions)]
    if config.written is not None:
        for each, drafts in zip(found, panel.drafts(found, config.written, name=PROPOSAL), strict=True):
            each.question = parse(drafts[0])[0] if drafts else ""
            if not each.question or not panel.readable(each.question):
                each.dropped = PARSED if drafts else READABLE
        _drop_repeated(found)
    return found


def _drop_repeated(candidates: Sequence[Candidate]) -> None:
    """Drops what a model wrote before of the same picture or region: equal questions with equal answers."""
    seen: set[tuple[object, ...]] = set()
    for each in kept(candidates):
        key = (each.index, each.box, normalise_answer(each.question), normalise_answer(each.answer or ""))
        if key in seen:
            each.dropped = REPEATED
        seen.add(key)


def parse(text: str) -> tuple[str, str | None]:
    """The first question, up to its question mark, and the first answer, up to the end of its line; empty, or None.

    Source: scripts/PA/PA.py of vl2g/MPA@4e69e39, whose patterns these are. There the question loses its mark.
    """
    question, answer = _QUESTION.search(text), _ANSWER.search(text)
    asked = question[1].strip() if question else ""
    return f"{asked}?" if asked else "", answer[1].strip() or None if answer else None

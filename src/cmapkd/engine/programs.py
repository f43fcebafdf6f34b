"""Programs: questions that are answered in steps, in several ways, with the steps as a rationale."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from pydantic import Field, field_validator, model_validator

from cmapkd.config import Config, closest
from cmapkd.data.random import key_of
from cmapkd.data.types import Sample
from cmapkd.engine.candidates import PARSED, READABLE, Candidate, Corners
from cmapkd.engine.regions import regions_of
from cmapkd.engine.steps import StepConfig, StepError, Thing, Value, filled, names_in
from cmapkd.engine.written import AskConfig, Panel

_Asked = tuple[str, int, Corners | None, str]  # tool, index of the sample, region, question


class WayConfig(Config):
    """One program: steps that follow one another. The text of the last one is the answer."""

    steps: dict[str, StepConfig] = Field(min_length=1, description="Name -> a step, in their order.")
    rationale: str | None = Field(
        None, min_length=1, description="How the answer was found, with names of steps in braces."
    )

    def problems(self, known: Iterable[str], tools: Mapping[str, AskConfig]) -> Iterable[str]:
        """What is wrong with it, in words.

        Args:
            known: names of texts that are there before the first step.
        """
        texts = set(known)
        things: dict[str, frozenset[str]] = {}  # step -> attributes
        for name, step in self.steps.items():
            yield from _misread(name, step, texts, things)
            if step.tool is not None:
                yield from _misused(name, step, tools)
            attribute = getattr(getattr(step, step.kind), "attribute", None)
            had = [things[each] for each in step.things if each in things]
            if attribute is not None and had and attribute not in had[0]:
                yield f"{name} reads the attribute {attribute!r}; there are {', '.join(sorted(had[0]))}"
            if name in texts or name in things:
                yield f"{name} is the name of something else: choose another"
            if step.gives == "text":
                texts.add(name)
            else:
                things[name] = frozenset(step.look.questions) if step.look else (had or [frozenset[str]()])[0]
        if name in things:
            yield f"{name}, the last step, gives things and no answer: count them, or get an attribute"
        for each in names_in(self.rationale or ""):
            if each not in texts | things.keys():
                yield f"rationale names {each!r}{closest(each, texts | things.keys())}, which is no step"


class KindConfig(Config):
    """One kind of question, the data's own or a new one, and the ways to answer it."""

    asked: str | None = Field(
        None, description="A regular expression that fits whole questions of the data. Its named groups are texts."
    )
    question: str | None = Field(None, min_length=1, description="A new question, asked of every picture.")
    ways: dict[str, WayConfig] = Field(min_length=1, description="Name -> a program. Each makes a candidate.")

    @field_validator("asked")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            groups = re.compile(value or "").groupindex
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"asked is no regular expression: {error}") from None
        if "question" in groups:
            raise ValueError("asked has a group named question, which is the whole question: choose another name")
        return value

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.asked is None) == (self.question is None):
            raise ValueError("give asked, of the data's questions, or question, a new one; not both")
        return self

    @property
    def groups(self) -> tuple[str, ...]:
        return ("question", *re.compile(self.asked or "").groupindex)


class ProgramsConfig(Config):
    """Questions that programs answer: tools are asked in steps, and the answers are counted and compared.

    The first kind whose `asked` fits a question of the data answers it. Each way makes a candidate with its own answer.
    Regions are the data's boxes; their names are not read.
    """

    tools: dict[str, AskConfig] = Field(min_length=1, description="Name -> a model, and what it sees.")
    kinds: dict[str, KindConfig] = Field(min_length=1, description="Name -> a kind of question.")

    @model_validator(mode="after")
    def _sound(self) -> Self:
        found = [
            f"kinds.{kind}.ways.{name}: {problem}"
            for kind, each in self.kinds.items()
            for name, way in each.ways.items()
            for problem in way.problems(each.groups, self.tools)
        ]
        steps = [step for each in self.kinds.values() for way in each.ways.values() for step in way.steps.values()]
        if unused := sorted(self.tools.keys() - {step.tool for step in steps}):
            found.append(f"no step asks the tools {', '.join(unused)}: leave them out")
        if found:
            raise ValueError("; ".join(found))
        return self

    @property
    def looks(self) -> bool:
        """Whether any step reads regions."""
        return any(
            step.look for kind in self.kinds.values() for way in kind.ways.values() for step in way.steps.values()
        )

    def kind_of(self, question: str) -> tuple[str, re.Match[str]] | None:
        """The first kind whose expression fits a question of the data, and how it fits."""
        for name, kind in self.kinds.items():
            found = re.fullmatch(kind.asked, question) if kind.asked is not None else None
            if found:
                return name, found
        return None

    @property
    def asks_the_datas(self) -> bool:
        """Whether it answers nothing but questions of the data."""
        return all(kind.asked is not None for kind in self.kinds.values())


def _misread(name: str, step: StepConfig, texts: set[str], things: Mapping[str, object]) -> Iterable[str]:
    for each in (named for template in step.templates for named in names_in(template)):
        if each not in texts:
            what = "gives things, no text" if each in things else f"is none{closest(each, texts)}"
            yield f"{name} names the text {each!r}, which {what} before it"
    for each in step.things:
        if each not in things:
            yield f"{name} reads the things of {each!r}{closest(each, things)}, which no step before it gives"


def _misused(name: str, step: StepConfig, tools: Mapping[str, AskConfig]) -> Iterable[str]:
    tool = str(step.tool)
    if tool not in tools:
        yield f"{name} asks the tool {tool!r}{closest(tool, tools)}; there are {', '.join(tools)}"
    elif (tools[tool].sees == "whole") == (step.look is not None):
        yield f"{name} is {step.kind}, and tools.{tool}.sees is {tools[tool].sees}: ask sees whole, look crop or boxed"


@dataclass
class _Run:
    """A program on its way: the candidate that it answers, and the values of its steps."""

    candidate: Candidate
    way: WayConfig
    values: dict[str, Value]
    regions: Sequence[Corners] = ()

    def asks(self, step: StepConfig) -> list[_Asked]:
        """What this step asks."""
        places: Sequence[Corners | None] = self.regions if step.look else (None,)
        questions = step.questions(self.values)
        if step.tool is not None and "" in [self.values[name] for each in step.templates for name in names_in(each)]:
            self.candidate.dropped = PARSED  # a tool found nothing, so there is nothing to ask further
            return []
        return [(str(step.tool), self.candidate.index, box, asked) for box in places for asked in questions]

    def take(self, name: str, step: StepConfig, asker: _Asker) -> None:
        """Adds the step's value, or drops the candidate."""
        said = [asker.said[each] for each in self.asks(step)]
        if self.candidate.dropped is not None:
            return
        if None in said:
            self.candidate.dropped = READABLE
            return
        texts = [str(each) for each in said]
        try:
            if step.ask:
                self.values[name] = texts[0]
            elif step.look:
                kinds, number = tuple(step.look.questions), len(step.look.questions)
                self.values[name] = tuple(
                    Thing(box, dict(zip(kinds, texts[place * number : (place + 1) * number], strict=True)))
                    for place, box in enumerate(self.regions)
                )
            else:
                self.values[name] = step.compute(self.values)
        except StepError:
            self.candidate.dropped = PARSED

    def finish(self, panel: Panel) -> None:
        """Gives the candidate its answer and rationale, or drops it."""
        each, last = self.candidate, self.values[next(reversed(self.way.steps))]
        assert isinstance(last, str)
        each.answer, each.rationale = last or None, filled(self.way.rationale or "", self.values) or None
        if not last or (self.way.rationale and each.rationale is None):
            each.dropped = PARSED
        elif not panel.readable(each.question, last, each.rationale or last):
            each.dropped = READABLE


@dataclass
class _Asker:
    """Tools, each asked once for the same thing: `said` has their answers, None where a text cannot be read."""

    tools: Mapping[str, AskConfig]
    panel: Panel
    samples: Mapping[int, Sample]
    said: dict[_Asked, str | None] = field(default_factory=dict)

    def ask(self, asked: Iterable[_Asked]) -> None:
        new = [each for each in dict.fromkeys(asked) if each not in self.said]
        for tool, how in self.tools.items():
            own = [each for each in new if each[0] == tool]
            # the number stands in the key of the draws: a draw is a function of question and region alone
            subs = [
                Candidate(self.samples[index], index, key_of(box, question), question, box=box)
                for _, index, box, question in own
            ]
            drafts = self.panel.drafts(subs, how, name=f"proposal.{tool}")
            for each, texts in zip(own, drafts, strict=True):
                readable = texts and (not texts[0] or self.panel.readable(texts[0]))
                self.said[each] = texts[0] if readable else None


def programs(samples: Sequence[tuple[int, Sample]], config: ProgramsConfig, panel: Panel) -> list[Candidate]:
    """A candidate for each way to each question; one whose program finds no answer is dropped.

    Of equal questions of a picture the first is answered.
    """
    runs = [run for index, sample in samples for run in _runs_of(index, sample, config)]
    asker = _Asker(config.tools, panel, dict(samples))
    for place in range(max((len(run.way.steps) for run in runs), default=0)):
        steps = [
            (run, *list(run.way.steps.items())[place])
            for run in runs
            if place < len(run.way.steps) and run.candidate.dropped is None
        ]
        asker.ask(each for run, _, step in steps for each in run.asks(step))
        for run, name, step in steps:
            run.take(name, step, asker)
    for run in runs:
        if run.candidate.dropped is None:
            run.finish(panel)
    return [run.candidate for run in runs]


def _runs_of(index: int, sample: Sample, config: ProgramsConfig) -> Iterable[_Run]:
    regions = regions_of(sample, most_area=math.inf, alone=False) if config.looks else []
    regions.sort(key=lambda box: (box[0] - box[2]) * (box[3] - box[1]))  # the largest first
    number = 0
    seen: set[str] = set()
    for question, accepted, kind, groups in _questions_of(sample, config):
        if question in seen:
            continue
        seen.add(question)
        for name, way in config.kinds[kind].ways.items():
            candidate = Candidate(sample, index, number, question, relation=kind, way=name, accepted=accepted)
            yield _Run(candidate, way, {"question": question, **groups}, regions)
            number += 1


def _questions_of(sample: Sample, config: ProgramsConfig) -> Iterable[tuple[str, tuple[str, ...], str, dict[str, str]]]:
    """Questions with the data's answers, the name of their kind, and the texts of its groups."""
    for asked in sample.questions:
        kind_of = config.kind_of(asked.question) if asked.question else None
        if kind_of is not None:
            name, found = kind_of
            groups = {group: text or "" for group, text in found.groupdict().items()}
            yield asked.question, asked.answers, name, groups
    for name, kind in config.kinds.items():
        if kind.question is not None:
            yield kind.question, (), name, {}

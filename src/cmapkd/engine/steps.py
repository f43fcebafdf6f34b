"""Steps of a program: what a tool is asked of a picture, and what is computed from the answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from cmapkd.config import Config
from cmapkd.engine.candidates import Corners
from cmapkd.engine.one_of import OneOf
from cmapkd.evaluation.vqa import normalise_answer

_NAMED = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class Thing:
    """A region of the picture, and what a tool says of it: attribute -> answer."""

    box: Corners
    attributes: Mapping[str, str]


Value = str | tuple[Thing, ...]
Gives = Literal["text", "things"]


class StepError(Exception):
    """A program has no answer: it looks for something that is not there."""


def names_in(template: str) -> tuple[str, ...]:
    """What stands in braces.

    Raises:
        ValueError: other braces.
    """
    if re.search(r"[{}]", _NAMED.sub("", template)):
        raise ValueError(f"{template!r} has braces that hold no name: write {{name}}, of a step or a group")
    return tuple(_NAMED.findall(template))


def filled(template: str, values: Mapping[str, Value]) -> str:
    """The template with values for its names. Things are told by their attributes, one after another."""
    return _NAMED.sub(lambda found: in_words(values[found[1]]), template)


def in_words(value: Value) -> str:
    """A text as it is; things as `red circle, blue star`, or `nothing`."""
    if isinstance(value, str):
        return value
    return ", ".join(" ".join(thing.attributes.values()) for thing in value) or "nothing"


class _Step(Config):
    """Kinds say which values they read: `templates` texts with names, `things` the names of steps that give things."""

    gives: ClassVar[Gives] = "text"

    @property
    def templates(self) -> tuple[str, ...]:
        return ()

    @property
    def things(self) -> tuple[str, ...]:
        return ()


class AskStep(_Step):
    """A tool is asked about the whole picture."""

    tool: str = Field(description="A name under tools.")
    question: str = Field(min_length=1, description="{name} is the text of an earlier step, or of a group of asked.")

    @property
    def templates(self) -> tuple[str, ...]:
        return (self.question,)


class LookStep(_Step):
    """A tool is asked about every region of the picture, which are the data's boxes without their names.

    Gives things, the largest one first.
    """

    gives: ClassVar[Gives] = "things"
    tool: str = Field(description="A name under tools, which sees crops or boxes.")
    questions: dict[str, str] = Field(min_length=1, description="Attribute -> what is asked of each region.")

    @property
    def templates(self) -> tuple[str, ...]:
        return tuple(self.questions.values())


class _OfThings(_Step):
    of: str = Field(description="An earlier step that gives things.")

    @property
    def things(self) -> tuple[str, ...]:
        return (self.of,)


class WhereStep(_OfThings):
    """Those of the things of which an attribute is equal to a text, by the rules of VQA v2."""

    gives: ClassVar[Gives] = "things"
    attribute: str = Field(description="As the tool was asked for it.")
    equals: str = Field(min_length=1, description="A text, with names in braces.")

    @property
    def templates(self) -> tuple[str, ...]:
        return (self.equals,)


class GetStep(_OfThings):
    """An attribute of the largest one of the things; without things there is no answer."""

    attribute: str = Field(description="As the tool was asked for it.")


class SideStep(_OfThings):
    """Whether the largest one of some things is on that side of the largest one of others: yes or no, by centres."""

    to: str = Field(description="An earlier step that gives the other things.")
    side: str = Field(min_length=1, description="left of, right of, above or below; or a name in braces.")

    @field_validator("side")
    @classmethod
    def _is_a_side(cls, value: str) -> str:
        if "{" not in value and value not in _SIDES:
            raise ValueError(f"{value!r} is no side; sides are {', '.join(_SIDES)}")
        return value

    @property
    def things(self) -> tuple[str, ...]:
        return (self.of, self.to)

    @property
    def templates(self) -> tuple[str, ...]:
        return (self.side,)


class SameStep(_Step):
    """Whether two texts are equal by the rules of VQA v2: yes or no."""

    first: str = Field(min_length=1, description="A text, with names in braces.")
    second: str = Field(min_length=1, description="The other one.")

    @property
    def templates(self) -> tuple[str, ...]:
        return (self.first, self.second)


class WordsStep(_Step):
    """Another word for a text, such as its plural; a text without one has no answer."""

    word: str = Field(min_length=1, description="A text, with names in braces.")
    becomes: dict[str, str] = Field(min_length=1, description="Text -> the word in its place.")

    @field_validator("becomes")
    @classmethod
    def _plain(cls, value: dict[str, str]) -> dict[str, str]:
        plain: dict[str, str] = {}
        for text, word in value.items():
            if plain.setdefault(normalise_answer(text), word) != word:
                raise ValueError(f"becomes gives {text!r} two words: {plain[normalise_answer(text)]!r} and {word!r}")
        return plain

    @property
    def templates(self) -> tuple[str, ...]:
        return (self.word,)


class StepConfig(OneOf):
    """One step of a program; exactly one of these is set."""

    ask: AskStep | None = Field(None, description="A text: what a tool answers about the picture.")
    look: LookStep | None = Field(None, description="Things: what a tool answers about each region.")
    where: WhereStep | None = Field(None, description="Things: some of those of an earlier step.")
    get: GetStep | None = Field(None, description="A text: an attribute of the largest one.")
    count: str | None = Field(None, description="A text: how many things an earlier step gives.")
    exists: str | None = Field(None, description="A text: yes where an earlier step gives things, or no.")
    side: SideStep | None = Field(None, description="A text: yes or no, of two places.")
    same: SameStep | None = Field(None, description="A text: yes or no, of two texts.")
    words: WordsStep | None = Field(None, description="A text: another word.")
    say: str | None = Field(None, min_length=1, description="A text of several: a template with names in braces.")

    @property
    def _own(self) -> Any:
        return getattr(self, self.kind)

    @property
    def tool(self) -> str | None:
        """The tool that is asked."""
        return getattr(self._own, "tool", None)

    @property
    def gives(self) -> Gives:
        """What its value is."""
        return getattr(self._own, "gives", "text")

    @property
    def templates(self) -> tuple[str, ...]:
        """Texts with names in braces that it reads."""
        return (self.say,) if self.say is not None else getattr(self._own, "templates", ())

    @property
    def things(self) -> tuple[str, ...]:
        """Names of the steps whose things it reads."""
        return (self._own,) if self.kind in ("count", "exists") else getattr(self._own, "things", ())

    def questions(self, values: Mapping[str, Value]) -> tuple[str, ...]:
        """What its tool is asked, of the picture or of each region; nothing where no tool is asked."""
        return tuple(filled(each, values) for each in self.templates) if self.tool is not None else ()

    def compute(self, values: Mapping[str, Value]) -> Value:
        """The value of a step that asks no tool.

        Args:
            values: of earlier steps, and of the groups of the question.
        Raises:
            StepError: there is none.
        """
        return _COMPUTES[self.kind](self._own, values)


def _things(name: str, values: Mapping[str, Value]) -> tuple[Thing, ...]:
    found = values[name]
    assert not isinstance(found, str)
    return found


def _largest(name: str, values: Mapping[str, Value]) -> Thing:
    found = _things(name, values)
    if not found:
        raise StepError(f"{name} is empty")
    return found[0]


def _where(step: WhereStep, values: Mapping[str, Value]) -> Value:
    wanted = normalise_answer(filled(step.equals, values))
    if not wanted:  # an article alone, or nothing: no attribute is meant
        return ()
    return tuple(
        each for each in _things(step.of, values) if normalise_answer(each.attributes[step.attribute]) == wanted
    )


def _side(step: SideStep, values: Mapping[str, Value]) -> Value:
    side = filled(step.side, values)
    if side not in _SIDES:
        raise StepError(f"{side!r} is no side")
    axis, sign = _SIDES[side]
    first, second = (_largest(name, values).box for name in (step.of, step.to))
    return _said(sign * (first[axis] + first[axis + 2] - second[axis] - second[axis + 2]) > 0)


def _same(step: SameStep, values: Mapping[str, Value]) -> Value:
    first, second = (normalise_answer(filled(each, values)) for each in (step.first, step.second))
    return _said(bool(first) and first == second)  # two tools that found nothing did not find the same


def _words(step: WordsStep, values: Mapping[str, Value]) -> Value:
    word = normalise_answer(filled(step.word, values))
    if word not in step.becomes:
        raise StepError(f"{word!r} has no other word")
    return step.becomes[word]


def _said(true: bool) -> str:
    return "yes" if true else "no"


_SIDES = MappingProxyType({"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)})
_COMPUTES: dict[str, Callable[[Any, Mapping[str, Value]], Value]] = {
    "where": _where,
    "get": lambda step, values: _largest(step.of, values).attributes[step.attribute],
    "count": lambda name, values: str(len(_things(name, values))),
    "exists": lambda name, values: _said(bool(_things(name, values))),
    "side": _side,
    "same": _same,
    "words": _words,
    "say": filled,
}

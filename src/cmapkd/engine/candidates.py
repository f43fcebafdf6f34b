"""A candidate: a question about a picture, who answered it how, and which filter dropped it; and what it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image, ImageDraw

from cmapkd.data.random import uniforms
from cmapkd.data.types import Sample

Shown = Literal["whole", "crop", "boxed"]
Corners = tuple[float, float, float, float]  # left, top, right, bottom, in pixels

PARSED, READABLE, REPEATED = "parsed", "readable", "repeated"
"""Names under which proposals are dropped: without question and answer, not to be read by a model, written before."""

NO_QUESTIONS = frozenset({PARSED, READABLE, REPEATED})
"""Dropped under these names, a candidate is no question of its own that a source could hold: no control draws it."""


@dataclass(slots=True)
class Candidate:
    """One question about one sample.

    Attributes:
        sample: the picture, and the id of its sample in the source.
        index: of the sample in the source.
        number: of the candidate among those of its sample.
        answer: what would be written; None where nobody answered yet.
        box: the region that the question is about.
        relation: what kind of fact or question it is, where there are kinds.
        statement: of a fact: the answer as a sentence.
        alternatives: statements with other answers, which a critic may compare it with.
        way: the program that answered it.
        rationale: how it was found.
        accepted: the data's own answers to its question, which the filter `label` alone reads.
        answers: drafts by the name under `answers` of the recipe.
        scores: that filters gave, by the filter's label.
        dropped: the label of the filter that dropped it; None: it is kept.
    """

    sample: Sample
    index: int
    number: int
    question: str
    answer: str | None = None
    box: Corners | None = None
    relation: str | None = None
    statement: str | None = None
    alternatives: tuple[str, ...] = ()
    way: str | None = None
    rationale: str | None = None
    accepted: tuple[str, ...] = ()
    answers: dict[str, list[str]] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    dropped: str | None = None

    @property
    def id(self) -> str:
        return f"{self.sample.id}#{self.number}"

    def picture(self, shown: Shown, margin: float = 0.0) -> Image.Image:
        """What a model sees of it.

        Args:
            margin: of a crop, see `AskConfig`.
        Raises:
            ValueError: the candidate has no region.
        """
        if shown == "whole":
            return self.sample.image
        if self.box is None:
            raise ValueError(f"candidate {self.id} has no region to show")
        if shown == "boxed":
            return boxed(self.sample.image, self.box)
        left, top, right, bottom = expanded(self.box, self.sample.image.size, margin)
        return self.sample.image.crop((int(left), int(top), -int(-right // 1), -int(-bottom // 1)))

    def plain(self) -> dict[str, Any]:
        """As JSON in a shard."""
        found = {
            "id": self.id,
            "sample": self.sample.id,
            "question": self.question,
            "answer": self.answer,
            "dropped": self.dropped,
            "relation": self.relation,
            "statement": self.statement,
            "way": self.way,
            "rationale": self.rationale,
            "box": None if self.box is None else list(self.box),
            "answers": self.answers,
            "scores": self.scores,
        }
        return {key: value for key, value in found.items() if value not in (None, {})} | {"dropped": self.dropped}


def expanded(box: Corners, size: tuple[int, int], share: float = 0.05) -> Corners:
    """A box that is larger on each side by a share of its own width and height, within the picture.

    Source: `expand_bbox` of inclusionAI/Zooming-without-Zooming@fdc0ba1, data_synthesis/create_answers.py.
    """
    left, top, right, bottom = box
    wide, high = (right - left) * share, (bottom - top) * share
    return max(0, left - wide), max(0, top - high), min(size[0], right + wide), min(size[1], bottom + high)


def boxed(image: Image.Image, box: Corners) -> Image.Image:
    """The picture with a red frame around a box that is a twentieth larger on each side.

    The published line is 5 pixels wide on pictures of 1,200 pixels and more. Here it is that share of the longer side,
    and a pixel at least.
    """
    drawn = image.copy()
    left, top, right, bottom = expanded(box, image.size)
    width = max(1, round(max(image.size) * 5 / 1200))
    corners = (left, top, min(right, image.size[0] - 1), min(bottom, image.size[1] - 1))
    ImageDraw.Draw(drawn).rectangle(corners, outline="red", width=width)
    return drawn


def elsewhere(box: Corners, size: tuple[int, int], *key: object) -> Corners:
    """A box of the same size at a place that is drawn by a key: the control of `boxed`."""
    left, top, right, bottom = box
    wide, high = right - left, bottom - top
    across, down = uniforms(2, "elsewhere", *key).tolist()
    x, y = across * (size[0] - wide), down * (size[1] - high)
    return x, y, x + wide, y + high


def kept(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no filter dropped."""
    return [each for each in candidates if each.dropped is None]


def noted(question: str, note: str) -> str:
    """A question with a note behind an empty line, where there is one."""
    return f"{question}\n\n{note}" if note else question

"""What sections of a page are made of. Texts are plain: the template escapes each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from markupsafe import Markup

Tone = Literal["", "good", "bad", "quiet"]


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table.

    Attributes:
        value: what the column is sorted by; None stands last.
        below: a second line, such as an interval.
    """

    text: str
    value: float | None = None
    below: str = ""
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A table whose first column names its rows."""

    kind: ClassVar[str] = "table"
    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    words: int = 1  # columns that hold words and stand left; the others hold numbers
    note: str = ""


@dataclass(frozen=True, slots=True)
class Paragraph:
    kind: ClassVar[str] = "paragraph"
    text: str
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Remarks:
    """A list of sentences."""

    kind: ClassVar[str] = "remarks"
    texts: Sequence[str]


@dataclass(frozen=True, slots=True)
class Figure:
    """A drawing, and the numbers that it shows as a table."""

    kind: ClassVar[str] = "figure"
    drawing: Markup
    caption: str
    numbers: Table | None = None
    legend: Sequence[tuple[int, str]] = ()  # number of the colour, name
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Figures:
    """Drawings beside each other."""

    kind: ClassVar[str] = "figures"
    figures: Sequence[Figure]


@dataclass(frozen=True, slots=True)
class Code:
    """Lines that are read or copied as they stand."""

    kind: ClassVar[str] = "code"
    lines: Sequence[str]
    caption: str = ""
    copy: bool = False


@dataclass(frozen=True, slots=True)
class Details:
    """Blocks behind a line that opens them."""

    kind: ClassVar[str] = "details"
    summary: str
    blocks: Sequence[Block]


@dataclass(frozen=True, slots=True)
class Picture:
    """A thumbnail as a data address, its size in pixels, and what is said of it to those who do not see it."""

    address: str
    width: int
    height: int
    description: str


@dataclass(frozen=True, slots=True)
class Answer:
    """One of the first answers of a model."""

    place: int
    right: bool | None  # None: nobody can tell, as of a description
    remark: str  # `right`, `wrong`, or what else is to be known
    text: str | None = None
    picture: Picture | None = None


@dataclass(frozen=True, slots=True)
class Answers:
    """One model's first answers to a query, and the rank of the right one."""

    model: str
    rank: str
    answers: Sequence[Answer]


@dataclass(frozen=True, slots=True)
class Card:
    """A query and what each model answers."""

    direction: str
    outcome: str
    id: str
    text: str | None
    picture: Picture | None
    models: Sequence[Answers]
    right: Picture | None = None  # the right picture, where no model shows it
    right_text: str | None = None
    right_title: str = "The right answer"


@dataclass(frozen=True, slots=True)
class Gallery:
    """Cards, with the directions and outcomes that they are filtered by: name -> label."""

    kind: ClassVar[str] = "gallery"
    directions: dict[str, str]
    outcomes: dict[str, str]
    cards: Sequence[Card]


Block = Table | Paragraph | Remarks | Figure | Figures | Code | Details | Gallery


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page with a heading."""

    id: str
    title: str
    blocks: Sequence[Block] = field(default=())

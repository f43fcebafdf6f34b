"""Retrievals to look at: where both models are right, one of them, or none, drawn by chance and not by beauty."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cmapkd.config import counted
from cmapkd.evaluation.embed import Embedded
from cmapkd.evaluation.retrieval import RanksBothWays, normalised_caption, rank_both_ways, shared_captions
from cmapkd.evaluation.subject import Subject
from cmapkd.report.blocks import Answer, Answers, Block, Card, Cell, Gallery, Paragraph, Picture, Table
from cmapkd.report.outcomes import ALONE, OUTCOMES
from cmapkd.report.plain import shortened
from cmapkd.report.thumbnails import SIDES, thumbnail
from cmapkd.report.watch import Watched, named

DIRECTIONS = {"t2i": "Caption finds picture", "i2t": "Picture finds caption"}
_SHOWN = 3  # answers of each model
_PICTURE_BYTES = 3_500_000  # of all thumbnails of a page


@dataclass(frozen=True, slots=True)
class _Drawn:
    direction: str
    outcome: str
    query: int


def gallery(watched: Watched, *, cards: int, seed: int, images: bool, captions: bool) -> list[Block]:
    """The gallery of a run: counts of all queries by outcome, and cards of some.

    Args:
        cards: of each outcome and direction; drawn by `seed`, then sorted by how far the models' ranks lie apart.
        images, captions: whether they are shown.
    """
    subjects = named(watched.subjects, "teacher", "student")
    seen = watched.seen
    if not len(seen.texts):
        return [Paragraph("These pictures have no captions, so nothing is retrieved.", "quiet")]
    pairs = _also_right(watched)
    ranks = {
        name: rank_both_ways(each.embedded.images, each.embedded.texts, seen.image_of_text, also_positive=pairs)
        for name, each in subjects.items()
    }
    outcomes = OUTCOMES if len(subjects) > 1 else ALONE
    groups = {direction: _groups(ranks, direction) for direction in DIRECTIONS}
    blocks: list[Block] = [_about(watched, shared=pairs is not None), _counts(groups, outcomes)]
    if not (images or captions):
        return [*blocks, Paragraph("Pictures and captions are left out on request.", "quiet")]
    drawn = _draw(groups, ranks, cards, seed)
    side, drawn = _affordable(drawn) if images else (0, drawn)
    maker = _Maker(watched, subjects, ranks, side=side, captions=captions, shared=pairs is not None)
    if images and side < SIDES[0]:
        blocks.append(Paragraph(f"Thumbnails are {side} pixels wide, so that the page stays small.", "quiet"))
    return [*blocks, Gallery(DIRECTIONS, outcomes, [maker.card(each) for each in drawn])]


def _also_right(watched: Watched) -> Int[Tensor, "pairs 2"] | None:
    """Further right (text, image) pairs where most captions, such as those of classes, are said of several pictures.

    None: only a picture's own captions are right, as in the standard protocol.
    """
    seen = watched.seen
    pairs = shared_captions(seen.captions, seen.image_of_text)
    asked = watched.subjects["student"].bench.config.shared_captions
    several = len(torch.unique(pairs[:, 0]))
    return pairs if several and (asked or 2 * several > len(seen.texts)) else None


def _about(watched: Watched, *, shared: bool) -> Paragraph:
    seen = watched.seen
    tried = len(seen.ids) + len(seen.bad)
    part = f"the first {tried:,} of {watched.total:,}" if tried < watched.total else f"all {watched.total:,}"
    equal = " A caption is right for every picture of which the same is said." if shared else ""
    unread = f" Pictures that could not be read: {len(seen.bad):,}." if seen.bad else ""
    return Paragraph(
        f"Models embedded {part} pictures of {watched.source.name}, with "
        f"{counted(len(seen.texts), 'caption')}.{unread} Right means that a right answer stands first.{equal} "
        "Cards are drawn by chance within each outcome."
    )


def _counts(groups: dict[str, dict[str, list[int]]], outcomes: dict[str, str]) -> Table:
    """How many queries end how, of all."""
    rows = []
    for outcome, label in outcomes.items():
        cells = [Cell(label)]
        for direction in DIRECTIONS:
            count = len(groups[direction].get(outcome, []))
            total = sum(map(len, groups[direction].values()))
            cells.append(Cell(f"{count:,}", count, f"{100 * count / total:.1f} %" if total else ""))
        rows.append(cells)
    return Table("All queries by outcome", ["outcome", *DIRECTIONS.values()], rows)


def _groups(ranks: dict[str, RanksBothWays], direction: str) -> dict[str, list[int]]:
    """Outcome -> places among the queries that have a right answer."""
    right = {name: (getattr(each, direction).hits(1) > 0.5).tolist() for name, each in ranks.items()}
    student, teacher = right["student"], right.get("teacher")
    groups: dict[str, list[int]] = {}
    for place, own in enumerate(student):
        if teacher is None:
            outcome = "right" if own else "wrong"
        else:
            outcome = ("both" if own else "lost") if teacher[place] else "won" if own else "neither"
        groups.setdefault(outcome, []).append(place)
    return groups


def _draw(
    groups: dict[str, dict[str, list[int]]], ranks: dict[str, RanksBothWays], cards: int, seed: int
) -> list[_Drawn]:
    """Some queries of each group, by chance; those whose ranks lie furthest apart stand first."""
    drawn = []
    for direction, of_direction in groups.items():
        expected = {name: getattr(each, direction).expected() for name, each in ranks.items()}
        for outcome in (*OUTCOMES, *ALONE):
            places = of_direction.get(outcome, [])
            chosen = random.Random(f"{seed} {direction} {outcome}").sample(places, min(cards, len(places)))

            def apart(place: int, expected: dict[str, Tensor] = expected) -> float:
                ranks_here = [float(each[place]) for each in expected.values()]
                return max(ranks_here) - min(ranks_here) if len(ranks_here) > 1 else ranks_here[0]

            drawn += [_Drawn(direction, outcome, place) for place in sorted(chosen, key=lambda p: (-apart(p), p))]
    return drawn


def _affordable(drawn: list[_Drawn]) -> tuple[int, list[_Drawn]]:
    """The side of thumbnails at which a page stays small, and fewer cards where none is small enough."""
    for side in SIDES:
        if _bytes(drawn, side) <= _PICTURE_BYTES:
            return side, drawn
    while _bytes(drawn, SIDES[-1]) > _PICTURE_BYTES:
        drawn = drawn[::2]
    return SIDES[-1], drawn


def _bytes(drawn: Sequence[_Drawn], side: int) -> float:
    """An upper estimate: a picture of noise takes about 0.6 bytes a pixel as WebP, and base64 a third more."""
    pictures = sum(1 if each.direction == "i2t" else 2 * _SHOWN + 1 for each in drawn)
    return pictures * side * side * 0.8


class _Maker:
    """Makes cards.

    Args:
        side: of thumbnails; 0: none are shown.
        shared: whether the same caption of another picture is right.
    """

    def __init__(
        self,
        watched: Watched,
        subjects: dict[str, Subject],
        ranks: dict[str, RanksBothWays],
        *,
        side: int,
        captions: bool,
        shared: bool = False,
    ) -> None:
        self.shared = shared
        self.watched, self.ranks, self.side, self.captions = watched, ranks, side, captions
        self.embedded: dict[str, Embedded] = {name: each.embedded for name, each in subjects.items()}
        self.seen = watched.seen
        self._pictures: dict[int, Picture | None] = {}

    def card(self, drawn: _Drawn) -> Card:
        if drawn.direction == "t2i":
            return self._of_caption(drawn)
        return self._of_picture(drawn)

    def _of_caption(self, drawn: _Drawn) -> Card:
        text = int(next(iter(self.ranks.values())).t2i.query[drawn.query])
        own = int(self.seen.image_of_text[text])
        models, found = [], False
        for name, each in self.embedded.items():
            first = _best(each.texts[text], each.images)
            answers = [
                Answer(place, self._right(text, image), self._remark(text, image), picture=self._picture(image))
                for place, image in enumerate(first, 1)
            ]
            found |= any(answer.right for answer in answers)
            models.append(Answers(name, self._rank(name, drawn), answers))
        right = None if found else self._picture(own)
        return Card(drawn.direction, drawn.outcome, self._id(own), self._caption(text), None, models, right)

    def _of_picture(self, drawn: _Drawn) -> Card:
        image = int(next(iter(self.ranks.values())).i2t.query[drawn.query])
        models, found = [], False
        for name, each in self.embedded.items():
            first = _best(each.images[image], each.texts)
            answers = []
            for place, text in enumerate(first, 1):
                right = self._right(text, image)
                found |= right
                same = not right and self._said(text, image)
                remark = "also said of this picture" if same else "right" if right else "wrong"
                answers.append(Answer(place, right, remark, text=self._caption(text)))
            models.append(Answers(name, self._rank(name, drawn), answers))
        own = (self.seen.image_of_text == image).nonzero().flatten().tolist()
        right_text = None if found or not own else self._caption(own[0])
        return Card(
            drawn.direction, drawn.outcome, self._id(image), None, self._picture(image), models, right_text=right_text
        )

    def _right(self, text: int, image: int) -> bool:
        return int(self.seen.image_of_text[text]) == image or (self.shared and self._said(text, image))

    def _remark(self, text: int, image: int) -> str:
        """`same caption`: the same is said of another picture, which recall does not count as right by itself."""
        if int(self.seen.image_of_text[text]) == image:
            return "right"
        return "same caption" if self._said(text, image) else "wrong"

    def _said(self, text: int, image: int) -> bool:
        others = (self.seen.image_of_text == image).nonzero().flatten().tolist()
        own = normalised_caption(self.seen.captions[text])
        return any(normalised_caption(self.seen.captions[other]) == own for other in others)

    def _rank(self, name: str, drawn: _Drawn) -> str:
        ranks = getattr(self.ranks[name], drawn.direction)
        candidates = len(self.seen.ids) if drawn.direction == "t2i" else len(self.seen.texts)
        return f"right answer at rank {float(ranks.expected()[drawn.query]):,.4g} of {candidates:,}"

    def _caption(self, text: int) -> str | None:
        return shortened(self.seen.captions[text]) if self.captions else None

    def _id(self, image: int) -> str:
        """An id may be a path of somebody's disk: its last part."""
        return shortened(PurePosixPath(self.seen.ids[image].replace("\\", "/")).name or "picture", 60)

    def _picture(self, image: int) -> Picture | None:
        if not self.side:
            return None
        if image not in self._pictures:
            sample = self.watched.sample(image)
            known = None if sample is None else thumbnail(sample.image, self.side, f"picture {self._id(image)}")
            self._pictures[image] = known
        return self._pictures[image]


def _best(query: Float[Tensor, " dim"], candidates: Float[Tensor, "candidates dim"]) -> list[int]:
    """The first answers; of equal scores the first candidate."""
    scores = candidates.float() @ query.float()
    order: list[int] = torch.sort(scores, descending=True, stable=True).indices[:_SHOWN].tolist()
    return order

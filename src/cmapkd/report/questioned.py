"""Answers to look at: what each model of a run writes about the same pictures, drawn by chance and not by beauty."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from cmapkd.data.types import BadSampleError, Source
from cmapkd.evaluation.dialogues import Asked, descriptions, questions
from cmapkd.evaluation.subject import Bench, Subject
from cmapkd.evaluation.vqa import normalise_answer
from cmapkd.models import Model
from cmapkd.report.blocks import Answer, Answers, Block, Card, Cell, Gallery, Paragraph, Picture, Table
from cmapkd.report.outcomes import ALONE, OUTCOMES, UNJUDGED
from cmapkd.report.plain import shortened
from cmapkd.report.thumbnails import SIDES, thumbnail

MAX_PICTURES = 200
"""Pictures that questions are taken from: every answer takes the model as many steps as it has tokens."""

MAX_QUESTIONS = 300

_DIRECTION = {"answers": "Answers"}


@dataclass
class Questioned:
    """What models of a run wrote about the first pictures of a source.

    Attributes:
        asked: the questions, or what asks for a description where the source has no questions.
        said: by model, an answer to each; None where the model could not read the dialogue.
        total: pictures of the whole source.
        notes: models that are missing, and why.
        test: whether the source is a test split, which nobody chooses by.
    """

    source: Source
    asked: Sequence[Asked]
    said: Mapping[str, Sequence[str | None]]
    total: int
    notes: tuple[str, ...] = ()
    test: bool = False

    @property
    def described(self) -> bool:
        """Whether descriptions were asked for: many are right, so none is called wrong."""
        return self.asked[0].kind == "description"

    def outcome(self, place: int) -> str:
        """Who is right: a key of `OUTCOMES`, of `ALONE` where there is no teacher, of `UNJUDGED` of a description."""
        if self.described:
            return "described"
        own = self.is_right("student", place)
        if "teacher" not in self.said:
            return "right" if own else "wrong"
        if self.is_right("teacher", place):
            return "both" if own else "lost"
        return "won" if own else "neither"

    def is_right(self, model: str, place: int) -> bool:
        """Whether the answer is one of the references, after the normalisation of VQA."""
        said = self.said[model][place]
        known = {normalise_answer(reference) for reference in self.asked[place].references}
        return said is not None and normalise_answer(said) in known


def question(bench: Bench, models: Mapping[str, Model], say: Callable[[str], None]) -> Questioned:
    """Asks every model the same questions; of a source without any, for descriptions.

    Raises:
        ValueError: there is nothing to ask, or the student can read no dialogue.
    """
    how = bench.how
    asked = questions(bench.annotations, how)
    most = how.answer_tokens if asked else how.caption_tokens
    asked = asked or descriptions(bench.annotations, how)
    if not asked:
        raise ValueError(f"{bench.scored.name} has neither questions nor captions")
    asked = asked[:: -(-len(asked) // MAX_QUESTIONS)]
    said: dict[str, list[str | None]] = {}
    notes: list[str] = []
    for name, model in models.items():
        what = "writing {:,} descriptions" if asked[0].kind == "description" else "answering {:,} questions"
        say(f"{name}: {what.format(len(asked))} of {bench.scored.name}")
        try:
            written = Subject(name, model, bench).writer.written(asked, most=most)
        except ValueError as error:
            if name == "student":
                raise
            notes.append(f"The {name} is not in it: {str(error)[:200]}.")
            continue
        said[name] = [None if each is None else each.text for each in written]
    order = [name for name in ("teacher", "student", "baseline") if name in said]
    return Questioned(bench.scored, asked, {name: said[name] for name in order}, len(bench.scored), tuple(notes))


def answer_blocks(seen: Questioned, *, cards: int, seed: int, images: bool, captions: bool) -> list[Block]:
    """Counts of all questions by outcome, and cards of some.

    Args:
        cards: of each outcome, drawn by `seed`.
        images, captions: whether pictures, and words of the data and of the models, are shown.
    """
    outcomes = UNJUDGED if seen.described else OUTCOMES if "teacher" in seen.said else ALONE
    groups: dict[str, list[int]] = {}
    for place in range(len(seen.asked)):
        groups.setdefault(seen.outcome(place), []).append(place)
    blocks: list[Block] = [Paragraph(_about(seen))]
    if not seen.described:
        rows = [_count(label, len(groups.get(outcome, ())), len(seen.asked)) for outcome, label in outcomes.items()]
        blocks.append(Table("All questions by outcome", ["outcome", "questions"], rows))
    if not (images or captions):
        return [*blocks, Paragraph("Pictures and words are left out on request.", "quiet")]
    drawn = []
    for outcome in outcomes:
        places = groups.get(outcome, [])
        chosen = sorted(random.Random(f"{seed} answers {outcome}").sample(places, min(cards, len(places))))
        drawn += [_card(seen, place, outcome, images=images, captions=captions) for place in chosen]
    return [*blocks, Gallery(_DIRECTION, outcomes, drawn)]


def _about(seen: Questioned) -> str:
    pictures = len({each.index for each in seen.asked})
    of_source = f"{pictures:,} of {seen.total:,} pictures of {seen.source.name}"
    if seen.described:
        return f"Models described {of_source}. Descriptions are not judged here. Cards are drawn by chance."
    return (
        f"Models answered {len(seen.asked):,} questions about {of_source}. Right means that the answer is one of the "
        "references, after the normalisation of VQA. Cards are drawn by chance within each outcome."
    )


def _count(label: str, count: int, total: int) -> list[Cell]:
    return [Cell(label), Cell(f"{count:,}", count, f"{100 * count / total:.1f} %")]


def _card(seen: Questioned, place: int, outcome: str, *, images: bool, captions: bool) -> Card:
    asked = seen.asked[place]
    models = []
    for name, said in seen.said.items():
        text, right = said[place], None if seen.described else seen.is_right(name, place)
        shown = "(could not be asked)" if text is None else text or "(empty)"
        answer = Answer(1, right, "right" if right else "wrong", text=shortened(shown) if captions else None)
        models.append(Answers(name, "", [answer]))
    someone = not seen.described and any(seen.is_right(name, place) for name in seen.said)
    return Card(
        "answers",
        outcome,
        _id(asked),
        shortened(asked.prompt[-1].text) if captions else None,
        _picture(seen, asked) if images else None,
        models,
        right_text=None if someone or not captions else shortened(asked.references[0]),
        right_title="A caption of the data" if seen.described else "The right answer",
    )


def _picture(seen: Questioned, asked: Asked) -> Picture | None:
    try:
        return thumbnail(seen.source[asked.index].image, SIDES[0], f"picture {_id(asked)}")
    except BadSampleError:
        return None


def _id(asked: Asked) -> str:
    """An id may be a path of somebody's disk: its last part."""
    return shortened(PurePosixPath(asked.sample.replace("\\", "/")).name or "picture", 60)

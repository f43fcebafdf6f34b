"""`Prompting`: what is said about a picture, as a dialogue whose answers a model learns to write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from cmapkd.config import ConfigError
from cmapkd.data.random import uniforms
from cmapkd.data.texts import LOOKED_AT, NEGATIVES, false_texts, joined
from cmapkd.data.turns import UNREAD, Dialogue, Turn
from cmapkd.data.types import BadSampleError, QuestionAnswer, Sample, Source
from cmapkd.data.unseen import unseen
from cmapkd.data.views import View

Kind = Literal["turns", "questions", "captions", "both"]
KINDS: tuple[Kind, ...] = ("turns", "questions", "captions")
"""What a sample can be asked about, the first one that it has before the others."""

INSTRUCTIONS = (
    "Describe the image.",
    "What does the image show?",
    "Write a caption for this image.",
    "Say in a sentence what can be seen here.",
    "What is in this picture?",
    "Give a short description of the image.",
)
"""What a caption answers; one of them is drawn for each view."""

_OF_ATTRIBUTES = ("replaced", "exchanged", "")  # kinds of false texts; empty: nobody knows what is false of it

VOCABULARY_SAMPLES = 20_000  # whose texts are read to learn a vocabulary


@dataclass(frozen=True, slots=True)
class Prompting:
    """A pure function of the sample and the number of its view, as the view is; a sibling of `texts.TextChoice`.

    Attributes:
        kind: `turns`, `questions` or `captions`; `both`: questions and a caption; `auto`: the first of the three that a
            sample has.
        share: of the questions, in (0, 1]: a fixed pseudo-random choice among all pairs of sample and question.
        suffix: stands after every question, on a line of its own.
        plain_captions: a caption is the answer to the picture alone, without an instruction.
        join: all that is asked of a picture stands in one dialogue, in an order that the view draws; else one of it.
        learn: all: every answer of a dialogue that the data do not exclude; last: the last one alone.
        captions: of a picture that stand in a joined dialogue, as many as it has at most; the view draws which.
        unanswered: student: questions outside the share, and those without an answer, are asked too, and the student
            writes the answer; leave_out: they are not asked.
        pairs: whether each dialogue must bring a worse last answer, as methods that learn a preference read it. A
            caption gets a false text, with a wrong attribute where there is any. Earlier answers are not learned then.
    Raises:
        ValueError: an unknown kind, a share out of range, several captions of dialogues that are not joined, or
            answers of the student's own in joined dialogues or to no questions.
    """

    kind: Literal["auto", "turns", "questions", "captions", "both"] = "auto"
    share: float = 1.0
    suffix: str = ""
    plain_captions: bool = False
    join: bool = False
    learn: Literal["all", "last"] = "all"
    captions: int = 1
    unanswered: Literal["leave_out", "student"] = "leave_out"
    pairs: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("auto", *get_args(Kind)):
            raise ValueError(f"prompts of kind {self.kind!r}: choose auto, {', '.join(get_args(Kind))}")
        if not 0 < self.share <= 1:
            raise ValueError(f"a share of {self.share:g} of the questions: give a number above 0, up to 1")
        if self.captions != 1 and (self.captions < 1 or not self.join or self.kind not in ("captions", "both")):
            raise ValueError(
                f"captions: {self.captions} asks for several captions in a dialogue: that takes at least 1, "
                "join: true, and the kind captions or both"
            )
        if self.unanswered == "student" and (self.join or self.kind not in ("auto", "questions")):
            raise ValueError(
                "unanswered: student asks one question in a dialogue, whose answer the student writes: that takes "
                "join: false, and the kind questions or auto"
            )

    @property
    def plain(self) -> bool:
        """Whether what is said of a picture can be chosen without it: it always can."""
        return True

    def choose(self, sample: Sample, view: View, number: int) -> Dialogue:
        """The dialogue of this view: of several questions or captions the one that the view draws, or all questions.

        Raises:
            BadSampleError: the sample has nothing that is asked for, or its dialogue cannot be used.
        """
        turns = self._chosen(sample, view, number)
        if self.pairs:
            turns = (*turns[:-1], _against(turns[-1], sample, number))
        if self.learn == "all" and not self.pairs:
            return turns
        return (*(replace(turn, learned=False) for turn in turns[:-1]), turns[-1])

    def _chosen(self, sample: Sample, view: View, number: int) -> Dialogue:
        kind = self._kind(sample)
        if kind is None:
            asked_for = "dialogue, question or caption" if self.kind == "auto" else self.kind
            without = "; its questions have no answer" if sample.questions and not _answered(sample) else ""
            raise BadSampleError(sample.id, f"no {asked_for} that this run learns from{without}")
        if kind == "turns":
            if sample.no_turns is not None:
                raise BadSampleError(sample.id, sample.no_turns)
            return sample.turns
        asked = self._questions(sample) if kind in ("questions", "both") else []
        if kind in ("captions", "both"):
            asked += self._captions(sample, view, number)
        if self.join:
            order = uniforms(len(asked), "order of questions", sample.id, number).argsort(kind="stable")
            shown = [asked[place] for place in order.tolist()]
        else:
            shown = [asked[int(self._drawn(kind, sample, view, number) * len(asked))]]
        turns: list[Turn] = []
        for prompt, answer in shown:
            written = Turn("assistant", UNREAD, given=False) if answer is None else Turn("assistant", answer)
            turns += [Turn("user", prompt, int(not turns)), written]
        return tuple(turns)

    def _drawn(self, kind: Kind, sample: Sample, view: View, number: int) -> float:
        """Which of several is asked, in [0, 1). Of captions there is the one of this view, so another number chooses
        between it and the questions: else only the last captions would ever be shown."""
        return float(uniforms(1, "asked", sample.id, number)[0]) if kind == "both" else view.caption

    def _questions(self, sample: Sample) -> list[tuple[str, str | None]]:
        """Prompt and answer of each question that is asked; the answer is None where the student is to write it."""
        behind = f"\n{self.suffix}" if self.suffix else ""
        return [
            (asked.question + behind, commonest(asked.answers) if given else None)
            for asked, given in self._asked(sample)
        ]

    def _captions(self, sample: Sample, view: View, number: int) -> list[tuple[str, str | None]]:
        """The captions of this view, each behind an instruction; nothing where the sample has none."""
        if not sample.captions:
            return []
        drawn = uniforms(self.captions, "instruction", sample.id, number).tolist()
        instructions = ["" if self.plain_captions else INSTRUCTIONS[int(each * len(INSTRUCTIONS))] for each in drawn]
        if self.captions == 1:
            return [(instructions[0], view.choose(sample.captions))]
        order = uniforms(len(sample.captions), "captions", sample.id, number).argsort(kind="stable").tolist()
        return list(zip(instructions, (sample.captions[place] for place in order), strict=False))

    def has(self, sample: Sample) -> bool:
        """Whether there is anything to ask of the sample; true of a dialogue that turns out to be unusable."""
        return self._kind(sample) is not None

    def _kind(self, sample: Sample) -> Kind | None:
        """What is asked of the sample; None: nothing.

        A caption does not take the place of questions that are not kept: fewer questions change nothing else. Nor does
        it take the place of a dialogue that cannot be used.
        """
        for kind in KINDS if self.kind == "auto" else (self.kind,):
            if kind == "questions" and (_answered(sample) or self._asked(sample)):
                return kind if self._asked(sample) else None
            if (kind == "turns" and (sample.turns or sample.no_turns is not None)) or (
                kind == "captions" and sample.captions
            ):
                return kind
            if kind == "both" and (sample.captions or self._asked(sample)):
                return kind
        return None

    def asked(self, sample: Sample) -> tuple[QuestionAnswer, ...]:
        """The sample's questions of which each view asks one, or a joined dialogue all."""
        return tuple(question for question, _ in self._asked(sample))

    def _asked(self, sample: Sample) -> list[tuple[QuestionAnswer, bool]]:
        """Each question with whether its answer is given: the data have one, and it is in the share that is kept."""
        made = []
        for place, question in enumerate(sample.questions):
            given = any(question.answers) and self._keeps(sample.id, place)
            if question.question and (given or self.unanswered == "student"):
                made.append((question, given))
        return made

    def _keeps(self, sample_id: str, place: int) -> bool:
        return self.share == 1 or bool(uniforms(1, "question", sample_id, place)[0] < self.share)

    def columns(self, chosen: Sequence[Dialogue]) -> tuple[tuple[str, ...], dict[str, list[str]]]:
        """The answers; there are no further texts."""
        return tuple(turns[-1].text for turns in chosen), {}

    def named(self, chosen: Dialogue) -> str:
        """Prompt and answer as one text, which names them in a cache."""
        return joined(
            f"{turn.role} {turn.pictures} {turn.learned:d} {turn.text}" if turn.given else f"{turn.role} unanswered"
            for turn in (*chosen, *(Turn("assistant", turn.rejected) for turn in chosen if turn.rejected))
        )

    def describe(self) -> str:
        """Names the choice for a cache's identity."""
        how = "plain" if self.plain_captions else "instructed"
        joined_too = ", all questions of a picture" * self.join + ", the last answer learned" * (self.learn == "last")
        joined_too += f", {self.captions} captions of a picture" * (self.captions > 1)
        joined_too += ", questions without an answer too" * (self.unanswered == "student")
        joined_too += ", with a worse answer" * self.pairs
        joined_too += ", drawn apart from the caption" * (self.kind == "both" and not self.join)
        return f"dialogues {self.kind} share {self.share:g} {how} captions, suffix {self.suffix!r}{joined_too}"

    def check(self, source: Source) -> None:
        """Refuses data that seem to lack what is to be asked.

        Raises:
            ConfigError: none of the first samples has anything of this kind.
        """
        for index in range(min(LOOKED_AT, len(source))):
            try:
                self.choose(unseen(source, index), View(), 0)
                return
            except BadSampleError:
                continue
        what = "a dialogue, a question with an answer, or a caption" if self.kind == "auto" else f"any {self.kind}"
        if self.pairs:
            raise ConfigError(
                f"this run learns which of two answers is better, but none of the first {LOOKED_AT} samples of "
                f"{source.name} has {what} with a worse answer: give dialogues as prompt, chosen and rejected, or "
                "captions (data.prompts=captions) with false texts under the key negatives, see docs/data.md"
            )
        raise ConfigError(
            f"this run learns to answer, but none of the first {LOOKED_AT} samples of {source.name} has {what}: set "
            "data.prompts to what the data have (auto, turns, questions, captions or both), see docs/data.md"
        )

    def vocabulary(self, source: Source, most: int = VOCABULARY_SAMPLES) -> Iterator[str]:
        """Every text that may be read or written of up to `most` samples, spread evenly over the source.

        Lazily, and without pictures where the source can read it so. Unreadable samples are passed over.
        """
        yield from (self.suffix,) if self.suffix else ()
        if self.kind in ("auto", "captions", "both") and not self.plain_captions:
            yield from INSTRUCTIONS
        stride = max(1, len(source) // most)
        for index in range(0, min(len(source), stride * most), stride):
            try:
                sample = unseen(source, index)
            except BadSampleError:  # the training meets it again, and counts it or stops
                continue
            yield from self._said(sample)

    def _said(self, sample: Sample) -> Iterator[str]:
        if self.kind in ("auto", "turns"):
            yield from (text for turn in sample.turns for text in (turn.text, turn.rejected) if text)
        if self.kind in ("auto", "questions", "both"):
            for _, question in _answered(sample):
                yield question.question
                yield commonest(question.answers)
        if self.kind in ("auto", "captions", "both"):
            yield from sample.captions
            if self.pairs:
                yield from sample.texts.get(NEGATIVES, ())  # those that are made have the words of captions


def _against(answer: Turn, sample: Sample, number: int) -> Turn:
    """The answer with a worse one beside it: what the data reject, or a text that is false of the sample.

    Raises:
        BadSampleError: nothing is known to be worse.
    """
    if answer.rejected:
        return answer
    false = false_texts(sample, answer.text, number) if answer.text in sample.captions else {}
    known = [text for text, kind in false.items() if kind in _OF_ATTRIBUTES] or [*false]
    if not known:
        raise BadSampleError(sample.id, "no worse answer is known, which this run compares with the given one")
    place = int(uniforms(1, "rejected", sample.id, number)[0] * len(known))
    return replace(answer, rejected=known[place])


def commonest(answers: Sequence[str]) -> str:
    """The answer that most people gave; among equally frequent ones the first. Empty ones count only where all are."""
    counts = Counter(answer for answer in answers if answer)
    return max(counts, key=counts.__getitem__, default="")  # of equals the one that was met first


def _answered(sample: Sample) -> list[tuple[int, QuestionAnswer]]:
    """The questions that have an answer, each with its place among all."""
    return [(place, asked) for place, asked in enumerate(sample.questions) if any(asked.answers) and asked.question]

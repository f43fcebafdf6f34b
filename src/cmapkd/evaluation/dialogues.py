"""The dialogues of an evaluation of models that write: each sample's dialogue, questions and captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cmapkd.data.dialogues import Dialogue, Turn
from cmapkd.data.prompting import commonest
from cmapkd.data.records import kind_of
from cmapkd.data.turns import UNREAD
from cmapkd.data.types import QuestionAnswer
from cmapkd.evaluation.config import WritingConfig
from cmapkd.evaluation.probes.data import Annotations

Kind = Literal["question", "description", "caption"]


@dataclass(frozen=True, slots=True)
class Asked:
    """One dialogue about one sample's picture.

    Attributes:
        index: of the sample in its source.
        sample: the sample's id.
        kind: a `question`; a `description` is to be written; a `caption` is to be read.
        dialogue: the prompt and a reference, or `UNREAD` of a description.
        references: every accepted answer, or every caption of the picture.
        question: as the source has it, or the last one of a dialogue; None for captions.
    """

    index: int
    sample: str
    kind: Kind
    dialogue: Dialogue
    references: tuple[str, ...]
    question: QuestionAnswer | None = None

    @property
    def prompt(self) -> Dialogue:
        return self.dialogue[:-1]

    @property
    def shows(self) -> bool:
        """Whether a turn shows the sample's picture."""
        return any(turn.pictures for turn in self.dialogue)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of what is learned of the dialogue, without end tokens."""
        return sum(len(turn.text.encode()) for turn in self.dialogue if turn.role == "assistant" and turn.learned)

    def unread(self) -> Dialogue:
        """The prompt with the answer of dialogues whose answer nobody reads."""
        return (*self.prompt, Turn("assistant", UNREAD))


def questions(said: Annotations, how: WritingConfig) -> list[Asked]:
    """Every dialogue, and of samples without one every question that has an answer, in the order of the source.

    The reference of a question is the commonest answer; of a dialogue it is the last turn, and the earlier ones are
    given. `how.asks` may leave dialogues or questions out; where it is `captions`, nothing is asked.
    """
    asked: list[Asked] = []
    if how.asks == "captions":
        return asked
    rows = zip(said.indices, said.ids, said.turns, said.questions, strict=True)
    for index, sample, turns, of_sample in rows:
        if turns and how.asks in ("auto", "turns"):
            asked.append(_last_answer(index, sample, turns))
            continue
        for question in of_sample if how.asks != "turns" else ():
            if any(question.answers):
                text = f"{question.question}\n{how.question_suffix}" if how.question_suffix else question.question
                dialogue = _dialogue(text, commonest(question.answers))
                asked.append(Asked(index, sample, "question", dialogue, question.answers, question))
    return asked


def _last_answer(index: int, sample: str, turns: Dialogue) -> Asked:
    """A dialogue of the data, whose last answer alone is judged."""
    given = (replace(turn, learned=False) if turn.role == "assistant" else turn for turn in turns[:-1])
    said = [turn.text for turn in turns if turn.role == "user"]
    references = (turns[-1].text,)
    question = QuestionAnswer(said[-1] if said else "", references, kind_of(references))
    return Asked(index, sample, "question", (*given, turns[-1]), references, question)


def descriptions(said: Annotations, how: WritingConfig) -> list[Asked]:
    """One dialogue for every picture that has captions, to be described; none where `how.asks` leaves captions out."""
    if how.asks in ("turns", "questions"):
        return []
    return [
        Asked(index, sample, "description", _dialogue(_request(how), UNREAD), captions)
        for index, sample, captions in zip(said.indices, said.ids, said.captions, strict=True)
        if captions
    ]


def references(said: Annotations, how: WritingConfig) -> list[Asked]:
    """What is read in place of written: all answers; of a source without any, or asked for captions, every caption.

    Where the source has nothing that `how.asks` names, all else that it has is read.
    """
    asked = questions(said, how) or _captions(said, how)
    return asked or questions(said, how.model_copy(update={"asks": "auto"}))


def lacking(said: Annotations, how: WritingConfig, what: str) -> str:
    """A sentence about data that have no `what` to ask for."""
    narrowed = "" if how.asks in ("auto", "both") else f", asked for {how.asks} alone (writing.asks)"
    return f"none of its {len(said):,} readable samples has {what}{narrowed}"


def _captions(said: Annotations, how: WritingConfig) -> list[Asked]:
    """Every caption, to be read."""
    return [
        Asked(index, sample, "caption", _dialogue(_request(how), caption), captions)
        for index, sample, captions in zip(said.indices, said.ids, said.captions, strict=True)
        for caption in captions
    ]


def other_pictures(asked: Sequence[Asked]) -> list[int] | None:
    """For each dialogue the index of another sample, whose picture is shown in place of its own; None: there is one.

    Samples are paired half the source apart, since neighbours are often pictures of the same thing. All dialogues show
    a picture.
    """
    indices = list(dict.fromkeys(each.index for each in asked))
    if len(indices) < 2:
        return None
    half = len(indices) // 2
    other = {index: indices[(place + half) % len(indices)] for place, index in enumerate(indices)}
    return [other[each.index] for each in asked]


def _request(how: WritingConfig) -> str:
    """What asks for a description; `how` is resolved."""
    assert how.instruction is not None
    return how.instruction


def _dialogue(prompt: str, answer: str) -> Dialogue:
    return (Turn("user", prompt, pictures=1), Turn("assistant", answer))

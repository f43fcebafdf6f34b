"""Teacher and student with two tokenizers: their tokens of an answer meet where both begin at the same byte."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Self

import torch
from jaxtyping import Bool, Int
from pydantic import Field, model_validator
from torch import Tensor

from cmapkd.methods.generative import GenerativeConfig
from cmapkd.models.generative import GenerativeModel
from cmapkd.models.token_bytes import Spelling, TokenPairs, paired_tokens
from cmapkd.objectives.aligned import Pairs, Spans
from cmapkd.objectives.ranked import byte_groups

Compare = Literal["text", "hybrid", "ranked"]


class AlignedConfig(GenerativeConfig):
    """How tokens of two models meet."""

    alignment: Literal["ids", "bytes"] = Field(
        "ids",
        description="How tokens of two models meet. ids: they have one tokenizer; bytes: of two tokenizers, where "
        "tokens of both begin at the same byte of an answer.",
    )
    compare: Compare = Field(
        "text",
        description="alignment bytes: what is compared. text: what stands for the same text (ours); hybrid: tokens by "
        "text and the others by rank (GOLD); ranked: probabilities by rank (ULD).",
    )

    @property
    def reads_bytes(self) -> bool:
        return self.alignment == "bytes"

    @model_validator(mode="after")
    def _compare_is_read(self) -> Self:
        if self.alignment == "ids" and self.compare != "text":
            raise ValueError("compare is read by alignment bytes alone: leave it out, or set alignment: bytes")
        return self


class Groups(NamedTuple):
    """Tokens of both models that cover the same bytes of the answers of a batch.

    Attributes:
        student, teacher: the rows of each group, in the order of the student's.
        first: Bool[groups], whether a group begins an answer.
    """

    student: Spans
    teacher: Spans
    first: Bool[Tensor, " groups"]


class ByteAlignment:
    """Which tokens of a teacher and of a student stand for the same bytes, within an answer and at its start.

    Raises:
        ConfigError: the bytes of a model's tokens are not known.
    """

    def __init__(self, teacher: GenerativeModel, student: GenerativeModel) -> None:
        self.teacher, self.student = (each.processor.spelling(each.vocabulary.size) for each in (teacher, student))
        self.pairs = paired_tokens(self.teacher, self.student)
        same = self.teacher.lead == self.student.lead
        self.first_pairs = self.pairs if same else paired_tokens(self.teacher, self.student, first=True)

    def groups(self, student: Int[Tensor, " rows"], teacher: Int[Tensor, " teacher_rows"]) -> Groups:
        """The groups of a batch's answers.

        Args:
            student, teacher: the tokens of the same answers, each with its end token, one answer after the other.
        Raises:
            ValueError: these are not the same answers.
        """
        ours, theirs = _answers(student.tolist(), self.student), _answers(teacher.tolist(), self.teacher)
        if len(ours) != len(theirs):
            raise ValueError(
                f"the student reads {len(ours)} answers in this batch and the teacher {len(theirs)}: both must be "
                "given the same dialogues"
            )
        found: list[tuple[int, int, int, int]] = []
        first: list[bool] = []
        at = there = 0
        for own, other in zip(ours, theirs, strict=True):
            for number, (mine, judged) in enumerate(self._of_answer(own, other)):
                found.append((at + mine.start, at + mine.stop, there + judged.start, there + judged.stop))
                first.append(number == 0)
            at, there = at + len(own), there + len(other)
        columns = torch.tensor(found, dtype=torch.long).reshape(-1, 4).to(student.device).unbind(-1)
        return Groups(
            Spans(*columns[:2]), Spans(*columns[2:]), torch.tensor(first, dtype=torch.bool).to(student.device)
        )

    def pairs_at(self, first: Bool[Tensor, " groups"]) -> list[tuple[Pairs, Int[Tensor, " some"]]]:
        """Pairs of tokens, and the groups at which they are the ones.

        Args:
            first: whether a group begins an answer.
        """
        if self.first_pairs is self.pairs:
            return [(_moved(self.pairs, first.device), torch.arange(len(first), device=first.device))]
        places = [(self.pairs, (~first).nonzero()[:, 0]), (self.first_pairs, first.nonzero()[:, 0])]
        return [(_moved(pairs, first.device), which) for pairs, which in places if len(which)]

    def _of_answer(self, own: Sequence[int], other: Sequence[int]) -> list[tuple[slice, slice]]:
        texts = [each.text(ids) for each, ids in ((self.student, own), (self.teacher, other))]
        behind = [text.removeprefix(each.lead) for text, each in zip(texts, (self.student, self.teacher), strict=True)]
        if behind[0] != behind[1]:
            raise ValueError(
                f"the student's tokens of an answer stand for {_shown(behind[0])} and the teacher's for "
                f"{_shown(behind[1])}: tokens meet at the bytes of one text. A tokenizer that changes a text, as by "
                "lower case, cannot be used with alignment: bytes"
            )
        lengths = (_behind_lead(each, ids) for each, ids in ((self.student, own), (self.teacher, other)))
        return byte_groups(*lengths)


def _answers(ids: Sequence[int], spelling: Spelling) -> list[Sequence[int]]:
    """The tokens of each answer, its end token among them."""
    made, begin = [], 0
    for number, token in enumerate(ids):
        if token == spelling.end_id:
            made.append(ids[begin : number + 1])
            begin = number + 1
    return made if begin == len(ids) else [*made, ids[begin:]]


def _behind_lead(spelling: Spelling, ids: Sequence[int]) -> list[int]:
    """Bytes of each token that are part of the answer."""
    lead, lengths = len(spelling.lead), []
    for number in ids:
        length = spelling.lengths[number]
        lengths.append(max(0, length - lead))
        lead = max(0, lead - length)
    return lengths


def _moved(pairs: TokenPairs, device: torch.device) -> Pairs:
    return Pairs(pairs.teacher.to(device), pairs.student.to(device))


def _shown(text: bytes) -> str:
    return repr(text[:80].decode(errors="replace"))

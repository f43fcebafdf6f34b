"""Teacher and student with two tokenizers: their tokens of an answer meet where both begin at the same byte."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cmapkd.models.generative import GenerativeModel
from cmapkd.models.token_bytes import Spelling, TokenPairs, paired_tokens
from cmapkd.models.token_types import TokenFeatures, TopTokens
from cmapkd.objectives.aligned import Pairs, Spans, aligned_cells, aligned_divergence, side_of, side_of_top
from cmapkd.objectives.ranked import byte_groups, hybrid_distance, joined, ranked_distance
from cmapkd.objectives.tokens import TokenDivergence
from cmapkd.objectives.vocabulary import chunk_of_tokens

Compare = Literal["text", "hybrid", "ranked"]


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

    def total(
        self,
        student: TokenFeatures,
        teacher: tuple[Tensor, Any],
        groups: Groups,
        *,
        weights: Float[Tensor, " groups"] | None,
        divergence: TokenDivergence,
        compare: Compare,
        likeliest: int | None,
        chunk: int | None = None,
    ) -> Float[Tensor, ""]:
        """The sum over groups of the student's divergence from a teacher.

        Args:
            teacher: the tokens that stand in its rows, and its states and head, or its likeliest tokens at the
                divergence's temperature.
            weights: of each group; None: 1.
            likeliest: only so many tokens are sorted, where they are compared by rank; None: all.
            chunk: rows at a time; None: chosen by the student's tokens.
        """
        assert student.head is not None
        targets, given = teacher

        def measure(log_q: Tensor, tokens: Tensor, local: Spans, here: slice) -> Tensor:
            start, stop = (bounds[here] for bounds in groups.teacher)
            rows = slice(int(start[0]), int(stop[-1]))
            theirs, known = Spans(start - rows.start, stop - rows.start), _rows_of(given, rows, divergence, log_q)
            values = log_q.new_zeros(len(start))
            for pairs, which in self._tables(groups.first[here]):
                judged = (known, targets[rows], _some(theirs, which))
                mine = (log_q, tokens, _some(local, which))
                values = values.index_add(0, which, _compared(compare, mine, judged, pairs, divergence, likeliest))
            return values

        size = max(len(student.head.weight), 0 if isinstance(given, TopTokens) else len(given[1].weight))
        return aligned_divergence(
            student.hidden["answer"].values,
            student.head,
            student.targets,
            groups.student,
            measure,
            weights=weights,
            divergence=divergence,
            rows_at_once=chunk_of_tokens(len(student.targets), size, chunk),
        )

    def _tables(self, first: Bool[Tensor, " groups"]) -> list[tuple[Pairs, Int[Tensor, " some"]]]:
        """Pairs of tokens, and the groups at which they are the ones."""
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


def _compared(
    compare: Compare,
    student: tuple[Tensor, Tensor, Spans],
    teacher: tuple[Any, Tensor, Spans],
    pairs: Pairs,
    divergence: TokenDivergence,
    likeliest: int | None,
) -> Float[Tensor, " groups"]:
    """Of each group, without the squared temperature."""
    known, targets, spans = teacher
    if compare == "text":
        top = known if isinstance(known, TopTokens) else None
        judged = side_of(known, targets, spans) if top is None else side_of_top(top, targets, spans)
        ids = None if top is None else top.ids[spans.start]
        log_q, log_p = aligned_cells(side_of(*student), judged, pairs, ids)
        return divergence.measure(log_q, log_p).values
    log_q, tokens, local = student
    log_p, log_q = joined(known, targets, _slices(spans)), joined(log_q, tokens, _slices(local))
    if compare == "ranked":
        return ranked_distance(log_p.exp(), log_q.exp(), likeliest=likeliest)
    plain = TokenDivergence(divergence.name, beta=divergence.beta, lam=divergence.lam)
    return hybrid_distance(log_p, log_q, torch.stack(pairs, -1), divergence=plain, likeliest=likeliest)


def _rows_of(given: Any, rows: slice, divergence: TokenDivergence, like: Tensor) -> Any:
    """What is known of some of the teacher's rows: log-probabilities of all its tokens, or the likeliest ones."""
    if isinstance(given, TopTokens):
        return TopTokens(given.ids[rows], given.log_p[rows].to(like), given.rest[rows].to(like))
    states, head = given
    with torch.no_grad():
        return divergence.log_softmax(head(states[rows])).to(like.dtype)


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


def _some(spans: Spans, which: Tensor) -> Spans:
    return Spans(spans.start[which], spans.stop[which])


def _slices(spans: Spans) -> list[slice]:
    return [slice(start, stop) for start, stop in zip(spans.start.tolist(), spans.stop.tolist(), strict=True)]


def _shown(text: bytes) -> str:
    return repr(text[:80].decode(errors="replace"))

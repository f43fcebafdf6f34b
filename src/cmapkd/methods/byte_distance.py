"""How far a student is from a teacher with another tokenizer, at groups of tokens that cover the same bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cmapkd.methods.byte_alignment import ByteAlignment, Compare, Groups
from cmapkd.models.token_types import TokenFeatures, TopTokens
from cmapkd.objectives.aligned import Pairs, Spans, aligned_cells, aligned_divergence, side_of, side_of_top
from cmapkd.objectives.ranked import hybrid_distance, joined, ranked_distance
from cmapkd.objectives.tokens import TokenDivergence
from cmapkd.objectives.vocabulary import chunk_of_tokens


@dataclass(frozen=True)
class ByteDistance:
    """What is compared at a group.

    Attributes:
        compare: text: cells of the same text; hybrid: tokens by text and the others by rank; ranked: all by rank.
        divergence: of cells, and of tokens by text.
        likeliest: only so many tokens are sorted, where they are compared by rank; None: all.
    """

    compare: Compare
    divergence: TokenDivergence
    likeliest: int | None = None

    def total(
        self,
        aligned: ByteAlignment,
        student: TokenFeatures,
        teacher: tuple[Int[Tensor, " teacher_rows"], Any],
        groups: Groups,
        *,
        weights: Float[Tensor, " groups"] | None,
        chunk: int | None = None,
    ) -> Float[Tensor, ""]:
        """The sum over groups of the student's distance from a teacher.

        Args:
            teacher: the tokens that stand in its rows, and its states and head, or its likeliest tokens at the
                divergence's temperature.
            weights: of each group; None: 1.
            chunk: rows at a time; None: chosen by the student's tokens.
        """
        assert student.head is not None
        targets, given = teacher

        def measure(log_q: Tensor, tokens: Tensor, local: Spans, here: slice) -> Tensor:
            start, stop = (bounds[here] for bounds in groups.teacher)
            rows = slice(int(start[0]), int(stop[-1]))
            theirs, known = Spans(start - rows.start, stop - rows.start), self._rows_of(given, rows, log_q)
            values = log_q.new_zeros(len(start))
            for pairs, which in aligned.pairs_at(groups.first[here]):
                judged = (known, targets[rows], _some(theirs, which))
                values = values.index_add(0, which, self._of((log_q, tokens, _some(local, which)), judged, pairs))
            return values

        size = max(len(student.head.weight), 0 if isinstance(given, TopTokens) else len(given[1].weight))
        return aligned_divergence(
            student.hidden["answer"].values,
            student.head,
            student.targets,
            groups.student,
            measure,
            weights=weights,
            divergence=self.divergence,
            rows_at_once=chunk_of_tokens(len(student.targets), size, chunk),
        )

    def _of(
        self, student: tuple[Tensor, Tensor, Spans], teacher: tuple[Any, Tensor, Spans], pairs: Pairs
    ) -> Float[Tensor, " groups"]:
        """Of each group, without the squared temperature."""
        known, targets, spans = teacher
        if self.compare == "text":
            top = known if isinstance(known, TopTokens) else None
            judged = side_of(known, targets, spans) if top is None else side_of_top(top, targets, spans)
            ids = None if top is None else top.ids[spans.start]
            log_q, log_p = aligned_cells(side_of(*student), judged, pairs, ids)
            return self.divergence.measure(log_q, log_p).values
        log_q, tokens, local = student
        log_p, log_q = joined(known, targets, _slices(spans)), joined(log_q, tokens, _slices(local))
        if self.compare == "ranked":
            return ranked_distance(log_p.exp(), log_q.exp(), likeliest=self.likeliest)
        plain = TokenDivergence(self.divergence.name, beta=self.divergence.beta, lam=self.divergence.lam)
        return hybrid_distance(log_p, log_q, torch.stack(pairs, -1), divergence=plain, likeliest=self.likeliest)

    def _rows_of(self, given: Any, rows: slice, like: Tensor) -> Any:
        """What is known of some of the teacher's rows: log-probabilities of all its tokens, or the likeliest ones."""
        if isinstance(given, TopTokens):
            return TopTokens(given.ids[rows], given.log_p[rows].to(like), given.rest[rows].to(like))
        states, head = given
        with torch.no_grad():
            return self.divergence.log_softmax(head(states[rows])).to(like.dtype)


def _some(spans: Spans, which: Tensor) -> Spans:
    return Spans(spans.start[which], spans.stop[which])


def _slices(spans: Spans) -> list[slice]:
    return [slice(start, stop) for start, stop in zip(spans.start.tolist(), spans.stop.tolist(), strict=True)]

"""Cells that mean the same text for two tokenizers, by hand."""

from __future__ import annotations

import pytest
import torch

from cmapkd.models.token_types import TopTokens
from cmapkd.objectives.aligned import Pairs, Spans, aligned_cells, side_of, side_of_top


def test_cells_of_a_text_by_hand() -> None:
    """The teacher writes `ab` in one token, the student in `a` and `b`; `c` is a token of both, `d` of the student."""
    student = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.1, 0.6, 0.2, 0.1]])  # a, b, c, d
    teacher = torch.tensor([[0.4, 0.3, 0.1, 0.2]])  # ab, c, a, b
    pairs = Pairs(torch.tensor([1, 2, 3]), torch.tensor([2, 0, 1]))
    ours = side_of(student.log(), torch.tensor([0, 1]), Spans(torch.tensor([0]), torch.tensor([2])))
    theirs = side_of(teacher.log(), torch.tensor([0]), Spans(torch.tensor([0]), torch.tensor([1])))
    log_q, log_p = aligned_cells(ours, theirs, pairs)
    # c; a is the student's first token; b; the text ab; the rest: d, and a without b / a alone
    assert log_q.exp()[0].tolist() == pytest.approx([0.2, 0, 0.2, 0.5 * 0.6, 0.1 + 0.5 * 0.4], abs=1e-6)
    assert log_p.exp()[0].tolist() == pytest.approx([0.3, 0, 0.2, 0.4, 0.1], abs=1e-6)


@pytest.mark.parametrize(("top", "cells"), [([0, 1], [0, 0.3, 0.4, 0.3]), ([1, 3], [0.3, 0.2, 0, 0.5])])
def test_cells_of_likeliest_tokens_by_hand(top: list[int], cells: list[float]) -> None:
    student = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.1, 0.6, 0.2, 0.1]])
    teacher = torch.tensor([0.4, 0.3, 0.1, 0.2])
    pairs = Pairs(torch.tensor([1, 2, 3]), torch.tensor([2, 0, 1]))
    ids = torch.tensor([top])
    known = TopTokens(ids, teacher[ids].log(), (1 - teacher[ids].sum(-1)).log())
    ours = side_of(student.log(), torch.tensor([0, 1]), Spans(torch.tensor([0]), torch.tensor([2])))
    theirs = side_of_top(known, torch.tensor([0]), Spans(torch.tensor([0]), torch.tensor([1])))
    log_q, log_p = aligned_cells(ours, theirs, pairs, ids)
    assert log_p.exp()[0].tolist() == pytest.approx(cells, abs=1e-6)
    expected = [0, 0.2, 0.3, 0.5] if top == [0, 1] else [0.2, 0.2, 0, 0.6]
    assert log_q.exp()[0].tolist() == pytest.approx(expected, abs=1e-6)

"""Whether two models write the same tokens, and what of their heads is compared."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cmapkd.config import ConfigError
from cmapkd.models.shared_vocabulary import check_same_vocabulary, cut_head
from cmapkd.models.token_types import LogitHead, Vocabulary

PIECES = ("<pad>", "<end>", "a", "b", "c")


def vocabulary(*pieces: str, known: bool = True, end: int = 1) -> Vocabulary:
    return Vocabulary(len(pieces), 8, (end,), 0, 2, digest="/".join(pieces), pieces=pieces if known else ())


def test_equal_vocabularies_are_compared_over_all_tokens() -> None:
    assert check_same_vocabulary(vocabulary(*PIECES, known=False), vocabulary(*PIECES)) == 5


def test_tokens_added_at_the_end_are_left_out() -> None:
    more = vocabulary(*PIECES, "<box>", "<video>")
    assert check_same_vocabulary(more, vocabulary(*PIECES)) == 5
    assert check_same_vocabulary(vocabulary(*PIECES), more) == 5


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (vocabulary("<pad>", "<end>", "a", "x", "c"), "token 3: 'x' of the teacher, 'b' of the student"),
        (vocabulary(*PIECES, "<box>", known=False), "pieces of one are not known"),
        (vocabulary(*PIECES, "<stop>", end=5), r"end tokens \[5\] are known to one model only"),
    ],
)
def test_other_tokens_are_refused(teacher: Vocabulary, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_same_vocabulary(teacher, vocabulary(*PIECES))


def test_a_head_is_cut_to_the_shared_tokens_and_else_left_as_it_is() -> None:
    head = LogitHead(torch.randn(6, 3), torch.randn(6), softcap=2.0)
    hidden = torch.randn(2, 3)
    torch.testing.assert_close(cut_head(head, 4)(hidden), head(hidden)[:, :4])
    assert cut_head(head, 6) is head
    assert cut_head(replace(head, bias=None), 4).bias is None
    with pytest.raises(ValueError, match="6 tokens, fewer than 7"):
        cut_head(head, 7)

"""The gallery of models that write: questions have outcomes, descriptions have none."""

from __future__ import annotations

from cmapkd.data.turns import UNREAD, Turn
from cmapkd.evaluation.dialogues import Asked
from cmapkd.report.blocks import Gallery, Paragraph, Table
from cmapkd.report.questioned import Questioned, answer_blocks
from helpers import MemorySource


def asked(kind: str, references: tuple[str, ...]) -> Asked:
    turns = (Turn("user", "Say it.", pictures=1), Turn("assistant", UNREAD))
    return Asked(0, "one", "question" if kind == "question" else "description", turns, references)


def seen(kind: str, references: tuple[str, ...], **said: str) -> Questioned:
    models = {name: [text] for name, text in said.items()}
    return Questioned(MemorySource(1), [asked(kind, references)], models, total=1)


def test_a_question_is_counted_and_a_card_says_who_is_right() -> None:
    questioned = seen("question", ("red",), teacher="Red.", student="blue")
    about, table, gallery = answer_blocks(questioned, cards=2, seed=0, images=False, captions=True)
    assert isinstance(about, Paragraph)
    assert "Models answered 1 questions about 1 of 1 pictures" in about.text
    assert isinstance(table, Table)
    assert isinstance(gallery, Gallery)
    (card,) = gallery.cards
    assert card.outcome == "lost"
    assert [model.answers[0].right for model in card.models] == [True, False]


def test_a_description_is_neither_right_nor_wrong() -> None:
    questioned = seen("description", ("a red circle", "a circle"), teacher="a circle", student="a round thing")
    about, gallery = answer_blocks(questioned, cards=2, seed=0, images=False, captions=True)
    assert isinstance(about, Paragraph)
    assert about.text.startswith("Models described 1 of 1 pictures")
    assert "Right means" not in about.text
    assert isinstance(gallery, Gallery)
    (card,) = gallery.cards
    assert (card.outcome, card.right_text, card.right_title) == ("described", "a red circle", "A caption of the data")
    assert [model.answers[0].right for model in card.models] == [None, None]

"""The second language of the scenes: another vocabulary, the opposite order, nothing lost."""

from __future__ import annotations

import pytest

from cmapkd.config import ConfigError
from cmapkd.data.open import open_source
from cmapkd.data.scenes.second import second_language


def words(texts: tuple[str, ...]) -> set[str]:
    return {word for text in texts for word in text.replace(",", " ").split()}


def test_each_word_becomes_another_and_the_order_is_turned() -> None:
    one, two = second_language("a red circle, left"), second_language("left of a circle")
    assert one.split()[0] == two.split()[-1]  # left
    assert one.split()[1] == ","
    assert len(one.split()) == 5
    assert second_language("Red") == second_language("red")


def test_nothing_is_lost_and_no_word_is_shared() -> None:
    first, second = (open_source(f"scenes?length=300&language={name}") for name in ("first", "second"))
    ours = set().union(*(words(first.captions(index)) for index in range(300)))
    theirs = set().union(*(words(second.captions(index)) for index in range(300)))
    assert len(ours) == len(theirs) > 60  # no two words became one
    assert not ours & theirs


def test_both_are_five_of_each_and_the_first_is_as_it_was() -> None:
    plain, both = open_source("scenes?length=9"), open_source("scenes?length=9&language=both")
    for index in range(9):
        assert both[index].captions == both.captions(index)
        assert both.captions(index)[:5] == plain.captions(index)
        assert both.captions(index)[5:] == tuple(map(second_language, plain.captions(index)))
    assert open_source("scenes?length=9&language=first").fingerprint() == plain.fingerprint() != both.fingerprint()


def test_an_unknown_language_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown language 'secnd'.*Did you mean 'second'"):
        open_source("scenes?language=secnd")

"""A few samples of each class, samples by their ids, and hidden labels, of any source."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cmapkd.config import ConfigError
from cmapkd.data.labels import any_label
from cmapkd.data.open import open_source, same_reading
from cmapkd.data.picked import Pick, picked
from cmapkd.data.streams import JoinedSource
from cmapkd.data.templates import get_class_prompts
from cmapkd.data.texts import TEXT_MAKERS, false_texts
from cmapkd.data.types import Sample
from cmapkd.data.unseen import NO_PICTURE
from helpers import MemorySource, Sharded

WORLD = "scenes:easy?length=80&size=32"


class Blind(MemorySource):
    """Whose pictures must not be read."""

    def __getitem__(self, index: int) -> Sample:
        raise AssertionError("a picture was read")

    def unseen(self, index: int) -> Sample:
        return super().__getitem__(index)


class Labelled(Blind):
    """Of which few samples have a label."""

    def __init__(self, length: int, places: set[int]) -> None:
        super().__init__(2)
        self._length, self._labelled = length, places

    def __len__(self) -> int:
        return self._length

    def unseen(self, index: int) -> Sample:
        return Sample(str(index), NO_PICTURE, label=0 if index in self._labelled else None)


def test_shots_are_so_many_of_each_class_and_nested() -> None:
    source = Blind(60)
    one, three = (picked(source, Pick(shots=shots)) for shots in (1, 3))
    assert Counter(one.unseen(place).label for place in range(len(one))) == dict.fromkeys(range(5), 1)  # type: ignore[attr-defined]
    ids = [{each.unseen(place).id for place in range(len(each))} for each in (one, three)]  # type: ignore[attr-defined]
    assert ids[0] < ids[1]
    assert len(ids[1]) == 15
    other = picked(source, Pick(shots=3, draw=1))
    assert {other.unseen(place).id for place in range(15)} != ids[1]  # type: ignore[attr-defined]
    assert len({each.fingerprint() for each in (source, one, three, other)}) == 4
    assert len(picked(source, Pick(shots=99))) == 40  # all that have a label


def test_ids_are_known_where_the_source_knows_them() -> None:
    class Named(Blind):
        def id(self, index: int) -> str:
            return f"id-{index}"

    assert not hasattr(picked(Blind(20), Pick(shots=1)), "id")  # so no picture is left undecoded there
    whole = Named(20)
    for pick in (Pick(shots=1), Pick(hidden=True)):
        found: Any = picked(whole, pick)
        assert hasattr(found, "id")
        places = range(len(found))
        assert [found.id(place) for place in places] == [f"id-{int(found._place(place))}" for place in places]


def test_labels_are_hidden_and_everything_else_stays() -> None:
    plain, hidden = open_source(WORLD), open_source(f"{WORLD}&labels=hidden")
    sample, without = plain[3], hidden[3]
    assert without.label is None
    assert (without.id, without.captions, without.questions) == (sample.id, sample.captions, sample.questions)
    assert hidden.unseen(3).label is None  # type: ignore[attr-defined]
    caption = sample.captions[0]
    assert false_texts(without, caption, 0) == false_texts(sample, caption, 0) != ()
    assert hidden.class_names == plain.class_names
    assert hidden.fingerprint() != plain.fingerprint()
    assert len(hidden) == 80


def test_one_label_among_many_is_found() -> None:
    assert any_label(Labelled(600, {301}))
    assert not any_label(Labelled(600, set()))
    hidden = picked(Labelled(600, {301}), Pick(hidden=True))
    assert not any_label(hidden)
    many = Labelled(10_000_000, set())
    assert any_label(many)  # nobody has looked at all of it
    assert not any_label(picked(many, Pick(hidden=True)))
    shown, alone = Labelled(600, {301}), Labelled(600, set())
    assert any_label(JoinedSource({"train": alone, "b": shown}, {"b": 0.5}))
    assert not any_label(JoinedSource({"train": alone, "b": shown}, {"b": 0.5}, ["b"]))


def test_samples_by_their_ids(tmp_path: Path) -> None:
    plain, path = open_source(WORLD), tmp_path / "few.txt"
    ids = [plain[place].id for place in (7, 2, 40)]
    path.write_text("\n".join(ids) + "\n\n")
    found = open_source(f"{WORLD}&ids={path}&shots=5&labels=hidden")
    assert [found[place].id for place in range(3)] == sorted(ids)
    assert found.captions(0) == plain.captions(2)
    with pytest.raises(IndexError):
        found[3]
    for text, why in (
        ("nobody\n", r"1 of the 1 id of .*are of no sample of scenes/easy/train, the first 'nobody' \(its own first"),
        ("", "lists no sample"),
        ("b\na\na\n", "lists 'a' twice"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=why):
            open_source(f"{WORLD}&ids={path}")


def test_parts_of_shards_know_their_shards() -> None:
    source = Sharded((10, 20, 30))
    found = picked(source, Pick(shots=4))
    counts = found.shard_counts()  # type: ignore[attr-defined]
    assert counts is not None
    assert int(counts.sum()) == len(found) == 20


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("shots=0", "shots is a number of samples of each class, >= 1"),
        ("draw=1", "draw says which samples of a class are read, but shots is not set"),
        ("labels=none", "labels must be hidden or shown, got 'none'"),
        ("shot=3", r"unknown option 'shot' \(did you mean 'shots'\?\)"),
        ("ids=nowhere.txt", "nowhere.txt"),
    ],
)
def test_wrong_options_are_refused(options: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        open_source(f"{WORLD}&{options}")


def test_what_cannot_be_picked_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="shots reads what is said of every sample first, and scenes/easy/train has 1"
    ):
        open_source("scenes:easy?shots=1")
    unlabelled = MemorySource(1)  # its first sample has no label
    with pytest.raises(ConfigError, match="shots: none of the 1 sample of memory has a label"):
        picked(unlabelled, Pick(shots=1))
    (tmp_path / "cat").mkdir()
    with pytest.raises(ConfigError, match="captions made of class names tell the labels that are hidden"):
        open_source(f"folder:{tmp_path}?labels=hidden&captions=a {{}}")


def test_the_same_samples_are_the_same_reading() -> None:
    assert same_reading(f"{WORLD}&shots=2", f"{WORLD}&shots=2")
    assert not same_reading(f"{WORLD}&shots=2", f"{WORLD}&shots=3")
    assert not same_reading(WORLD, f"{WORLD}&labels=hidden")


def test_texts_of_classes_and_false_captions_stay() -> None:
    whole = open_source("scenes?length=60")
    for spec in ("scenes?length=60&shots=2", "scenes?length=60&labels=hidden"):
        some = open_source(spec)
        assert get_class_prompts("own", some.class_names or (), some) == whole.class_prompts
        sample = some[0]
        assert TEXT_MAKERS["negatives"](sample, sample.captions[0], 1)
    streams = JoinedSource({"train": whole, "more": open_source("scenes?length=20")}, {"more": 0.5})
    assert get_class_prompts("own", whole.class_names or (), streams) == whole.class_prompts

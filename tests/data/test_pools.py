"""Pools of further texts: how many of each, which ones, and texts that are made of the caption."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import as_json, picture, write_tar
from PIL import Image

from cmapkd.config import ConfigError, Registry
from cmapkd.data import texts as texts_module
from cmapkd.data.open import open_source
from cmapkd.data.plans import Plan
from cmapkd.data.scenes.claims import Description, Extreme, Number, There, holds
from cmapkd.data.scenes.draws import Draws, key_of
from cmapkd.data.scenes.language import captions_with_claims
from cmapkd.data.scenes.negatives import (
    KINDS,
    MOST,
    _exchanged,
    _recounted,
    _turned,
    named_negatives,
    negatives_of,
)
from cmapkd.data.scenes.rewording import recounted, retextured, turned
from cmapkd.data.scenes.source import ScenesSource
from cmapkd.data.scenes.wrong import _ANY_WORD, _WORDS
from cmapkd.data.texts import TextChoice, false_texts, texts_in
from cmapkd.data.types import BadSampleError, Sample
from cmapkd.data.views import WHOLE, draw_view
from helpers import MemorySource, make_builder, make_method

ONE = TextChoice({"synthetic": 1})


def chosen(sample: Sample, number: int, choice: TextChoice) -> tuple[str, ...]:
    return choice.choose(sample, draw_view(sample.id, number, WHOLE, sample.image.size), number)


class Small(MemorySource):
    """Samples with captions alone."""

    def __getitem__(self, index: int) -> Sample:
        return replace(super().__getitem__(index), texts={})


def sample_with(captions: tuple[str, ...] = ("own",), **pools: tuple[str, ...]) -> Sample:
    return Sample("a", Image.new("RGB", (8, 8)), captions, texts=pools)


# ------------------------------------------------------------------------------------------------ how many, which


def test_names_alone_ask_for_one_of_each() -> None:
    assert TextChoice(("synthetic",)) == ONE
    assert TextChoice(("synthetic",)).describe() == ONE.describe() == "synthetic mixed 0"
    assert TextChoice({"a": 1, "b": 3}, 0.5).describe() == "a,b*3 mixed 0.5"
    with pytest.raises(ValueError, match="0 texts of pool 'a'"):
        TextChoice({"a": 0})


def test_texts_are_what_they_were_with_one_of_each_pool() -> None:
    """Pinned: what caches hold was drawn so."""
    sample = MemorySource(16)[3]
    drawn = [sample.texts["synthetic"].index(chosen(sample, number, ONE)[1]) for number in range(12)]
    assert drawn == PINNED


PINNED = [0, 0, 2, 2, 0, 1, 0, 2, 2, 0, 0, 0]


@given(
    have=st.integers(1, 6),
    count=st.integers(1, 9),
    number=st.integers(0, 50),
    name=st.text("abc", min_size=1, max_size=4),
)
def test_texts_of_a_pool_differ_as_long_as_there_are_any(have: int, count: int, number: int, name: str) -> None:
    pool = tuple(f"text {place}" for place in range(have))
    sample = replace(sample_with(more=pool), id=name)
    caption, *drawn = chosen(sample, number, TextChoice({"more": count}))
    assert caption == "own"
    assert len(drawn) == count
    assert len(set(drawn)) == min(have, count)
    assert drawn == [drawn[place % len(set(drawn))] for place in range(count)]  # repeats go round
    assert drawn[0] == chosen(sample, number, TextChoice({"more": 1}))[1]  # asking for more changes nothing before


def test_all_orders_are_drawn() -> None:
    sample = sample_with(more=("a", "b", "c"))
    orders = {chosen(sample, number, TextChoice({"more": 3}))[1:] for number in range(200)}
    assert len(orders) == 6


def test_own_further_captions_are_others_than_the_one_shown() -> None:
    sample = sample_with(("one", "two", "three"))
    for number in range(30):
        caption, *further = chosen(sample, number, TextChoice({"captions": 2}))
        assert {caption, *further} == {"one", "two", "three"}
    assert chosen(sample_with(("only",)), 0, TextChoice({"captions": 2})) == ("only", "only", "only")
    with pytest.raises(BadSampleError, match="no captions caption"):
        chosen(sample_with(()), 0, TextChoice({"captions": 1}, required=False))


def test_a_batch_brings_them_together_for_each_sample() -> None:
    choice, source = TextChoice({"captions": 1, "synthetic": 3}), MemorySource(16)
    method = make_method("hinton")
    batch = make_builder(method, source, texts=choice, views=WHOLE)[Plan(0, 2, (1, 4, 7), (1, 4, 7))]
    expected = [text for index in (1, 4, 7) for text in chosen(source[index], 2, choice)[2:]]
    for role, model in (("student", method.student), ("teacher", method.teacher.model)):  # type: ignore[union-attr]
        texts = batch.inputs[role].more_texts["synthetic"]
        assert texts.per_sample == 3
        assert texts.ids.equal(model.tokenizer(expected).ids)
        assert batch.inputs[role].more_texts["captions"].per_sample == 1
        part = batch.part(1, 3).inputs[role].more_texts["synthetic"]
        assert part.ids.equal(texts.ids[3:])


# ------------------------------------------------------------------------------------------------ where they are read


def test_any_column_that_a_source_names_is_a_pool(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    row = {"image": "a.png", "caption": "one", "negatives": ["x", "y"], "odd": 5}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    assert open_source(f"jsonl:{tmp_path / 't.jsonl'}")[0].texts == {}
    found = open_source(f"jsonl:{tmp_path / 't.jsonl'}?texts=negatives")[0]
    assert found.texts == {"negatives": ("x", "y")}
    members = [("0.png", picture()), ("0.json", as_json(caption="one", negatives=["n"], alt="other"))]
    tar = write_tar(tmp_path / "s.tar", members)
    assert open_source(f"webdataset:{tar}?texts=negatives,alt")[0].texts == {"negatives": ("n",), "alt": ("other",)}
    (tmp_path / "t.csv").write_text("filepath,title,alt\na.png,one,else\n")
    assert open_source(f"csv:{tmp_path / 't.csv'}?texts=alt")[0].texts == {"alt": ("else",)}
    (folder := tmp_path / "f").mkdir()
    (folder / "a.png").write_bytes(picture())
    (folder / "a.json").write_bytes(as_json(caption="one", alt=["z"]))
    assert open_source(f"folder:{folder}?texts=alt")[0].texts == {"alt": ("z",)}
    with pytest.raises(BadSampleError, match="not text"):
        open_source(f"jsonl:{tmp_path / 't.jsonl'}?texts=odd")[0]


def test_parquet_names_them_too(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    table = pyarrow.table({"image": [{"bytes": picture(), "path": None}], "caption": ["one"], "alt": [["x", "y"]]})
    parquet.write_table(table, tmp_path / "t.parquet")
    assert open_source(f"parquet:{tmp_path / 't.parquet'}?texts=alt")[0].texts == {"alt": ("x", "y")}
    with pytest.raises(ConfigError, match="no column 'alter'"):
        open_source(f"parquet:{tmp_path / 't.parquet'}?texts=alter")


@pytest.mark.parametrize("names", ["captions", "a,,b", "a, "])
def test_names_that_are_no_pools(names: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    with pytest.raises(ConfigError, match="texts names keys of further texts"):
        open_source(f"folder:{tmp_path}?texts={names}")


def test_a_pool_that_the_data_lack_is_said_before_the_run() -> None:
    with pytest.raises(ConfigError, match=r"reads paraphrases captions.*\?texts=paraphrases"):
        TextChoice({"paraphrases": 1}).check(MemorySource(20))
    TextChoice({"captions": 2, "synthetic": 2}).check(MemorySource(20))
    TextChoice({"negatives": 2}).check(ScenesSource(length=20))
    with pytest.raises(ConfigError, match="negatives captions"):
        TextChoice({"negatives": 2}).check(Small())


# ------------------------------------------------------------------------------------------------ made of the caption


def test_a_maker_is_asked_for_its_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def louder(sample: Sample, caption: str, key: int) -> tuple[str, ...]:
        asked.append((caption, key))
        return caption.upper(), f"{caption}!"

    makers: Registry[Any] = Registry("cmapkd.no_such_group", {"louder": louder})
    monkeypatch.setattr(texts_module, "TEXT_MAKERS", makers)
    sample = sample_with(("one", "two"))
    for number in range(8):
        caption, *made = chosen(sample, number, TextChoice({"louder": 2}))
        assert {*made} == {caption.upper(), f"{caption}!"}
    assert len({key for _, key in asked}) == 8  # a key for each view
    assert chosen(replace(sample, texts={"louder": ("given",)}), 0, TextChoice({"louder": 1}))[1] == "given"


def test_negatives_of_scenes_are_false_and_of_all_kinds() -> None:
    counts: Counter[str] = Counter()
    for difficulty in ("standard", "hard"):
        source = ScenesSource(length=150, difficulty=difficulty)
        for index in range(150):
            sample = source.unseen(index)
            claims = dict(captions_with_claims(source.scene(index)))
            caption = sample.captions[index % len(sample.captions)]
            made = named_negatives(sample, caption, index)
            assert made == named_negatives(sample, caption, index)
            assert negatives_of(sample, caption, index) == tuple(made)
            assert 0 < len(made) <= MOST
            assert not {*made} & {*claims}  # nothing that the scene's own captions say
            first = next(iter(made.values()))
            assert first == next(kind for kind in KINDS if kind in made.values())  # they take turns
            for text, kind in made.items():
                before, after = _ANY_WORD.findall(caption), _ANY_WORD.findall(text)
                if kind in ("relation", "count"):
                    assert [_WORDS[word][:2] for word in before] == [_WORDS[word][:2] for word in after]
                elif before != after:  # else it is the texture that differs
                    rest = [re.sub(r"\ban? ", "a ", _ANY_WORD.sub("*", each)) for each in (caption, text)]
                    assert rest[0] == rest[1]
                counts[kind] += 1
    assert counts.keys() == {*KINDS}
    assert min(counts.values()) > 80


def test_each_kind_says_one_thing_otherwise() -> None:
    """Sentences of the grammar beside what they become, and claims that say the same."""
    red, blue = Description("red", "circle", "striped"), Description("blue", "ring")
    changes = {
        "a red disc with stripes is left of a blue hoop, the largest object is a red disc at the left": (
            (There((red, blue), (("left", 0, 1),)), Extreme("largest", red)),
            _turned,
            {
                "a red disc with stripes is right of a blue hoop, the largest object is a red disc at the left": (
                    There((red, blue), (("right", 0, 1),)),
                    Extreme("largest", red),
                )
            },
        ),
        "a blue hoop is partly behind a red disc and above an outlined ring": (
            (There((red, blue, Description("", "ring", "outlined")), (("covers", 0, 1), ("above", 0, 2))),),
            _turned,
            {
                "a blue hoop is partly behind a red disc and below an outlined ring": (
                    There((red, blue, Description("", "ring", "outlined")), (("covers", 0, 1), ("below", 0, 2))),
                ),
                "a blue hoop is in front of a red disc and above an outlined ring": (
                    There((red, blue, Description("", "ring", "outlined")), (("covers", 1, 0), ("above", 0, 2))),
                ),
            },
        ),
        "there is one red cross and two plus signs": (
            (Number(Description("red", "cross"), 1), Number(Description("", "cross"), 2)),
            _recounted,
            {
                "there are two red crosses and two plus signs": (
                    Number(Description("red", "cross"), 2),
                    Number(Description("", "cross"), 2),
                ),
                "there is one red cross and one plus sign": (
                    Number(Description("red", "cross"), 1),
                    Number(Description("", "cross"), 1),
                ),
                "there is one red cross and three plus signs": (
                    Number(Description("red", "cross"), 1),
                    Number(Description("", "cross"), 3),
                ),
            },
        ),
        "a striped red disc and an outlined blue ring": (
            (There((red, Description("blue", "ring", "outlined"))),),
            _exchanged,
            {
                "an outlined red disc and a striped blue ring": (
                    There((red._replace(texture="outlined"), Description("blue", "ring", "striped"))),
                ),
                "a striped blue disc and an outlined red ring": (
                    There((red._replace(colour="blue"), Description("red", "ring", "outlined"))),
                ),
                "a striped red ring and an outlined blue disc": (
                    There((red._replace(shape="ring"), Description("blue", "circle", "outlined"))),
                ),
            },
        ),
    }
    for text, (claim, change, expected) in changes.items():
        assert dict(change([(text, claim)], Draws(key_of(0)))) == expected


def test_a_texture_that_has_no_words_in_its_place_gives_no_sentence() -> None:
    assert retextured("a red disc with dots", {"dotted": "solid"}) is None
    assert retextured("a red disc with dots", {"dotted": "outlined"}) == "a red disc with a border"
    assert retextured("a filled disc", {"solid": "outlined"}) == "an outlined disc"
    assert turned("a disc above a ring", ("above", "below"), 1) == "a disc under a ring"
    assert turned("above a ring there is a disc", ("above", "below"), 1) == "below a ring there is a disc"
    assert turned("a disc has a ring above it", ("above", "below"), 1) == "a disc has a ring below it"
    assert turned("a disc above a ring", ("above", "below"), 2) is None
    assert recounted("two discs", 0, 3, 2) is None


def test_kinds_are_known_of_what_is_made_and_not_of_what_is_given() -> None:
    sample = ScenesSource(length=20).unseen(3)
    made = false_texts(sample, sample.captions[0], 0)
    assert tuple(made) == tuple(texts_in("negatives", sample, sample.captions[0], 0))
    assert {*made.values()} <= {*KINDS}
    assert false_texts(sample_with(negatives=("x", "y")), "own", 0) == {"x": "", "y": ""}
    assert false_texts(sample_with(), "own", 0) == {}


def test_a_negative_of_one_scene_is_true_of_another_that_shows_it() -> None:
    """The claim that is changed is the sentence's own: exchanging back gives a claim that holds."""
    source = ScenesSource(length=60)
    for index in range(60):
        for text, claim in captions_with_claims(source.scene(index)):
            assert holds(claim, source.scene(index))
            assert text not in negatives_of(source[index], text, 0)


def test_other_languages_get_negatives_of_the_true_captions_and_other_sources_none() -> None:
    second = ScenesSource(length=20, language="second")
    assert negatives_of(second[3], second[3].captions[0], 0)
    assert negatives_of(Small()[0], "a red circle", 0) == ()
    with pytest.raises(BadSampleError, match="no negatives caption"):
        chosen(Small()[0], 0, TextChoice({"negatives": 1}))

"""Further texts of a sample: where they are read, which of them a batch brings, and what lacks them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from making import as_json, picture, write_tar

from cmapkd.config import ConfigError
from cmapkd.data.open import open_source
from cmapkd.data.plans import PlanSampler
from cmapkd.data.records import Unusable, parse_texts
from cmapkd.data.scenes.source import ScenesSource
from cmapkd.data.sentences import passages_of, sentences_of
from cmapkd.data.texts import TextChoice, joined, texts_in
from cmapkd.data.types import BadSampleError, Batch, Sample
from cmapkd.data.views import WHOLE, View, draw_view
from helpers import MemorySource, make_builder, make_method

BOTH = TextChoice(("synthetic",))


def batches(texts: TextChoice | None = None, source: Any = None, steps: int = 12, **options: Any) -> list[Batch]:
    source = source or MemorySource(16)
    builder = make_builder(make_method("hinton"), source, texts=texts or TextChoice(), **options)
    sampler = PlanSampler(len(source), batch_size=8, seed=0, start=0, stop=steps)
    return [builder[plan] for plan in sampler]


def chosen(sample: Sample, number: int, choice: TextChoice) -> tuple[str, ...]:
    return choice.choose(sample, draw_view(sample.id, number, WHOLE, sample.image.size), number)


def test_a_batch_brings_one_text_of_each_pool_in_the_form_of_each_model() -> None:
    method, source = make_method("hinton"), MemorySource(16)
    for batch in batches(BOTH, source, steps=4, views=WHOLE):
        for role, model in (("student", method.student), ("teacher", method.teacher.model)):  # type: ignore[union-attr]
            samples = {f"m{i}": source[i] for i in range(16)}
            texts = [chosen(samples[i], batch.view, BOTH) for i in batch.ids]
            assert [text for text, _ in texts] == list(batch.captions)
            assert all(text in samples[i].texts["synthetic"] for i, (_, text) in zip(batch.ids, texts, strict=True))
            expected = model.tokenizer([text for _, text in texts])
            assert batch.inputs[role].more_texts["synthetic"].ids.equal(expected.ids)


def test_captions_are_the_same_with_and_without_a_pool() -> None:
    for one, other in zip(batches(), batches(BOTH), strict=True):
        assert one.captions == other.captions
        assert one.ids == other.ids
        assert not one.inputs["student"].more_texts


def test_every_text_is_drawn_alike_and_again_the_same() -> None:
    sample = MemorySource(16)[3]
    drawn = [chosen(sample, number, BOTH)[1] for number in range(600)]
    assert drawn == [chosen(sample, number, BOTH)[1] for number in range(600)]
    for text in set(sample.texts["synthetic"]):
        share = sample.texts["synthetic"].count(text) / 3
        assert drawn.count(text) / 600 == pytest.approx(share, abs=0.08)


def test_a_share_of_the_views_shows_a_synthetic_caption() -> None:
    source, choice = MemorySource(16, without_synthetic=(2,)), TextChoice(mix_synthetic=0.3)
    taken = [
        chosen(sample, number, choice)[0] in sample.texts["synthetic"]
        for sample in (source[3], source[4])
        for number in range(500)
    ]
    assert sum(taken) / len(taken) == pytest.approx(0.3, abs=0.05)
    assert all(chosen(source[2], n, choice)[0] in source[2].captions for n in range(50))  # it has none to show


def test_a_sample_without_a_synthetic_caption_is_replaced() -> None:
    found = batches(BOTH, MemorySource(16, without_synthetic=(1, 5)), steps=2)
    assert {bad for batch in found for bad in batch.bad} == {
        (f"m{i}", "no synthetic caption, which this run reads") for i in (1, 5)
    }
    with pytest.raises(BadSampleError, match="no synthetic caption"):
        batches(BOTH, MemorySource(16, without_synthetic=range(16)), on_bad_sample="error")


@pytest.mark.parametrize("choice", [BOTH, TextChoice(mix_synthetic=0.1)])
def test_data_without_any_are_refused_before_the_run(choice: TextChoice) -> None:
    choice.check(MemorySource(20, without_synthetic=range(10)))
    with pytest.raises(ConfigError, match=r"synthetic captions, but none of the first 16 samples of memory.*syn_text"):
        choice.check(MemorySource(20, without_synthetic=range(20)))
    TextChoice().check(MemorySource(20, without_synthetic=range(20)))


def test_a_caption_may_be_missing_where_nobody_reads_it() -> None:
    sample = replace(MemorySource(4)[1], captions=())
    with pytest.raises(BadSampleError, match="no caption"):
        chosen(sample, 0, TextChoice())
    assert chosen(sample, 0, TextChoice(required=False)) == ("",)
    whole = MemorySource(4)[1]
    assert chosen(whole, 3, TextChoice(required=False)) == chosen(whole, 3, TextChoice())  # a cache serves both


def test_micro_batches_take_their_own_texts() -> None:
    (batch,) = batches(BOTH, steps=1)
    part = batch.part(3, 5)
    assert (
        part.inputs["student"]
        .more_texts["synthetic"]
        .ids.equal(batch.inputs["student"].more_texts["synthetic"].ids[3:5])
    )
    assert batch.to("cpu").inputs["student"].more_texts.keys() == {"synthetic"}


def test_one_caption_names_itself() -> None:
    assert joined(("a b",)) == "a b"
    assert joined(("a", "b")) != joined(("a b",))


def test_records_name_them_by_either_key(tmp_path: Path) -> None:
    assert parse_texts({"syn_text": ["a ", "", "b"]}) == {"synthetic": ("a", "b")}
    assert parse_texts({"synthetic": "c", "syn_text": ["a"]}) == {"synthetic": ("c",)}
    assert parse_texts({"caption": "c"}) == {}
    with pytest.raises(Unusable, match="not text"):
        parse_texts({"syn_text": [3]})


def test_tables_and_tars_read_them(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    rows = [{"image": "a.png", "caption": name, "syn_text": text} for name, text in (("one", ["x"]), ("two", "y"))]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sample = open_source(f"jsonl:{tmp_path / 't.jsonl'}")[0]
    assert (sample.captions, sample.texts) == (("one", "two"), {"synthetic": ("x", "y")})
    members = [("0.png", picture()), ("0.txt", b"real"), ("0.syn.json", as_json(syn_text=["s1", "s2"]))]
    sample = open_source(f"webdataset:{write_tar(tmp_path / 's.tar', members)}")[0]
    assert (sample.captions, sample.texts) == (("real",), {"synthetic": ("s1", "s2")})
    (tmp_path / "a.json").write_bytes(as_json(caption="one", synthetic=["z"]))
    (folder := tmp_path / "f").mkdir()
    (tmp_path / "a.png").rename(folder / "a.png")
    (tmp_path / "a.json").rename(folder / "a.json")
    assert open_source(f"folder:{folder}")[0].texts == {"synthetic": ("z",)}


# ------------------------------------------------------------------------------------------------ wrong captions


def test_wrong_captions_are_a_share_of_all_and_the_synthetic_ones_are_true() -> None:
    true, noisy = ScenesSource(length=300), ScenesSource(length=300, wrong=0.3)
    pairs = [pair for i in range(300) for pair in zip(true.captions(i), noisy.captions(i), strict=True)]
    changed = [(one, other) for one, other in pairs if one != other]
    assert len(changed) / len(pairs) == pytest.approx(0.3, abs=0.04)
    assert noisy[7].texts["synthetic"] == true[7].captions == true[7].texts["synthetic"]
    assert noisy[7].captions == noisy.captions(7)
    assert noisy[7].id == true[7].id
    assert noisy.fingerprint() != true.fingerprint()
    assert ScenesSource(length=300, wrong=0.0).fingerprint() == true.fingerprint()


def test_no_colour_or_shape_of_a_wrong_caption_is_left() -> None:
    from cmapkd.data.scenes.wrong import _ANY_WORD, _WORDS

    true, noisy = ScenesSource(length=100), ScenesSource(length=100, wrong=1.0)
    for i in range(100):
        for one, other in zip(true.captions(i), noisy.captions(i), strict=True):
            before, after = (_ANY_WORD.findall(text) for text in (one, other))
            assert len(before) == len(after)
            for a, b in zip(before, after, strict=True):
                assert _WORDS[a][0] == _WORDS[b][0]
                assert _WORDS[a][1] != _WORDS[b][1]
            assert " a o" not in other
            assert " an r" not in other


@pytest.mark.parametrize("text", ["scenes?wrong=2", "scenes?wrong=some"])
def test_a_share_is_a_number_up_to_one(text: str) -> None:
    with pytest.raises(ConfigError, match="wrong"):
        open_source(text)


def test_sentences_and_passages_of_a_sample() -> None:
    image = MemorySource()[0].image
    sample = Sample("a", image, ("One. Two! Three", "Four.", "One."), texts={"synthetic": ("Five?",)})
    sentences = ("One.", "Two!", "Three", "Four.", "Five?")
    assert sentences_of(sample, "One.", 0) == sentences == texts_in("sentences", sample, "One.", 3)
    passages = [passage.split(". ") for number in range(20) for passage in texts_in("passages", sample, "", number)]
    assert {len(passage) for passage in passages} == {1, 2, 3, 4, 5}
    bare = {each.removesuffix(".") for each in sentences}
    assert all(len(set(passage)) == len(passage) and bare.issuperset(passage) for passage in passages)
    assert passages_of(sample, "", 7) == passages_of(sample, "", 7) != passages_of(sample, "", 8)
    assert passages_of(Sample("b", image), "", 0) == ()
    found = TextChoice({"passages": 2, "sentences": 5}).choose(sample, View(), 0)
    assert len(set(found[1:3])) == 2
    assert set(found[3:]) == set(sentences)

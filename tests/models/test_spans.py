"""Spans: every tokenizer says which characters of the text as it was given each of its tokens stands for."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import TEXTS, save_word_tokenizer

from cmapkd.data.readers import Shared
from cmapkd.data.types import ModelInput, TokenBatch
from cmapkd.models.hf_model import HfTokenizer
from cmapkd.models.open_clip_tokenizer import OpenClipTokenizer, make_tokenizer
from cmapkd.models.vocabulary import TrainedTokenizer
from helpers import digest

CAPTIONS = (
    "A man riding a wave on top of a surfboard.",
    "  Two   DOGS,\tone ball ",
    "it's 42 o'clock!",
    "Un café noir — naïve 🐶 dog",
    "",
)


def clip(**settings: Any) -> OpenClipTokenizer:
    return make_tokenizer({"context_length": 24, "tokenizer_kwargs": settings})


def test_tokenizers_that_read_alike_are_equal_and_stay_so_in_a_worker() -> None:
    one, other = clip(), clip()
    assert one is not other
    assert one == other
    assert hash(one) == hash(other)
    assert one != other.padded(None)
    assert one != make_tokenizer({"context_length": 77})
    assert one != clip(clean="canonicalize")
    sent = pickle.loads(pickle.dumps((one, other)))  # noqa: S301  as a worker gets them
    assert sent[0] == sent[1]
    shared = Shared()
    made = [shared(("texts", each), lambda each=each: each(["a red square"])) for each in sent]
    assert made[0] is made[1]


def spelled(tokens: TokenBatch, texts: tuple[str, ...]) -> list[list[str]]:
    """The characters of every token that has some."""
    assert tokens.spans is not None
    assert tokens.spans.shape == (*tokens.ids.shape, 2)
    rows = zip(texts, tokens.spans.tolist(), strict=True)
    return [[text[a:b] for a, b in spans if b > a] for text, spans in rows]


def without_space(text: str) -> str:
    return "".join(text.split())


def check_specials_have_no_span(tokens: TokenBatch, *, num_special: int) -> None:
    assert tokens.spans is not None
    empty = (tokens.spans == 0).all(-1)
    assert empty[~tokens.mask].all()
    assert ((empty & tokens.mask).sum(1) == num_special).all()


def test_trained_tokenizer() -> None:
    tokenizer = TrainedTokenizer.train(CAPTIONS * 2, vocab_size=200, context_length=60)
    tokens = tokenizer(CAPTIONS, spans=True)
    for text, pieces in zip(CAPTIONS, spelled(tokens, CAPTIONS), strict=True):
        assert "".join(pieces) == without_space(text)
    check_specials_have_no_span(tokens, num_special=2)
    assert spelled(tokenizer(["A dog"], spans=True), ("A dog",))[0][0] == "A"
    assert tokenizer([]).ids.shape == (0,)


def test_clip_tokens_spell_the_text() -> None:
    tokenizer = clip()
    tokens = tokenizer(CAPTIONS, spans=True)
    by_text = spelled(tokens, CAPTIONS)
    assert by_text[0] == ["A", "man", "riding", "a", "wave", "on", "top", "of", "a", "surf", "board", "."]
    for text, pieces in zip(CAPTIONS[:3], by_text, strict=False):
        assert "".join(pieces) == without_space(text)
    assert {"café", "—", "🐶", "dog"} <= set(by_text[3])
    check_specials_have_no_span(tokens, num_special=2)
    assert tokens.spans is not None
    for ids, spans, text in zip(tokens.ids, tokens.spans, CAPTIONS[:3], strict=False):
        for number, (a, b) in zip(ids.tolist(), spans.tolist(), strict=True):
            if b > a:  # the token itself is these characters
                assert tokenizer.native.decoder[number].removesuffix("</w>") == text[a:b].lower()


def test_clip_spans_under_truncation() -> None:
    text = " ".join(f"word{n}" for n in range(40))
    short = make_tokenizer({"context_length": 7})([text], spans=True)
    assert spelled(short, (text,)) == [["word", "0", "word", "1", "word"]]
    check_specials_have_no_span(short, num_special=2)


def test_words_that_cleaning_changes_have_no_span() -> None:
    texts = ("a dog&#39;s  ball", "it’s a ＤＯＧ", "salt &amp; pepper", "broken\x1cword here")
    by_text = spelled(clip()(texts, spans=True), texts)
    assert by_text == [["a", "ball"], ["it", "’s", "a", "ＤＯＧ"], ["salt", "pepper"], []]


def test_clip_ids_are_open_clips_own() -> None:
    tokenizer = clip()
    texts = [*CAPTIONS, "a dog&#39;s ball", "long " * 50, "<start_of_text> x"]
    for spans in (False, True):
        assert torch.equal(tokenizer(texts, spans=spans).ids, tokenizer.native(texts, context_length=24))


def test_tokenizers_that_drop_tokens_at_random_tell_nothing() -> None:
    tokens = clip(reduction_mask="simple")(["a dog"], spans=True)
    assert tokens.spans is None
    assert tokens.ids.shape == (1, 24)


def test_words_keep_their_places_where_cleaning_takes_out_punctuation() -> None:
    texts = ("A dog, running", "a red_square - (two) blue!", "-- ?!", "can't")
    expected = [["A", "dog", "running"], ["a", "red", "square", "two", "blue"], [], ["can't"]]
    assert spelled(clip(clean="canonicalize")(texts, spans=True), texts) == expected


def test_transformers_tokenizer_of_open_clip(tmp_path: Path) -> None:
    save_word_tokenizer(tmp_path / "words")
    tokenizer = make_tokenizer({"context_length": 8, "hf_tokenizer_name": str(tmp_path / "words")})
    texts = ("  A   red\tSQUARE ", "two blue&nbsp;circles", "blue a&amp;a red", "a " * 20)
    tokens = tokenizer(texts, spans=True)
    assert torch.equal(tokens.ids, tokenizer.native(list(texts), context_length=8))
    assert spelled(tokens, texts) == [["A", "red", "SQUARE"], [], ["blue", "red"], ["a"] * 7]
    tokenizer.native.tokenizer_mode = "clips"
    assert OpenClipTokenizer(tokenizer.native, context_length=8)._spans is None


@pytest.mark.parametrize("whole_because", [None, "it pools the last place"])
def test_transformers_tokenizer(whole_because: str | None, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_word_tokenizer(tmp_path)
    native = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = HfTokenizer(native, context_length=7, whole_because=whole_because)
    tokens = tokenizer(TEXTS, spans=True)
    assert spelled(tokens, TEXTS) == [text.split()[:6] for text in TEXTS]
    check_specials_have_no_span(tokens, num_special=1)


def tokenizers(folder: Path) -> dict[str, Any]:
    """Every kind of tokenizer that can say where its tokens stand."""
    from transformers import AutoTokenizer

    save_word_tokenizer(folder)
    native, named = AutoTokenizer.from_pretrained(folder), {"hf_tokenizer_name": str(folder)}
    return {
        "CLIP": clip(),
        "CLIP, cut": clip().padded(None),
        "CLIP, canonical": clip(clean="canonicalize"),
        "transformers in open_clip": make_tokenizer({"context_length": 24, **named}),
        "transformers": HfTokenizer(native, context_length=24),
        "transformers, canonical": HfTokenizer(native, context_length=24, canonical=True),
        "trained": TrainedTokenizer.train(CAPTIONS * 2, vocab_size=200, context_length=24),
    }


def test_spans_are_looked_for_where_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And change nothing else of the tokens."""
    texts = (*CAPTIONS, *TEXTS, "a dog&#39;s ball", "long " * 50)
    made = tokenizers(tmp_path)
    expected = {name: tokenizer(texts, spans=True) for name, tokenizer in made.items()}
    for place in ("BytePairSpans", "TransformersSpans"):
        monkeypatch.setattr(f"cmapkd.models.spans.{place}.__call__", None)  # nobody may look now
    monkeypatch.setattr("cmapkd.models.hf_tokenizer.moved_spans", None)
    for name, tokenizer in made.items():
        found, whole = tokenizer(texts), expected[name]
        assert whole.spans is not None, name
        assert found.spans is None, name
        assert digest(found) == digest(replace(whole, spans=None)), name


def test_slow_tokenizers_tell_nothing() -> None:
    class Slow:
        is_fast = False

        def __len__(self) -> int:
            return 5

        def __call__(self, texts: list[str], *, return_offsets_mapping: bool, **settings: Any) -> dict[str, Any]:
            assert not return_offsets_mapping
            return {"input_ids": torch.ones(1, 3), "attention_mask": torch.ones(1, 3)}

    assert HfTokenizer(Slow(), context_length=3)(["a"], spans=True).spans is None


def test_spans_travel(tmp_path: Path) -> None:
    """To another process with the tokenizer, and to a device with the batch."""
    for tokenizer in (clip(), TrainedTokenizer.train(CAPTIONS * 2, vocab_size=100, context_length=9)):
        tokens = tokenizer(CAPTIONS, spans=True)
        again = pickle.loads(pickle.dumps(tokenizer))(CAPTIONS, spans=True)  # noqa: S301
        assert tokens.spans is not None
        assert torch.equal(tokens.spans, again.spans)
        moved = ModelInput(torch.zeros(1), tokens).to("cpu").texts
        assert torch.equal(moved.spans, tokens.spans)
    assert TokenBatch(torch.zeros(1, 2), torch.ones(1, 2)).to("cpu").spans is None

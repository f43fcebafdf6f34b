"""Models that write with the tokens that some texts need: rows, ids and texts against the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vlm_support import MAKERS, asked, make_vlm, picture

from cmapkd.config import ConfigError
from cmapkd.data.dialogues import join_items
from cmapkd.models import ModelConfig, build_model
from cmapkd.models.kept_tokens import cut_tokenizer, kept_tokens
from cmapkd.models.shared_vocabulary import kept_of
from cmapkd.models.tiny_vlm_words import byte_tokenizer

KEPT = ("Is there a red circle?", "yes", "no")
UNSEEN = ("How many squares are there?", "naïve 日本 🙂 \x00\n\t  squares", "ça", "\u2028 a  b ")


def saved(kind: str, folder: Path) -> str:
    make_vlm(kind).save(folder / kind)
    return f"hf:{folder / kind}"


def cut_of(name: str, texts: tuple[str, ...] = KEPT, **options: Any) -> Any:
    return build_model(ModelConfig(name=name, options={"vocabulary": "texts", **options}), captions=texts)


@pytest.mark.parametrize("kind", MAKERS)
def test_kept_tokens_have_the_rows_and_states_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    """Also saved: transformers reads the folder, and ours gives the same states bit for bit."""
    name = saved(kind, tmp_path)
    whole: Any = build_model(name)
    small = cut_of(name)
    kept = kept_of(whole.vocabulary, small.vocabulary)
    assert kept is not None
    assert 256 < len(kept) == small.vocabulary.size == small.vocabulary.rows < whole.vocabulary.size
    ids = torch.tensor(kept)
    torch.testing.assert_close(small.head.weight, whole.head.weight[ids], rtol=0, atol=0)
    dialogue = (asked(KEPT[0], "yes"), [picture(0)])
    inputs = [join_items([model.processor.read(*dialogue)], model.processor.pad_id) for model in (whole, small)]
    assert torch.equal(ids[inputs[1].texts.ids], inputs[0].texts.ids)
    with torch.no_grad():
        states = [model(given).hidden["answer"].values for model, given in zip((whole, small), inputs, strict=True)]
    torch.testing.assert_close(states[1], states[0], rtol=1e-6, atol=1e-6)
    logits = [model.logits(rows) for model, rows in zip((whole, small), states, strict=True)]
    torch.testing.assert_close(logits[1], logits[0][:, ids], rtol=1e-5, atol=1e-5)
    assert [kept[end] for end in small.vocabulary.end_ids] == list(whole.vocabulary.end_ids)
    for text in UNSEEN:
        assert small.processor.decode(small.processor.encode_answer(text)[:-1]) == text
    small.save(tmp_path / "small")
    again: Any = build_model(f"hf:{tmp_path / 'small'}")
    assert again.vocabulary == small.vocabulary
    assert again.processor.fingerprint() == small.processor.fingerprint()
    with torch.no_grad():
        assert torch.equal(again(inputs[1]).hidden["answer"].values, states[1])
    assert small.answer([picture(1)], ["yes?"], max_new_tokens=3) == again.answer(
        [picture(1)], ["yes?"], max_new_tokens=3
    )


def test_texts_whose_tokens_are_kept_have_the_same_ones_and_others_survive() -> None:
    texts = ("a red circle", "red circles and squares", "there are 2 squares", "naïve", "the other side of it")
    whole = byte_tokenizer((*texts, "circumference of the squarest") * 6, size=420)
    kept = kept_tokens(whole, texts[:3], name="it")
    small = cut_tokenizer(whole, kept, name="it")
    assert len(small) == len(kept) < len(whole)
    for text in texts[:3]:
        assert [kept[number] for number in small(text)["input_ids"]] == whole(text)["input_ids"]
    longer = 0
    for text in (*texts[3:], *UNSEEN, "circumference of the squarest", "<|im_end|> is no text"):
        ids = small(text)["input_ids"]
        assert small.decode(ids) == whole.decode(whole(text)["input_ids"]) == text
        if set(whole(text)["input_ids"]) <= set(kept):
            assert [kept[number] for number in ids] == whole(text)["input_ids"]
        longer += len(ids) > len(whole(text)["input_ids"])
    assert longer > 1


def test_of_all_texts_of_the_tokenizer_nothing_is_left_out() -> None:
    texts = ("a red circle", "squares")
    whole = byte_tokenizer(texts * 4, size=300)
    kept = kept_tokens(whole, [*texts, *(whole.decode([number]) for number in range(4, len(whole)))], name="it")
    assert kept == list(range(len(whole)))
    assert cut_tokenizer(whole, kept, name="it").get_vocab() == whole.get_vocab()


def test_sentencepiece_texts_survive_by_their_bytes() -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdé", "ab", "cd", "▁ab", "abcd"]
    merges = [("a", "b"), ("c", "d"), ("▁", "ab"), ("ab", "cd")]
    ids = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    whole = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    kept = kept_tokens(whole, ["ab"], name="it")
    small = cut_tokenizer(whole, kept, name="it")
    assert [pieces[number] for number in kept[259:]] == ["▁", "a", "b", "ab", "▁ab"]
    assert small("ab")["input_ids"] == [small.bos_token_id, small.convert_tokens_to_ids("▁ab")]
    for text in ("ab", "abcd", "é c", "日本"):
        assert small.decode(small(text)["input_ids"], skip_special_tokens=True) == text


def test_an_assembled_model_and_a_tiny_one_are_cut_too(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokens = byte_tokenizer(("Is there a red circle?", "many squares", "yes", "no") * 4, size=330)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    ends = {"eos_token_id": tokens.eos_token_id, "pad_token_id": tokens.pad_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    language = Qwen2ForCausalLM(Qwen2Config(vocab_size=400, num_key_value_heads=2, **sizes, **ends))
    language.save_pretrained(tmp_path / "language")
    tokens.save_pretrained(tmp_path / "language")
    halves: dict[str, Any] = {"image": "tiny:scenes-teacher", "text": f"hf:{tmp_path / 'language'}"}
    whole: Any = build_model(ModelConfig(name="vlm:a", options=halves))
    small = cut_of("vlm:a", **halves)
    kept = kept_of(whole.vocabulary, small.vocabulary)
    assert kept is not None
    torch.testing.assert_close(small.head.weight, whole.head.weight[torch.tensor(kept)], rtol=0, atol=0)
    small.save(tmp_path / "saved")
    from cmapkd.models import load_model

    again: Any = load_model(tmp_path / "saved")
    assert again.vocabulary == small.vocabulary
    tiny: Any = build_model(
        ModelConfig(name="tiny_vlm:small", options={"vocabulary": "texts"}), captions=KEPT, teacher=whole
    )
    own = kept_of(whole.vocabulary, tiny.vocabulary)
    assert own is not None
    assert len(own) == tiny.vocabulary.rows < whole.vocabulary.size


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    name = saved("llava", tmp_path)
    with pytest.raises(ConfigError, match="needs training texts"):
        build_model(ModelConfig(name=name, options={"vocabulary": "texts"}))
    with pytest.raises(ConfigError, match="vocabulary"):
        cut_of(name, vocabulary="some")
    with pytest.raises(ConfigError, match="set vocab_size instead"):
        cut_of("tiny_vlm:small")
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(ConfigError, match="the tokenizer of it is WordLevel"):
        kept_tokens(PreTrainedTokenizerFast(tokenizer_object=words), ["a"], name="it")
    letters = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    with pytest.raises(ConfigError, match="does not know all bytes"):
        kept_tokens(PreTrainedTokenizerFast(tokenizer_object=letters), ["a"], name="it")

"""Students that embed with fewer words: every kind of tokenizer, every family, kept texts and others."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

import cmapkd
from cmapkd.config import ConfigError
from cmapkd.data.open import open_source
from cmapkd.data.templates import get_class_prompts
from cmapkd.evaluation.efficiency import parameter_counts
from cmapkd.export.layout import tokenizer_differences, write_tokenizer
from cmapkd.export.library import _write_open_clip
from cmapkd.models import DualEncoder, ModelConfig, build_model, load_model
from cmapkd.models.cut_words import cut_encoder, cut_table, kept_of_clip
from cmapkd.models.kept_tokens import cut_tokenizer, kept_tokens
from cmapkd.models.parts import word_tables
from cmapkd.run import RunConfig, open_training
from cmapkd.run.texts import training_texts

sys.path.insert(0, str(Path(__file__).parents[1] / "families"))
from family_support import FAMILIES, SIZES, make
from model_support import images, randomise, same_tokens

TRAINED_ON = (
    "a red square beside two blue circles",
    "the quick brown foxes' 12 dogs jumped over",
    "naïve café walks tonight",
    "green triangles under small squares, a dog",
    "walking walked jumps jumping squared circled",
) * 3
KEPT = ("a red square", "Two blue circles jumped", "naïve dog's ☃ 漢 fox", "walked", "")
OTHER = "unknownish GREEN zebra ☃ é"


def wordpiece() -> Any:
    from transformers import BertTokenizer

    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=160, special_tokens=special, show_progress=False)
    inner.train_from_iterator(TRAINED_ON, trainer)
    return BertTokenizer(vocab=inner.get_vocab())


def unigram() -> Any:
    from transformers import T5Tokenizer

    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False)
    inner.train_from_iterator(TRAINED_ON, trainer)
    pieces = json.loads(inner.to_str())["model"]["vocab"]
    return T5Tokenizer(vocab=[tuple(each) for each in pieces], extra_ids=0)


def bytes_of_gpt2() -> Any:
    from transformers import RobertaTokenizer

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(TRAINED_ON, trainer)
    model = json.loads(inner.to_str())["model"]
    return RobertaTokenizer(vocab=model["vocab"], merges=[tuple(each) for each in model["merges"]])


def clip() -> Any:
    """CLIP's first 3,000 merges."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    letters, merges = pre_tokenizers.ByteLevel.alphabet(), list(SimpleTokenizer().bpe_ranks)[:3000]
    pieces = [*letters, *(f"{each}</w>" for each in letters), *("".join(pair) for pair in merges)]
    special = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys([*pieces, *special]))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges)


KINDS: dict[str, Callable[[], Any]] = {"WordPiece": wordpiece, "Unigram": unigram, "bytes": bytes_of_gpt2, "CLIP": clip}


@pytest.mark.parametrize("kind", KINDS)
def test_kept_texts_have_the_same_tokens(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    whole = KINDS[kind]()
    draw = random.Random(0)
    words = [word for text in (*TRAINED_ON[:5], *KEPT) for word in text.split()]
    made = [" ".join(draw.choices(words, k=5)) + draw.choice(["", "!", " zzq", "☃x"]) for _ in range(40)]
    for texts in (KEPT, made):
        kept = kept_tokens(whole, texts, name="it", writes=False)
        cut = cut_tokenizer(whole, kept, name="it", writes=False)
        assert len(cut) == len(kept) < len(whole)
        for text in texts:
            assert [kept[number] for number in cut(text)["input_ids"]] == whole(text)["input_ids"], text
    cut.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*made, OTHER):
        assert again(text)["input_ids"] == cut(text)["input_ids"]
    spelled = again(OTHER)["input_ids"]
    if kind in ("bytes", "CLIP"):  # nothing is lost
        left, right = (each.decode(each(OTHER)["input_ids"], skip_special_tokens=True) for each in (again, whole))
        assert left.split() == right.split()
    else:  # letters of ASCII are spelled, others are unknown
        assert spelled.count(cut.unk_token_id) in (2, 3)


def test_an_unknown_word_stays_unknown() -> None:
    """Without its first piece, WordPiece would find another way through it."""
    from transformers import BertTokenizer

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ab", "a", "##bcd", "x", "##y"]
    whole = BertTokenizer(vocab={piece: number for number, piece in enumerate(pieces)})
    assert whole.tokenize("abcd a") == ["[UNK]", "a"]
    kept = kept_tokens(whole, ["abcd a"], name="it", writes=False)
    cut = cut_tokenizer(whole, kept, name="it", writes=False)
    assert cut.tokenize("abcd a") == ["[UNK]", "a"]
    assert cut.tokenize("xy") == ["x", "##y"]  # letters are kept


def texts_of(name: str) -> tuple[str, ...]:
    return ("a red square", "two blue circles") if name not in ("open_clip", "timm") else KEPT


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("tiny", "joined", "open_clip RN50-like")])
@torch.no_grad()
def test_every_family_embeds_kept_texts_alike(name: str, tmp_path: Path) -> None:
    whole = make(name, tmp_path / "native")
    randomise(whole)
    texts = list(texts_of(name))
    cut: Any = deepcopy(whole).with_words_of(texts)
    assert cut.num_parameters() < whole.num_parameters()
    assert cut.tokenizer.vocab_size < whole.tokenizer.vocab_size
    tables = word_tables(cut, cut.tokenizer.vocab_size)  # and no table of places, however few words are left
    assert [table.num_embeddings for table in tables] == [cut.tokenizer.vocab_size]
    expected, found = (model.encode_text(model.tokenizer(texts)).embedding for model in (whole, cut))
    assert torch.equal(found, expected)
    assert torch.equal(cut.tokenizer(texts).mask, whole.tokenizer(texts).mask)
    assert (cut.whole_texts is None) == (whole.whole_texts is None)
    other = [*texts, OTHER]  # whatever it becomes, the folder reads it alike
    cut.save(tmp_path / "saved")
    again: Any = load_model(tmp_path / "saved")
    assert isinstance(again, DualEncoder)
    assert same_tokens(again.tokenizer(other), cut.tokenizer(other))
    assert torch.equal(
        again.encode_text(again.tokenizer(other)).embedding, cut.encode_text(cut.tokenizer(other)).embedding
    )
    again.save(tmp_path / "twice")
    twice: Any = load_model(tmp_path / "twice")
    assert same_tokens(twice.tokenizer(other), cut.tokenizer(other))
    spans, theirs = (model.tokenizer(texts, spans=True).spans for model in (cut, whole))
    assert spans is None or (theirs is not None and torch.equal(spans, theirs))
    assert not (tmp_path / "saved" / "open_clip_config.json").exists()  # it would read other tokens
    if name != "parts":  # whose tokenizer of whole words says it all; the others' are put together anew
        (tmp_path / "exported").mkdir()
        write_tokenizer(cut, tmp_path / "exported")
        assert tokenizer_differences(cut, tmp_path / "exported", other) == []


@pytest.mark.parametrize("name", ["open_clip", "timm, SigLIP"])
@torch.no_grad()
def test_words_can_be_cut_twice(name: str, tmp_path: Path) -> None:
    """The second cut numbers ids anew that the first had numbered, and a folder names those of the whole tokenizer."""
    whole = make(name, tmp_path / "native")
    randomise(whole)
    texts = list(texts_of(name))
    expected = whole.encode_text(whole.tokenizer(texts[:1])).embedding
    whole.with_words_of(texts).save(tmp_path / "once")
    once: Any = load_model(tmp_path / "once")
    size = once.tokenizer.vocab_size
    once.with_words_of(texts[:1]).save(tmp_path / "twice")
    twice: Any = load_model(tmp_path / "twice")
    assert twice.tokenizer.vocab_size == once.tokenizer.vocab_size < size
    assert torch.equal(twice.encode_text(twice.tokenizer(texts[:1])).embedding, expected)
    assert same_tokens(twice.tokenizer([*texts, OTHER]), once.tokenizer([*texts, OTHER]))


def test_a_run_with_fewer_words(tmp_path: Path) -> None:
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
    }
    (tmp_path / "small.json").write_text(json.dumps(config))
    student = {"name": f"open_clip:{tmp_path / 'small.json'}", "vocabulary": "texts"}
    values: dict[str, Any] = {
        "student": student,
        "data": {"train": "scenes?length=40", "test": "scenes?length=20"},
        "method": "contrastive",
        "training": {"steps": 2, "batch_size": 8, "device": "cpu"},
        "baseline": "none",
    }
    cmapkd.distill(**values, out=tmp_path / "run", quiet=True)
    model: Any = load_model(tmp_path / "run")
    assert 512 < model.tokenizer.vocab_size < 900
    table = model.model.token_embedding.weight
    assert table.shape == (model.tokenizer.vocab_size, 16)
    counts = parameter_counts(model, images(model), model.tokenizer(["a"]))
    assert counts["text_embedding"] == table.numel()


def read_by(method: Any, heads: Any = None, **evaluation: Any) -> tuple[list[str], tuple[str, ...]]:
    """What a student's words are cut to, and the names of the classes."""
    values = {
        "student": "tiny:debug",
        "teacher": "tiny:scenes-teacher",
        "data": {"train": "scenes?length=4&descriptions=true"},
        "method": method,
        "heads": heads,
        "training": {"steps": 2, "batch_size": 4},
        "evaluation": evaluation,
    }
    config = RunConfig.from_mapping(values)
    source = open_training(config)
    assert source.class_names is not None
    return [*training_texts(config, source)], tuple(source.class_names)


def test_words_are_cut_to_all_that_the_run_reads(tmp_path: Path) -> None:
    found, names = read_by("clip_kd", templates="none")
    assert found[-len(names) :] == [*names]
    found, names = read_by("clip_kd", class_prompts="own", templates="plain")
    own = get_class_prompts("own", names, open_source("scenes?length=4&descriptions=true"))
    assert {text for texts in own for text in texts} | {*names} <= {*found}
    (tmp_path / "lines.txt").write_text("an unheard sentence\nanother\n")
    found, _ = read_by({"name": "zscl", "reference": "train", "sentences": str(tmp_path / "lines.txt")})
    assert found[-2:] == ["an unheard sentence", "another"]
    found, names = read_by({"name": "biomedcoop", "context": "an intriguing", "template": "{} specimen"})
    assert {"an intriguing", *(f"{name} specimen" for name in names)} <= {*found}
    found, _ = read_by("clip_kd", {"vqa": 1.0, "detection": 1.0}, templates="plain")
    sample = open_source("scenes?length=4&descriptions=true")[0]
    assert {sample.questions[0].question, sample.boxes[0].name} <= {*found}
    with pytest.raises(ConfigError, match=r"nofile\.json"):
        read_by("biomedcoop", class_prompts="nofile.json")
    assert read_by("clip_kd", class_prompts="nofile.json")  # the evaluation's data may have other classes


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    import transformers

    with pytest.raises(ConfigError, match="needs training texts"):
        build_model(ModelConfig(name="open_clip:RN50", vocabulary="texts", options={"context_length": 8}))
    with pytest.raises(ConfigError, match=r"not for tiny.*a tiny model learns its own words"):
        build_model(ModelConfig(name="tiny:debug", vocabulary="texts"), captions=["a b c d e f"] * 2)
    with pytest.raises(ConfigError, match=r"set options\.vocabulary: texts"):
        build_model(ModelConfig(name="tiny_vlm:small", vocabulary="texts"), captions=["a b c d e f"] * 2)
    with pytest.raises(ConfigError, match="it has a SimpleNamespace"):
        kept_of_clip(SimpleNamespace(), ["a"], name="it")
    with pytest.raises(ConfigError, match=r"fast tokenizers .* the tokenizer of it is SimpleNamespace"):
        kept_tokens(SimpleNamespace(), ["a"], name="it", writes=False)
    with pytest.raises(ConfigError, match="the id 9, and the word table 4 rows"):
        cut_table(torch.nn.Embedding(4, 2), [0, 9])
    roberta = transformers.RobertaModel(transformers.RobertaConfig(vocab_size=20, pad_token_id=3, **SIZES))
    with pytest.raises(ConfigError, match="counts places from the id of its padding, 3"):
        cut_encoder(roberta, [0, 3, 4], name="it")
    cut: Any = make("open_clip", tmp_path / "native").with_words_of(KEPT)
    with pytest.raises(ValueError, match=r"has its own vocabulary of .* open_clip would read texts with the whole one"):
        _write_open_clip(cut, tmp_path / "out")

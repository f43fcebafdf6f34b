from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import TEXTS, check_contract, check_round_trip, hooked, images, inputs

from cmapkd.config import ConfigError
from cmapkd.data.types import TokenBatch
from cmapkd.models import ModelConfig, build_model, load_model
from cmapkd.models.load import check_name
from cmapkd.models.storage import DESCRIPTION
from cmapkd.models.tiny import PRESETS, TinyDualEncoder
from cmapkd.models.vocabulary import TrainedTokenizer

CAPTIONS = [f"{text} number {n}" for n in range(3) for text in TEXTS]


def small(captions: Iterable[str] | None = CAPTIONS, **options: Any) -> TinyDualEncoder:
    torch.manual_seed(0)
    model = build_model(ModelConfig(name="tiny:debug", options=options), captions=captions)
    assert isinstance(model, TinyDualEncoder)
    return model


def test_contract_and_round_trip(tmp_path: Path) -> None:
    model = small()
    assert not model.training
    check_contract(model)
    check_round_trip(model, tmp_path)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_levels_they_say(preset: str) -> None:
    model = build_model(f"tiny:{preset}", captions=CAPTIONS)
    options = PRESETS[preset]
    assert [level.name for level in model.image_levels] == [f"blocks.{n}" for n in range(options.vision_depth)]
    assert {level.width for level in model.text_levels} == {options.text_width}
    assert (model.embed_dim, model.image_spec.size) == (options.embed_dim, options.image_size)


@torch.no_grad()
def test_levels_are_the_blocks_own_outputs() -> None:
    model = small(image_size=48)
    batch = inputs(model)
    expected = hooked(model.vision.blocks, lambda: model.vision(batch.images))  # type: ignore[arg-type]
    levels = model.encode_image(batch.images, ["blocks.0", "blocks.1"]).levels
    for value, level in zip(expected, levels.values(), strict=True):
        assert torch.equal(level.values, value)
        assert (level.num_prefix, level.grid, level.values.shape) == (1, (6, 6), (3, 37, 32))


@torch.no_grad()
def test_padding_does_not_change_a_text() -> None:
    model = small()
    alone, together = model.tokenizer([TEXTS[0]]), model.tokenizer(TEXTS)
    assert alone.ids.shape[1] < together.ids.shape[1]
    torch.testing.assert_close(
        model.encode_text(alone).embedding[0], model.encode_text(together).embedding[0], rtol=1e-5, atol=1e-6
    )
    longer = TokenBatch(
        torch.cat([alone.ids, alone.ids[:, :1]], 1), torch.cat([alone.mask, torch.zeros(1, 1).bool()], 1)
    )
    torch.testing.assert_close(model.encode_text(longer).embedding, model.encode_text(alone).embedding)


def test_vocabulary_is_the_same_for_the_same_captions(tmp_path: Path) -> None:
    first = TrainedTokenizer.train(CAPTIONS, vocab_size=64, context_length=8)
    second = TrainedTokenizer.train(CAPTIONS, vocab_size=64, context_length=8)
    first.save(tmp_path)
    third = TrainedTokenizer.load(tmp_path, context_length=8)
    for other in (second, third):
        assert torch.equal(first(TEXTS).ids, other(TEXTS).ids)
    assert first(["red " * 50]).ids.shape == (1, 8)
    assert first(["RED Square"]).ids.tolist() == first(["red square"]).ids.tolist()


def test_clamp_keeps_the_scale_between_one_and_a_hundred() -> None:
    model = small()
    for start, kept in ((9.0, 100.0), (-1.0, 1.0)):
        with torch.no_grad():
            model.log_logit_scale.fill_(start)
        model.clamp_logit_scale()
        assert model(inputs(model)).logit_scale.item() == pytest.approx(kept, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tiny:smal", {}, r"no model tiny:smal \(did you mean 'small'\?\)"),
        ("tiny:small", {"pach_size": 8}, r"pach_size: unknown key \(did you mean 'patch_size'\?\)"),
        ("tiny:small", {"patch_size": 12}, "power of two, got 12"),
        ("tiny:small", {"image_size": 60}, "image_size 60 is not a multiple of patch_size 16"),
    ],
)
def test_what_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(ModelConfig(name=name, options=options), captions=CAPTIONS)


def test_an_untrained_model_needs_captions() -> None:
    with pytest.raises(ConfigError, match="learns its vocabulary from captions"):
        small(captions=None)
    with pytest.raises(ValueError, match="no captions to learn a vocabulary from"):
        small(captions=[])


def test_unknown_level_names_the_closest() -> None:
    model = small()
    with pytest.raises(ValueError, match=r"no image level 'block\.0' \(did you mean 'blocks\.0'\?\)"):
        model.encode_image(images(model), ["block.0"])


def test_what_is_neither_picture_nor_text_is_said(tmp_path: Path) -> None:
    model = build_model("tiny:scenes-teacher")
    with pytest.raises(IsADirectoryError, match="is a folder: give the files in it"):
        model.embed(images=[tmp_path])
    with pytest.raises(TypeError, match="texts is of type int: give one, or a list of them"):
        model.embed(texts=5)  # type: ignore[arg-type]


def test_a_wrong_name_is_refused_without_building(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no model tiny:smal \(did you mean 'small'\?\)"):
        check_name("tiny:smal")
    for known in ("tiny:small", "tiny_vlm:small", "open_clip:ViT-B-32/openai", str(tmp_path)):
        check_name(known)
    with pytest.raises(ConfigError, match="names no family"):
        check_name("nothing")


def test_a_folder_of_runs_names_them_and_a_misspelt_one_is_known(tmp_path: Path) -> None:
    (tmp_path / "runs" / "first" / "student").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "student" / DESCRIPTION).write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"is no model, but has .*runs/first: name one of them"):
        load_model(tmp_path / "runs")
    with pytest.raises(ConfigError, match=r"did you mean '.*runs/first'"):
        build_model(str(tmp_path / "runs" / "firts"))

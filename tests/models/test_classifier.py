"""Classifiers: towers of every library, heads, what they answer, folders, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import cmapkd
from cmapkd.config import ConfigError
from cmapkd.models import Classifier, ModelConfig, build_model, load_model
from cmapkd.models.classifier import AnswerRule, ClassHeadConfig
from cmapkd.models.reading import reader_of
from cmapkd.models.untrained import note_trained, remark_on_untrained
from helpers import make_classifier

CLASSES = ("cat", "dog", "boat")
TWO = {"labels": ClassHeadConfig(), "teacher": ClassHeadConfig(unit=True, scale=10.0)}
MIX = AnswerRule(heads=("labels", "teacher"), alpha=0.25, beta=2.0)
PICTURES = [Image.new("RGB", (20, 14), colour) for colour in ("red", "green", "blue")]


def classifier(**options: Any) -> Classifier:
    model = make_classifier(**options)
    model.set_heads(CLASSES, TWO, MIX)
    return model.eval()


@pytest.mark.parametrize("name", ["tiny:debug", "timm:test_vit"])
def test_every_family_of_towers_answers_and_is_saved(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(name=f"classifier:{name}"))
    assert isinstance(model, Classifier)
    assert model.random_towers == ("image",)
    assert "image tower is untrained" in str(remark_on_untrained(model))
    note_trained(model)
    assert remark_on_untrained(model) is None
    model.set_heads(CLASSES, TWO, MIX)
    model.eval().save(tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert isinstance(again, Classifier)
    assert (again.class_names, again.rule, again.head_configs) == (CLASSES, MIX, TWO)
    assert torch.equal(again.classify(PICTURES), model.classify(PICTURES))
    assert not [*(tmp_path / "model").rglob("*.pt"), *(tmp_path / "model").rglob("*.bin")]


def test_the_rule_is_the_formula() -> None:
    model = classifier()
    pixels = torch.stack([model.image_spec(picture) for picture in PICTURES])
    with torch.no_grad():
        f = model.encode_image(pixels).embedding
        first = model.heads["labels"](f)
        second = 10 * model.heads["teacher"](F.normalize(f, dim=-1))
    expected = 0.25 * first.softmax(-1) + 0.75 * (second / 2).softmax(-1)
    torch.testing.assert_close(model.classify(PICTURES, batch_size=2), expected)
    torch.testing.assert_close(expected.sum(1), torch.ones(3))
    model.rule = AnswerRule(heads=("labels",))
    torch.testing.assert_close(model.classify(PICTURES), first.softmax(-1))
    assert model.classify([]).shape == (0, 3)


@torch.no_grad()
def test_a_head_of_unit_features_is_exact_under_autocast() -> None:
    model = classifier()
    features = 5 * torch.randn(64, model.embed_dim, generator=torch.Generator().manual_seed(0))
    expected = {head: model.logits(head, features) for head in TWO}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.logits("teacher", features), expected["teacher"])
        assert model.logits("labels", features).dtype == torch.bfloat16  # as the tower's layers are
        assert model.logits("teacher", features.bfloat16()).dtype == torch.float32


def test_parts_and_modes() -> None:
    model = classifier()
    names = {name for name, _ in model.named_parameters()}
    assert model.parts["image"] | model.parts["heads"] == names
    assert model.parts["heads"] == {f"heads.{head}.{part}" for head in TWO for part in ("weight", "bias")}
    model.image.requires_grad_(False)
    assert not model.train().image.training
    assert model.heads["labels"].training
    reader = reader_of(model)
    assert reader.tokenize(["a", "b"]).ids.shape == (2, 1)  # type: ignore[attr-defined]


def test_heads_that_are_there_stay() -> None:
    model = classifier()
    kept = model.heads["labels"].weight
    model.set_heads(CLASSES, {"labels": ClassHeadConfig(), "teacher": ClassHeadConfig()})
    assert model.heads["labels"].weight is kept
    assert model.rule == AnswerRule(heads=("labels",))


def test_what_cannot_be_is_refused() -> None:
    model = classifier()
    with pytest.raises(ValueError, match=r"has learned 3 classes, 'cat', 'dog', 'boat', and the data have 2"):
        model.set_heads(("cat", "dog"), TWO)
    with pytest.raises(ValueError, match="tells classes apart, and there is"):
        make_classifier().set_heads(("cat",), TWO)
    with pytest.raises(ValueError, match="the rule names heads other, and there are labels, teacher"):
        make_classifier().set_heads(CLASSES, TWO, AnswerRule(heads=("other",)))
    with pytest.raises(ValueError, match="has no heads yet"):
        make_classifier().classify(PICTURES)
    with pytest.raises(ValueError, match="alpha and beta are 1"):
        AnswerRule(heads=("labels",), alpha=0.5)
    with pytest.raises(ConfigError, match=r"an image part is named timm:NAME"):
        build_model("classifier:resnet18")
    with pytest.raises(ConfigError, match="classifies pictures"):
        cmapkd.models.dual(model, "cmapkd export")


def test_damaged_folders_are_refused_in_words(tmp_path: Path) -> None:
    classifier().save(tmp_path / "model")
    path = tmp_path / "model" / "cmapkd.json"
    description = json.loads(path.read_text())
    for key, value in (("classes", "cat"), ("heads", {"labels": {"scale": -1}}), ("rule", {"heads": ["x"]})):
        damaged = {**description, "options": {**description["options"], key: value}}
        path.write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=r"classes|head|rule"):
            load_model(tmp_path / "model")

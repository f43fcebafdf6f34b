"""`pictures:`: an image tower alone, as a further teacher of methods that read no texts of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import cmapkd
from cmapkd.cache.layout import RowLayout
from cmapkd.config import ConfigError
from cmapkd.data.types import ModelInput
from cmapkd.models import FrozenTeacher, ModelConfig, build_model
from cmapkd.models.contracts import both_towers
from cmapkd.models.no_texts import NoTexts
from cmapkd.models.pictures_family import PictureTower
from helpers import make_method, make_model, make_teacher


def tower(role: str = "eyes") -> FrozenTeacher:
    torch.manual_seed(4)
    return FrozenTeacher(build_model("pictures:timm:resnet10t"), role)


def test_embeddings_are_pooled_features_and_texts_have_none(tmp_path: Path) -> None:
    model = tower().model
    assert isinstance(model, PictureTower)
    assert model.random_towers == ("image",)
    assert model.embed_dim == 512
    pixels = torch.randn(2, 3, model.image_spec.size, model.image_spec.size)
    features = model(ModelInput(pixels, model.tokenizer(["a", "b"])))
    assert torch.equal(features.image.embedding, model.image.visual.trunk(pixels))
    assert features.text.embedding.shape == (2, 0)
    layout = RowLayout.of(features, kind="global", store="fp32", context_length=1)
    assert layout.row_bytes >= 4 * 512
    model.save(tmp_path)
    loaded = cmapkd.load(tmp_path)
    assert torch.equal(loaded.encode_image(pixels).embedding, features.image.embedding)
    assert loaded.tokenizer == NoTexts()
    with pytest.raises(ValueError, match=r"has no text level 'blocks.0'"):
        model.encode_text(model.tokenizer("a"), ("blocks.0",))


def test_parts_and_options() -> None:
    model = build_model(ModelConfig(name="pictures:tiny:small", options={}))
    assert {part: bool(names) for part, names in model.parts.items()} == {
        "image": True,
        "text": False,
        "projections": False,
        "scale": True,
    }
    with pytest.raises(ConfigError, match=r"pictures:tiny:small: tiny:small cannot pool by 'avg': leave pooling out"):
        build_model(ModelConfig(name="pictures:tiny:small", options={"pooling": "avg"}))


def test_a_model_without_texts_is_refused_where_texts_are_read() -> None:
    eyes = tower()
    with pytest.raises(ConfigError, match=r"mobileclip reads texts of every teacher, and teacher eyes, pictures"):
        make_method("mobileclip", more_teachers=[eyes])
    with pytest.raises(ConfigError, match=r"the teacher pictures:timm:resnet10t has no text tower: .*more_teachers"):
        make_method("hinton", teacher=tower("teacher"))
    with pytest.raises(ConfigError, match=r"the student pictures:timm:resnet10t has no text tower"):
        make_method("hinton", student=eyes.model, teacher=make_teacher())
    make_method("mobileclip", more_teachers=[FrozenTeacher(make_model(), "other")])
    with pytest.raises(ConfigError, match=r"cmapkd export needs .* pictures:timm:resnet10t has an image tower alone"):
        both_towers(eyes.model, "cmapkd export")

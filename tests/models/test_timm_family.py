from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from model_support import (
    TEXTS,
    check_contract,
    check_round_trip,
    hooked,
    images,
    inputs,
    offline,
    picture,
    randomise,
    whole,
)
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from cmapkd.config import ConfigError
from cmapkd.models import ModelConfig, build_model
from cmapkd.models.open_clip_model import OpenClipModel
from cmapkd.models.picture_attention import has_class_token

TEXT = {"embed_dim": 24, "text_width": 32, "text_layers": 2, "text_heads": 2, "context_length": 16}
OWN = "cmapkd_vit_reg4"  # registered below


@pytest.fixture(autouse=True)
def small_register_vit() -> Iterator[None]:
    """A ViT with a class token and four registers on a grid of 4 x 4, in timm's own registry."""

    def create(pretrained: bool = False, **settings: Any) -> VisionTransformer:
        (
            settings.pop("pretrained_cfg", None),
            settings.pop("pretrained_cfg_overlay", None),
            settings.pop("cache_dir", None),
        )
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "reg_tokens": 4}
        model = VisionTransformer(**{**sizes, **settings})
        model.pretrained_cfg = model.default_cfg = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
        return model

    registry = timm.models._registry
    registry._model_entrypoints[OWN] = create
    entry = timm.models.PretrainedCfg(input_size=(3, 32, 32), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    registry._model_pretrained_cfgs[OWN] = entry
    yield
    del registry._model_entrypoints[OWN], registry._model_pretrained_cfgs[OWN]


def small(name: str, **options: Any) -> OpenClipModel:
    torch.manual_seed(0)
    model = build_model(ModelConfig(name=f"timm:{name}", options={**TEXT, **options}))
    assert isinstance(model, OpenClipModel)
    randomise(model)
    return model


def check_against_trunk(model: OpenClipModel, blocks: list[str]) -> None:
    """Every level is what the named module of the timm trunk returns, and the embedding is open_clip's own."""
    trunk, pixels = model.model.visual.trunk, images(model)
    with torch.no_grad():
        expected = hooked([trunk.get_submodule(name) for name in blocks], lambda: trunk(pixels))
        output = model.encode_image(pixels, [level.name for level in model.image_levels])
        for value, level in zip(expected, output.levels.values(), strict=True):
            torch.testing.assert_close(level.values, value, rtol=0, atol=1e-6)
        torch.testing.assert_close(output.embedding, model.model.visual(pixels), rtol=0, atol=1e-6)


CONVOLUTIONAL = {
    "resnet18": ["layer1", "layer2", "layer3", "layer4"],
    "mobilenetv3_small_050": ["blocks.0", "blocks.1", "blocks.3", "blocks.5"],
    "mobilevit_xxs": ["stages.0", "stages.1", "stages.2", "stages.3", "final_conv"],
    "test_convnext": ["stages.0", "stages.1", "stages.2", "stages.3"],
}


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_convolutional_towers_have_stages(name: str) -> None:
    model = small(name, image_size=64)
    assert [level.name for level in model.image_levels] == [f"stages.{n}" for n in range(len(CONVOLUTIONAL[name]))]
    assert {level.layout for level in model.image_levels} == {"map"}
    check_against_trunk(model, CONVOLUTIONAL[name])


@pytest.mark.parametrize(
    ("name", "options", "prefix", "grid"),
    [
        ("test_vit", {}, 1, (10, 10)),
        ("test_vit", {"image_size": 48}, 1, (3, 3)),
        ("test_vit3", {}, 1, (10, 10)),
        (OWN, {}, 5, (4, 4)),
        (OWN, {"timm_pool": "avg", "timm_proj": "mlp"}, 5, (4, 4)),
    ],
)
def test_vits_have_blocks_with_their_prefix_tokens(
    name: str, options: dict[str, Any], prefix: int, grid: tuple[int, int]
) -> None:
    model = small(name, **options)
    check_against_trunk(model, [level.name for level in model.image_levels])
    with torch.no_grad():
        level = model.encode_image(images(model), ["blocks.1"]).levels["blocks.1"]
    assert (level.num_prefix, level.grid) == (prefix, grid)
    assert level.values.shape[1] == prefix + grid[0] * grid[1]


def test_registers_are_no_class_token() -> None:
    assert has_class_token(small(OWN), 5)
    assert has_class_token(small("test_vit"), 1)
    assert not has_class_token(small("test_mambaout", image_size=64), 0)
    alone = small(OWN)
    alone.model.visual.trunk = VisionTransformer(32, 8, class_token=False, reg_tokens=4, global_pool="avg", depth=1)
    assert not has_class_token(alone, 4)


def test_channels_last_towers_have_maps() -> None:
    model = small("test_mambaout", image_size=64)
    assert {level.layout for level in model.image_levels} == {"map"}


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", OWN])
def test_contract_round_trip_and_open_clip_loads_it(name: str, tmp_path: Path) -> None:
    model = small(name) if name == OWN else small(name, image_size=64)
    check_contract(model)
    check_round_trip(model, tmp_path)
    native, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    native.eval()
    batch = inputs(model)
    output = model(batch)
    assert torch.equal(native.encode_image(batch.images), output.image.embedding)
    expected = native.encode_text(whole(model, batch.texts).ids)
    torch.testing.assert_close(output.text.embedding, expected, rtol=0, atol=1e-6)
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{tmp_path}")(list(TEXTS)), whole(model, batch.texts).ids)
    torch.testing.assert_close(model.image_spec(picture()), preprocess(picture()), rtol=0, atol=1e-6)


def test_a_resized_vit_is_read_back_at_its_size(tmp_path: Path) -> None:
    check_round_trip(small(OWN, image_size=48), tmp_path)


def test_preprocessing_is_timms_own() -> None:
    model = small("mobilenetv3_small_050")
    own = timm.get_pretrained_cfg("mobilenetv3_small_050")
    assert (model.image_spec.mean, model.image_spec.std, model.image_spec.size) == (own.mean, own.std, 224)
    assert model.image_spec.interpolation == own.interpolation


def test_bias_for_a_sigmoid_loss() -> None:
    assert small(OWN).logit_bias is None
    bias = small(OWN, init_logit_bias=-10.0).logit_bias
    assert bias is not None
    assert bias.item() == -10


def test_pretrained_weights_come_from_timms_hub_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "mobilenetv3_small_050.lamb_in1k"
    source = timm.create_model("mobilenetv3_small_050")
    randomise(source)
    cached = tmp_path / "hub" / f"models--timm--{name}"
    (cached / "snapshots" / "0").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0", encoding="utf-8")
    save_file(source.state_dict(), cached / "snapshots" / "0" / "model.safetensors")
    offline(monkeypatch)
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    options = {**TEXT, "image_size": 64}
    model = build_model(ModelConfig(name=f"timm:{name}/pretrained", options=options))
    pixels = images(model)
    with torch.no_grad():
        assert torch.equal(model.model.visual.trunk.forward_features(pixels), source.eval().forward_features(pixels))
    scratch = build_model(ModelConfig(name=f"timm:{name}/pretrained", options=options, init="scratch"))
    assert not torch.equal(scratch.model.visual.trunk.conv_stem.weight, source.conv_stem.weight)
    check_round_trip(model, tmp_path / "saved")
    with pytest.raises(
        ValueError, match=r"mobilenetv3_small_100/pretrained are not on this machine .* timm/mobilenetv3"
    ):
        build_model(ModelConfig(name="timm:mobilenetv3_small_100/pretrained", options=options))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("restnet18", {}, r"timm has no model 'restnet18' \(did you mean 'resnet18'\?\)"),
        ("resnet18.a1_in1", {}, r"resnet18 has no weights 'a1_in1' \(did you mean 'a1_in1k'\?\)"),
        ("resnet18/pretraind", {}, "only /pretrained may stand, not 'pretraind'"),
        (f"{OWN}/pretrained", {}, "no pretrained weights"),
        ("resnet18", {"embed_dims": 3}, r"embed_dims: unknown key \(did you mean 'embed_dim'\?\)"),
        ("resnet18", {"text_width": 30, "text_heads": 4}, "text_width 30 is not a multiple of text_heads 4"),
        (OWN, {"timm_pool": "map"}, "open_clip cannot build"),
        ("mobilenetv3_small_050", {"timm_proj": "mlp"}, r"1024 channels from 288.* leave out timm_proj"),
        ("xcit_nano_12_p16_224", {"image_size": 64}, "images of 224 pixels only, image_size is 64"),
    ],
)
def test_what_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(ModelConfig(name=f"timm:{name}", options={**TEXT, **options}))

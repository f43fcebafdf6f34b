from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import open_clip
import pytest
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
    save_unsafe_pickle,
    save_word_tokenizer,
    whole,
)
from safetensors.torch import load_file, save_file

from cmapkd.config import ConfigError
from cmapkd.models import ModelConfig, build_model
from cmapkd.models.open_clip_model import OpenClipModel

TEXT = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}
VIT = {"image_size": 32, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "vit": {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT},
    "vit_avg": {
        "embed_dim": 24,
        "vision_cfg": {**VIT, "pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True},
        "text_cfg": TEXT,
        "quick_gelu": True,
    },
    "resnet": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
        "text_cfg": TEXT,
    },
    "siglip": {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"},
        "text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True, "width": 64},
    },
}


def write(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "small.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def small(kind: str, folder: Path) -> OpenClipModel:
    torch.manual_seed(0)
    model = build_model(f"open_clip:{write(folder, CONFIGS[kind])}")
    assert isinstance(model, OpenClipModel)
    randomise(model)
    return model


@pytest.mark.parametrize("kind", CONFIGS)
def test_contract_and_round_trip(kind: str, tmp_path: Path) -> None:
    model = small(kind, tmp_path)
    assert not model.training
    check_contract(model)
    check_round_trip(model, tmp_path / "saved")


@pytest.mark.parametrize("kind", CONFIGS)
def test_open_clip_itself_loads_what_was_saved(kind: str, tmp_path: Path) -> None:
    model = small(kind, tmp_path)
    model.save(tmp_path / "saved")
    name = f"local-dir:{tmp_path / 'saved'}"
    native, _, preprocess = open_clip.create_model_and_transforms(name)
    native.eval()
    batch = inputs(model)
    output = model(batch)
    assert torch.equal(open_clip.get_tokenizer(name)(list(TEXTS)), whole(model, batch.texts).ids)
    assert torch.equal(native.encode_image(batch.images), output.image.embedding)
    expected = native.encode_text(whole(model, batch.texts).ids)
    torch.testing.assert_close(output.text.embedding, expected, rtol=0, atol=1e-6)
    assert torch.equal(native.logit_scale.exp(), output.logit_scale)
    torch.testing.assert_close(model.image_spec(picture()), preprocess(picture()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["vit", "vit_avg"])
@torch.no_grad()
def test_vit_levels_are_the_blocks_own_outputs(kind: str, tmp_path: Path) -> None:
    model = small(kind, tmp_path)
    native, batch = model.model, inputs(model)
    expected = hooked(native.visual.transformer.resblocks, lambda: native.encode_image(batch.images))
    output = model.encode_image(batch.images, ["blocks.2", "blocks.0"])
    assert list(output.levels) == ["blocks.2", "blocks.0"]  # as asked
    for name, level in output.levels.items():
        torch.testing.assert_close(level.values, expected[int(name[-1])], rtol=0, atol=1e-6)
        assert (level.num_prefix, level.grid, level.values.shape) == (1, (4, 4), (3, 17, 64))
    torch.testing.assert_close(output.embedding, native.encode_image(batch.images), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["vit", "siglip"])
@torch.no_grad()
def test_text_levels_are_the_blocks_own_outputs(kind: str, tmp_path: Path) -> None:
    model = small(kind, tmp_path)
    native, texts = model.model, inputs(model).texts
    blocks = getattr(native, "text", native).transformer.resblocks
    expected = hooked(blocks, lambda: native.encode_text(whole(model, texts).ids))
    output = model.encode_text(texts, [level.name for level in model.text_levels])
    for value, level in zip(expected, output.levels.values(), strict=True):
        torch.testing.assert_close(level.values, value[:, : texts.ids.shape[1]], rtol=0, atol=1e-6)
        assert level.mask is texts.mask
        assert (level.num_prefix, level.grid) == (0, None)
    torch.testing.assert_close(output.embedding, native.encode_text(whole(model, texts).ids), rtol=0, atol=1e-6)


@pytest.mark.parametrize("names", [["stages.0"], ["stages.1", "stages.3"], ["stages.0", "stages.1", "stages.2"]])
@torch.no_grad()
def test_resnet_stages_and_embedding_whichever_are_asked(names: list[str], tmp_path: Path) -> None:
    model = small("resnet", tmp_path)
    visual, pixels = model.model.visual, images(model)
    expected = hooked([visual.layer1, visual.layer2, visual.layer3, visual.layer4], lambda: visual(pixels))
    output = model.encode_image(pixels, names)
    for name, level in output.levels.items():
        torch.testing.assert_close(level.values, expected[int(name[-1])], rtol=0, atol=1e-6)
    torch.testing.assert_close(output.embedding, visual(pixels), rtol=0, atol=1e-6)
    assert [(level.width, level.layout) for level in model.image_levels] == [(64 * 2**n, "map") for n in range(4)]


def test_no_levels_asked_none_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("vit", tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("forward_intermediates must not run")

    monkeypatch.setattr(model.model, "forward_intermediates", refuse)
    monkeypatch.setattr(model.model.visual, "forward_intermediates", refuse)
    model(inputs(model))
    with pytest.raises(AssertionError, match="must not run"):
        model.encode_image(images(model), ["blocks.0"])


def test_unknown_level_names_the_closest(tmp_path: Path) -> None:
    model = small("vit", tmp_path)
    with pytest.raises(ValueError, match=r"no image level 'block\.1' \(did you mean 'blocks\.1'\?\)"):
        model.encode_image(images(model), ["block.1"])


def test_gradients_reach_the_towers_through_levels(tmp_path: Path) -> None:
    model = small("vit", tmp_path)
    output = model.encode_image(images(model), ["blocks.1"])
    output.levels["blocks.1"].values.square().mean().backward()
    assert model.model.visual.conv1.weight.grad is not None
    assert model.model.visual.proj.grad is None


def test_patch_dropout_leaves_levels_without_places(tmp_path: Path) -> None:
    config = {**CONFIGS["vit"], "vision_cfg": {**VIT, "patch_dropout": 0.5}}
    model = build_model(f"open_clip:{write(tmp_path, config)}").train()
    with pytest.raises((ValueError, RuntimeError), match="patch dropout is on"):
        model.encode_image(images(model), ["blocks.0"])


def test_clip_mask_ends_with_the_end_token(tmp_path: Path) -> None:
    tokens = small("vit", tmp_path).tokenizer(["a cat", "!?", "word " * 99])  # "!" has id 0, which is also the padding
    assert tokens.mask.sum(1).tolist() == [4, int((tokens.ids[1] == 49407).nonzero()) + 1, 24]
    assert tokens.ids[0, :4].tolist()[::3] == [49406, 49407]
    assert tokens.ids[2, -1] == 49407
    assert not tokens.ids[~tokens.mask].any()


@pytest.mark.parametrize("pad", ["[PAD]", "</s>"])
def test_transformers_tokenizer_mask_with_its_own_and_with_a_shared_padding(pad: str, tmp_path: Path) -> None:
    save_word_tokenizer(tmp_path / "words", pad=pad)
    text = {**TEXT, "vocab_size": 20, "hf_tokenizer_name": str(tmp_path / "words")}
    model = build_model(f"open_clip:{write(tmp_path, {**CONFIGS['siglip'], 'text_cfg': text})}")
    tokens = model.tokenizer(TEXTS)
    assert tokens.ids.shape == (3, 16)  # causal, and pooled at a word
    assert tokens.mask.sum(1).tolist() == [4, 9, 2]  # words and the end token
    check_round_trip(model, tmp_path / "saved")
    (tmp_path / "words").rename(tmp_path / "gone")
    native = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'saved'}")
    assert torch.equal(native(list(TEXTS)), whole(model, tokens).ids)


@torch.no_grad()
def test_transformers_text_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import RobertaConfig

    offline(monkeypatch)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    RobertaConfig(vocab_size=20, max_position_embeddings=40, pad_token_id=0, **sizes).save_pretrained(tmp_path / "text")
    save_word_tokenizer(tmp_path / "words")
    text = {
        "hf_model_name": str(tmp_path / "text"),
        "hf_tokenizer_name": str(tmp_path / "words"),
        "hf_proj_type": "mlp",
        "context_length": 24,
    }
    model = build_model(f"open_clip:{write(tmp_path, {**CONFIGS['vit'], 'text_cfg': text})}")
    assert isinstance(model, OpenClipModel)
    randomise(model)
    check_contract(model)
    batch = inputs(model)
    blocks = model.model.text.transformer.encoder.layer
    expected = hooked(blocks, lambda: model.model.encode_text(batch.texts.ids))
    levels = model.encode_text(batch.texts, ["blocks.0", "blocks.1"]).levels
    for value, level in zip(expected, levels.values(), strict=True):
        assert torch.equal(level.values, value)
    (tmp_path / "text").rename(tmp_path / "gone")  # the folder holds everything
    check_round_trip(model, tmp_path / "saved")


def test_siglip_has_a_bias_and_no_clamp(tmp_path: Path) -> None:
    model, clip = small("siglip", tmp_path), small("vit", tmp_path)
    assert model.logit_bias is not None
    assert (model.logit_bias.item(), clip.logit_bias) == (-10, None)
    for each, kept in ((model, 5.0), (clip, math.log(100))):
        with torch.no_grad():
            each.log_logit_scale.fill_(5.0)
        each.clamp_logit_scale()
        assert each.log_logit_scale.item() == pytest.approx(kept)
    model.logit_bias.backward()
    assert model.model.logit_bias.grad.item() == 1


def test_scale_that_is_a_vector_of_one(tmp_path: Path) -> None:
    model = build_model(f"open_clip:{write(tmp_path, {**CONFIGS['siglip'], 'nonscalar_logit_scale': True})}")
    output = model(inputs(model))
    assert output.logit_scale.shape == output.logit_bias.shape == ()
    check_round_trip(model, tmp_path / "saved")


def test_folder_as_open_clip_writes_it(tmp_path: Path) -> None:
    model = small("vit", tmp_path)
    native = tmp_path / "native"
    native.mkdir()
    config = {
        "model_cfg": CONFIGS["vit"],
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "resize_mode": "squash"},
    }
    (native / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"has no weights: looked for open_clip_model\.safetensors.*init: scratch"):
        build_model(f"open_clip:{native}")
    torch.save(model.model.state_dict(), native / "open_clip_pytorch_model.bin")
    loaded = build_model(f"open_clip:{native}")
    batch = inputs(model)
    assert torch.equal(loaded(batch).image.embedding, model(batch).image.embedding)
    assert (loaded.image_spec.mean, loaded.image_spec.fit) == ((0.5, 0.5, 0.5), "squash")
    _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{native}")
    torch.testing.assert_close(loaded.image_spec(picture()), preprocess(picture()), rtol=0, atol=1e-6)
    scratch = build_model(ModelConfig(name=f"open_clip:{native}", init="scratch"))
    assert not torch.equal(scratch(batch).image.embedding, model(batch).image.embedding)


def test_options_resize_both_towers_as_open_clip_does(tmp_path: Path) -> None:
    small("vit", tmp_path).save(tmp_path / "saved")
    options = {"image_size": 48, "context_length": 12}
    model = build_model(ModelConfig(name=f"open_clip:{tmp_path / 'saved'}", options=options))
    assert (model.image_spec.size, model.tokenizer.context_length) == (48, 12)
    name = f"local-dir:{tmp_path / 'saved'}"
    native = open_clip.create_model(name, force_image_size=48, force_context_length=12).eval()
    batch = inputs(model)
    assert torch.equal(native.encode_image(batch.images), model(batch).image.embedding)
    expected = native.encode_text(whole(model, batch.texts).ids)
    torch.testing.assert_close(model(batch).text.embedding, expected, rtol=0, atol=1e-6)
    check_round_trip(model, tmp_path / "again")


def zoo(monkeypatch: pytest.MonkeyPatch, entry: dict[str, Any]) -> None:
    """A small architecture and its weights' entry, as if they were in open_clip's zoo."""
    models = {**open_clip.factory._MODEL_CONFIGS, "ViT-Small-Test": copy.deepcopy(CONFIGS["vit"])}
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", models)
    tags = {**open_clip.pretrained._PRETRAINED, "ViT-Small-Test": {"made_up": entry}}
    monkeypatch.setattr(open_clip.pretrained, "_PRETRAINED", tags)


@pytest.mark.parametrize("quick", [False, True])
def test_pretrained_tag_brings_weights_preprocessing_and_activation(
    quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = small("vit", tmp_path)
    save_file(source.model.state_dict(), tmp_path / "w.safetensors")
    zoo(monkeypatch, {"file": str(tmp_path / "w.safetensors"), "mean": (0.1, 0.2, 0.3), "quick_gelu": quick})
    model = build_model("open_clip:ViT-Small-Test/made_up")
    native = open_clip.create_model("ViT-Small-Test", "made_up" if not quick else None, force_quick_gelu=quick).eval()
    native.load_state_dict(source.model.state_dict())
    batch = inputs(model)
    assert torch.equal(native.encode_image(batch.images), model(batch).image.embedding)
    expected = native.encode_text(whole(model, batch.texts).ids)
    torch.testing.assert_close(model(batch).text.embedding, expected, rtol=0, atol=1e-6)
    assert model.image_spec.mean == (0.1, 0.2, 0.3)
    scratch = build_model(ModelConfig(name="open_clip:ViT-Small-Test/made_up", init="scratch"))
    assert scratch.image_spec.mean == (0.1, 0.2, 0.3)
    assert not torch.equal(scratch(batch).image.embedding, model(batch).image.embedding)
    assert build_model("open_clip:ViT-Small-Test").num_parameters() == model.num_parameters()


def test_checkpoint_takes_open_clips_names_and_ours(tmp_path: Path) -> None:
    source = small("vit", tmp_path)
    save_file(source.model.state_dict(), tmp_path / "native.safetensors")
    save_file(source.state_dict(), tmp_path / "ours.safetensors")
    batch = inputs(source)
    for file in ("native", "ours"):
        config = ModelConfig(name=f"open_clip:{tmp_path / 'small.json'}", checkpoint=tmp_path / f"{file}.safetensors")
        assert torch.equal(build_model(config)(batch).image.embedding, source(batch).image.embedding)


def test_weights_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch)
    zoo(monkeypatch, {"hf_hub": "nobody/nothing-of-this-name/"})
    with pytest.raises(ValueError, match=r"ViT-Small-Test/made_up are not on this machine .* nobody/nothing"):
        build_model("open_clip:ViT-Small-Test/made_up")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("open_clip:ViT-B-23", r"no architecture 'ViT-B-23' \(did you mean 'ViT-B-32'\?\)"),
        (
            "open_clip:ViT-B-32/laion2b_s34b_b79",
            r"no weights 'laion2b_s34b_b79' \(did you mean 'laion2b_s34b_b79k'\?\)",
        ),
        ("open_clip:ViT-B-32/", "no weights ''"),
        ("open_clip:./nowhere/config.json", "there is no file or folder nowhere/config.json"),
        ("open_clip:coca_ViT-B-32", "CoCa model"),
    ],
)
def test_names_that_mean_nothing(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_cfg": {**VIT, "pach_size": 8}}, "cannot build .*unexpected keyword argument 'pach_size'"),
        ({"vision_cfg": {**VIT, "timm_model_name": "no_such_model"}}, "cannot build .*no_such_model"),
        ({"vision_cfg": {**VIT, "image_size": [32, 48]}}, "not square"),
    ],
)
def test_configs_that_cannot_be_built(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(f"open_clip:{write(tmp_path, {**CONFIGS['vit'], **change})}")


def test_config_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lacks text_cfg, vision_cfg"):
        build_model(f"open_clip:{write(tmp_path, {'embed_dim': 8})}")
    (tmp_path / "small.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"small\.json is no open_clip model config"):
        build_model(f"open_clip:{tmp_path / 'small.json'}")
    with pytest.raises(ConfigError, match=r"it has no open_clip_config\.json"):
        build_model(f"open_clip:{tmp_path}")


def test_unknown_option_names_the_closest(tmp_path: Path) -> None:
    name = f"open_clip:{write(tmp_path, CONFIGS['vit'])}"
    with pytest.raises(ConfigError, match=r"image_siz: unknown key \(did you mean 'image_size'\?\)"):
        build_model(ModelConfig(name=name, options={"image_siz": 64}))


def test_padding_preprocessing_is_refused(tmp_path: Path) -> None:
    config = {"model_cfg": CONFIGS["vit"], "preprocess_cfg": {"resize_mode": "longest"}}
    with pytest.raises(ConfigError, match="resize_mode 'longest'"):
        build_model(f"open_clip:{write(tmp_path, config)}")


def test_wrong_shapes_and_unsafe_files(tmp_path: Path) -> None:
    model = small("vit", tmp_path)
    model.save(tmp_path / "saved")
    weights = load_file(tmp_path / "saved" / "open_clip_model.safetensors")
    save_file({**weights, "visual.proj": torch.zeros(64, 25)}, tmp_path / "saved" / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match=r"(?s)do not fit CLIP: .*visual\.proj.*25.*24"):
        build_model(f"open_clip:{tmp_path / 'saved'}")
    (tmp_path / "saved" / "open_clip_model.safetensors").unlink()
    save_unsafe_pickle(tmp_path / "saved" / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot be loaded safely.*convert it once"):
        build_model(f"open_clip:{tmp_path / 'saved'}")
    with pytest.raises(ValueError, match=r"cannot be loaded safely.*convert it once"):
        model.load_checkpoint(tmp_path / "saved" / "open_clip_pytorch_model.bin")

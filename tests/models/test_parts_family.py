"""Models from parts: every kind of tower in its library's real format, heads, folders, and parts that do not fit."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import TEXTS, check_contract, features, images, inputs, randomise, save_word_tokenizer
from safetensors.torch import load_file, save_file

from cmapkd.config import ConfigError
from cmapkd.models import DualEncoder, ModelConfig, build_model, load_model
from cmapkd.models.image_towers import ImagePartConfig, build_image_tower, rebuild_image_tower

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
WORDS = {"vocab_size": 20, "pad_token_id": 0, "eos_token_id": 1}
CONVOLUTIONAL = {"name": "timm:test_efficientnet", "image_size": 64}
VIT = {"name": "timm:test_vit", "image_size": 48}


def save_encoder(kind: str, folder: Path) -> Path:
    """A small random text encoder with a tokenizer, as transformers writes it."""
    import transformers

    if kind == "bert":
        config = transformers.BertConfig(max_position_embeddings=40, **WORDS, **SIZES)
        model: Any = transformers.BertForMaskedLM(config)  # whose head no tower reads, and which has no pooler
    elif kind == "modernbert":
        ids = {"bos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1}
        model = transformers.ModernBertModel(transformers.ModernBertConfig(**WORDS, **ids, **SIZES))
    else:
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(d_model=32, d_kv=16, d_ff=48, num_layers=4, num_heads=2, **WORDS)
        )
    randomise(model)
    model.save_pretrained(folder)
    save_word_tokenizer(folder)
    return folder


def save_vit(folder: Path) -> Path:
    import transformers

    config = transformers.ViTConfig(image_size=32, patch_size=8, **SIZES)
    model = transformers.ViTModel(config, add_pooling_layer=False)
    randomise(model)
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    return {kind: save_encoder(kind, root / kind) for kind in ("bert", "modernbert", "t5")}


def parts(encoder: Path, image: Any = CONVOLUTIONAL, **options: Any) -> DualEncoder:
    text = {"name": f"hf:{encoder}", **options.pop("text", {})}
    return build_model(
        ModelConfig(name="parts:small", options={"image": image, "text": text, "embed_dim": 16, **options})
    )


def check_round_trip(model: DualEncoder, folder: Path) -> dict[str, Any]:
    """The folder gives the same model; its description."""
    randomise(model)
    model.save(folder)
    again = load_model(folder)
    for mine, theirs in zip(features(model, inputs(model)), features(again, inputs(again)), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert {name for name, _ in again.named_parameters()} == {name for name, _ in model.named_parameters()}
    description: dict[str, Any] = json.loads((folder / "cmapkd.json").read_text())
    return description["options"]


@pytest.mark.parametrize("kind", ["bert", "modernbert", "t5"])
def test_text_encoders_have_levels_and_are_saved(kind: str, encoders: dict[str, Path], tmp_path: Path) -> None:
    model = parts(encoders[kind], text_head="mlp", init_logit_bias=-10.0)
    check_contract(model)
    assert [level.name for level in model.text_levels] == [f"blocks.{n}" for n in range(4)]
    options = check_round_trip(model, tmp_path / "saved")
    assert options["form"] == "cmapkd"  # open_clip would look for the encoder in the recipe's folder


@pytest.mark.parametrize("kind", ["bert", "modernbert", "t5"])
def test_a_text_encoder_of_its_first_blocks(kind: str, encoders: dict[str, Path], tmp_path: Path) -> None:
    whole, first = parts(encoders[kind]), parts(encoders[kind], text={"blocks": 2})
    check_contract(first)
    assert [level.name for level in first.text_levels] == ["blocks.0", "blocks.1"]
    texts = whole.tokenizer(TEXTS)
    expected = whole.text(texts, ["blocks.1"]).levels["blocks.1"].values
    torch.testing.assert_close(first.text(texts, ["blocks.1"]).levels["blocks.1"].values, expected)
    all_of_them = parts(encoders[kind], text={"blocks": 4})
    assert all_of_them.state_dict().keys() == whole.state_dict().keys()
    assert len(first.state_dict()) < len(whole.state_dict())
    check_round_trip(first, tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"blocks is 5, and hf:.* has 4"):
        parts(encoders[kind], text={"blocks": 5})


def test_an_encoder_whose_blocks_share_weights_is_not_cut(tmp_path: Path) -> None:
    import transformers

    config = transformers.AlbertConfig(embedding_size=16, max_position_embeddings=40, **WORDS, **SIZES)
    transformers.AlbertModel(config).save_pretrained(tmp_path / "albert")
    save_word_tokenizer(tmp_path / "albert")
    with pytest.raises(ConfigError, match="are not in one list"):
        parts(tmp_path / "albert", text={"blocks": 2})


def test_of_the_first_blocks_some_may_be_frozen(encoders: dict[str, Path]) -> None:
    model = parts(encoders["bert"], text={"blocks": 2, "frozen_blocks": 1})
    check_contract(model)
    with pytest.raises(ConfigError, match="frozen_blocks"):
        parts(encoders["bert"], text={"blocks": 2, "frozen_blocks": 3})


@pytest.mark.parametrize("image", ["timm ViT", "timm MobileNet", "open_clip", "hf"])
def test_image_towers_have_levels_and_are_saved(image: str, encoders: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    if image == "hf":
        named: Any = f"hf:{save_vit(tmp_path / 'vit')}"
    elif image == "open_clip":
        vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
        text = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
        path = tmp_path / "small.json"
        path.write_text(json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}))
        named = f"open_clip:{path}"
    else:
        named = VIT if image == "timm ViT" else {"name": "timm:mobilenetv3_small_050", "image_size": 64}
    model = parts(encoders["modernbert"], named, image_head={"kind": "mlp", "hidden": 20})
    check_contract(model)
    assert model.image_levels
    assert check_round_trip(model, tmp_path / "saved")["form"] == "cmapkd"


def test_open_clip_reads_what_it_can_say(encoders: dict[str, Path], tmp_path: Path) -> None:
    import open_clip

    model: Any = parts(encoders["bert"], image_head={"kind": "mlp", "dropout": 0.3}, text_head="mlp")
    model.text.hub_id = str(encoders["bert"])  # stands for a repository of the hub, which no test asks
    before = os.umask(0o022)
    try:
        assert check_round_trip(model, tmp_path / "saved")["form"] == "open_clip"
    finally:
        os.umask(before)
    assert (tmp_path / "saved" / "open_clip_model.safetensors").stat().st_mode & 0o777 == 0o644
    assert check_round_trip(load_model(tmp_path / "saved"), tmp_path / "again")["form"] == "open_clip"
    native, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'saved'}")
    ids = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'saved'}")(list(TEXTS))
    native.eval()
    with torch.no_grad():
        torch.testing.assert_close(native.encode_image(images(model)), model.encode_image(images(model)).embedding)
        torch.testing.assert_close(native.encode_text(ids), model.encode_text(model.tokenizer(TEXTS)).embedding)
    normalise = prepare.transforms[-1]
    assert tuple(normalise.mean) == model.image_spec.mean
    ours = build_model(f"open_clip:{tmp_path / 'saved'}")  # and so does the family of that name
    torch.testing.assert_close(ours(inputs(model)).image.embedding, model(inputs(model)).image.embedding)


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["mean", "end"])
def test_texts_are_pooled_over_real_tokens(pooling: str, encoders: dict[str, Path]) -> None:
    model: Any = parts(encoders["t5"], text={"pooling": pooling})
    tokens = model.tokenizer(TEXTS)
    pooled = model.text(tokens).embedding
    for row, text in enumerate(TEXTS):  # alone, so without padding
        ids = model.tokenizer([text]).ids
        states = model.text.transformer(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(pooled[row], states.mean(0) if pooling == "mean" else states[-1])


def test_a_frozen_tower_drops_nothing_and_keeps_its_statistics(encoders: dict[str, Path]) -> None:
    model: Any = parts(encoders["bert"])  # BERT's dropout is 0.1
    for name in model.parts["text"]:
        model.get_parameter(name).requires_grad_(False)
    model.train()
    batch = inputs(model)
    assert torch.equal(model.encode_text(batch.texts).embedding, model.encode_text(batch.texts).embedding)
    assert model.frozen_towers == ("text",)
    assert model.image.training
    assert not model.text.training
    model.requires_grad_(True)  # a later stage
    assert not torch.equal(model.encode_text(batch.texts).embedding, model.encode_text(batch.texts).embedding)


def test_weight_files_of_towers(encoders: dict[str, Path], tmp_path: Path) -> None:
    import timm

    whole = timm.create_model("test_efficientnet")
    randomise(whole)
    file = tmp_path / "weights.safetensors"
    save_file({k: v for k, v in whole.state_dict().items() if not k.endswith("num_batches_tracked")}, file)
    model: Any = parts(encoders["bert"], {**CONVOLUTIONAL, "checkpoint": str(file)})
    pixels = images(model)
    whole.eval()
    pooled = whole.forward_head(whole.forward_features(pixels), pre_logits=True)
    torch.testing.assert_close(model.image(pixels).embedding, pooled)
    scratch: Any = build_model(ModelConfig(name="parts:s", init="scratch", options=_options(encoders["bert"])))
    theirs = load_file(encoders["bert"] / "model.safetensors")["bert.encoder.layer.0.attention.self.query.weight"]
    own = scratch.text.transformer.encoder.layer[0].attention.self.query.weight
    assert not torch.allclose(own, theirs)


def _options(encoder: Path) -> dict[str, Any]:
    return {"image": CONVOLUTIONAL, "text": f"hf:{encoder}", "embed_dim": 16}


def test_parts_that_do_not_fit_are_refused(encoders: dict[str, Path], tmp_path: Path) -> None:
    bert = encoders["bert"]
    without = tmp_path / "without"
    without.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(bert / name, without / name)
    with pytest.raises(ValueError, match=r"no usable tokenizer for hf:.*without"):
        parts(without)
    with pytest.raises(ConfigError, match="takes images of 224 pixels only, image_size is 64"):
        parts(bert, {"name": "timm:gmlp_ti16_224", "image_size": 64})
    with pytest.raises(ConfigError, match="takes images of 32 pixels only, image_size is 48"):
        parts(bert, {"name": f"hf:{save_vit(tmp_path / 'vit')}", "image_size": 48})
    with pytest.raises(ConfigError, match=r"longer than .* takes: 40 tokens"):
        parts(bert, text={"context_length": 41})
    with pytest.raises(ConfigError, match=r"no class token in front of a text: set pooling to mean"):
        parts(bert, text={"pooling": "class"})
    with pytest.raises(ConfigError, match="finds no config"):
        parts(tmp_path)
    with pytest.raises(ConfigError, match=r"there is no folder .*nowhere"):
        parts(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="an image part is named"):
        parts(bert, "resnet18")
    with pytest.raises(ConfigError, match="hidden is the width inside an mlp"):
        parts(bert, image_head={"kind": "linear", "hidden": 3})
    with pytest.raises(ConfigError, match=r"options\.image and options\.text"):
        build_model("parts:nothing")
    with pytest.raises(ConfigError, match=r"cannot pool by 'class'"):
        parts(bert, {**CONVOLUTIONAL, "pooling": "class"})
    save_file({"conv_stem.weight": torch.zeros(3, 3, 3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"do not fit EfficientNet: \d+ missing"):
        parts(bert, {**CONVOLUTIONAL, "checkpoint": str(tmp_path / "other.safetensors")})
    broken = load_file(bert / "model.safetensors")
    broken.pop("bert.embeddings.word_embeddings.weight")
    save_file(broken, without / "model.safetensors", metadata={"format": "pt"})
    save_word_tokenizer(without)
    with pytest.raises(ValueError, match=r"do not fit its config\.json: 1 missing"):
        parts(without)


def test_heads_of_another_width_are_refused(encoders: dict[str, Path], tmp_path: Path) -> None:
    model = parts(encoders["modernbert"])
    model.save(tmp_path / "saved")
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    weights["text_head.out.weight"] = torch.zeros(12, 32)
    save_file(weights, tmp_path / "saved" / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 of another shape \(text_head.out.weight: file \(12, 32\), model"):
        load_model(tmp_path / "saved")


def test_towers_without_trained_weights_are_known(encoders: dict[str, Path], tmp_path: Path) -> None:
    read, random = {"name": f"hf:{encoders['bert']}"}, {"name": f"hf:{encoders['bert']}", "init": "scratch"}
    vit = f"hf:{save_vit(tmp_path / 'vit')}"
    whole: Any = parts(encoders["bert"])
    trunk = dict(whole.image.visual.trunk.state_dict())
    save_file(trunk, tmp_path / "trunk.safetensors")
    filled = {**CONVOLUTIONAL, "checkpoint": str(tmp_path / "trunk.safetensors")}
    for image, text, towers in (
        (CONVOLUTIONAL, read, ("image",)),
        (CONVOLUTIONAL, random, ("image", "text")),
        (filled, read, ()),
        (vit, random, ("text",)),
        ({"name": vit, "init": "scratch"}, read, ("image",)),
    ):
        assert parts(encoders["bert"], image, text=text).random_towers == towers
    saved = parts(encoders["bert"])
    saved.save(tmp_path / "saved")
    assert load_model(tmp_path / "saved").random_towers == ()


def test_what_is_built_after_an_untrained_tiny_tower_begins_as_ever() -> None:
    """The text tower that is let go draws as many random numbers as one word needs. Folders are read all the same."""
    torch.manual_seed(0)
    tower = build_image_tower(ImagePartConfig(name="tiny:small"))
    assert torch.rand(()).item() == pytest.approx(0.6909052729606628)
    rebuilt = rebuild_image_tower(tower.describe(), Path())
    assert {name: each.shape for name, each in rebuilt.named_parameters()} == {
        name: each.shape for name, each in tower.named_parameters()
    }

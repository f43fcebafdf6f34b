from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import (
    TEXTS,
    check_contract,
    check_round_trip,
    counting_calls,
    hooked,
    images,
    inputs,
    offline,
    picture,
    randomise,
    save_unsafe_pickle,
    save_word_tokenizer,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from cmapkd.config import ConfigError
from cmapkd.models import ModelConfig, build_model
from cmapkd.models.hf_model import HfModel

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION = {**SIZES, "hidden_size": 48, "intermediate_size": 96, "image_size": 32, "patch_size": 8}


def write(kind: str, folder: Path) -> Any:
    """A small random model in transformers' own format; returns it."""
    torch.manual_seed(0)
    if kind == "clip":
        text = {**SIZES, "vocab_size": 20, "max_position_embeddings": 16, "eos_token_id": 1, "pad_token_id": 0}
        config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)
        model = transformers.CLIPModel(config)
        processor = transformers.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0.4] * 3, image_std=[0.3] * 3
        )
        save_word_tokenizer(folder)
    else:
        text = {**SIZES, "hidden_size": 48, "vocab_size": 20, "max_position_embeddings": 16}
        model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=VISION))
        processor = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
        save_word_tokenizer(folder, pad="</s>")
    randomise(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.eval()


def load(folder: Path, **settings: Any) -> HfModel:
    model = build_model(ModelConfig(name=f"hf:{folder}", **settings))
    assert isinstance(model, HfModel)
    return model


def pooled(output: Any) -> Tensor:
    """transformers 4 returns the embedding, transformers 5 an output that holds it."""
    return output if isinstance(output, Tensor) else output.pooler_output


def native_inputs(kind: str, folder: Path) -> Any:
    """Texts as transformers documents them for the model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if kind == "clip":
        return tokenizer(list(TEXTS), padding=True, truncation=True, max_length=16, return_tensors="pt")
    encoded = tokenizer(list(TEXTS), padding="max_length", truncation=True, max_length=16, return_tensors="pt")
    return {"input_ids": encoded["input_ids"]}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_contract_and_round_trip(kind: str, tmp_path: Path) -> None:
    write(kind, tmp_path / "native")
    model = load(tmp_path / "native")
    assert not model.training
    check_contract(model)
    check_round_trip(model, tmp_path / "saved")


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@torch.no_grad()
def test_embeddings_are_transformers_own_before_and_after_saving(kind: str, tmp_path: Path) -> None:
    native = write(kind, tmp_path / "native")
    model = load(tmp_path / "native")
    batch = inputs(model)
    output = model(batch)
    texts = native_inputs(kind, tmp_path / "native")
    assert torch.equal(texts["input_ids"], batch.texts.ids)
    for library in (native, transformers.AutoModel.from_pretrained(_saved(model, tmp_path)).eval()):
        torch.testing.assert_close(
            output.image.embedding, pooled(library.get_image_features(batch.images)), rtol=0, atol=1e-6
        )
        torch.testing.assert_close(output.text.embedding, pooled(library.get_text_features(**texts)), rtol=0, atol=1e-6)
        both = library(pixel_values=batch.images, **texts)
        ours = (
            torch.nn.functional.normalize(output.image.embedding)
            @ torch.nn.functional.normalize(output.text.embedding).T
        )
        bias = 0 if output.logit_bias is None else output.logit_bias
        torch.testing.assert_close(ours * output.logit_scale + bias, both.logits_per_image, rtol=1e-5, atol=1e-5)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (
        again(list(TEXTS))["input_ids"]
        == transformers.AutoTokenizer.from_pretrained(tmp_path / "native")(list(TEXTS))["input_ids"]
    )


def _saved(model: HfModel, folder: Path) -> Path:
    model.save(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@torch.no_grad()
def test_levels_are_the_blocks_own_outputs(kind: str, tmp_path: Path) -> None:
    native = write(kind, tmp_path)
    model = load(tmp_path)
    batch = inputs(model)
    texts = native_inputs(kind, tmp_path)
    names = ["blocks.2", "blocks.0", "blocks.1"]
    expected = hooked(native.vision_model.encoder.layers, lambda: native.get_image_features(batch.images))
    output = model.encode_image(batch.images, names)
    prefix = 1 if kind == "clip" else 0
    for name, level in output.levels.items():
        torch.testing.assert_close(level.values, expected[int(name[-1])], rtol=0, atol=1e-6)
        assert (level.num_prefix, level.grid, level.values.shape) == (prefix, (4, 4), (3, 16 + prefix, 48))
    expected = hooked(native.text_model.encoder.layers, lambda: native.get_text_features(**texts))
    output = model.encode_text(batch.texts, names)
    assert list(output.levels) == names
    for name, level in output.levels.items():
        real = batch.texts.mask  # what stands behind a text means nothing
        torch.testing.assert_close(level.values[real], expected[int(name[-1])][real], rtol=0, atol=1e-6)
        assert level.mask is batch.texts.mask


def test_no_levels_asked_none_computed(tmp_path: Path) -> None:
    write("clip", tmp_path)
    model = load(tmp_path)
    towers = [model.model.vision_model, model.model.text_model]
    with counting_calls(towers, "output_hidden_states") as calls:
        model(inputs(model))
        assert calls == [False, False]
        model.encode_image(images(model), ["blocks.0"])
    assert calls[2]


@pytest.mark.parametrize(("kind", "length"), [("clip", 9), ("siglip", 16)])
def test_masks(kind: str, length: int, tmp_path: Path) -> None:
    write(kind, tmp_path)
    tokens = load(tmp_path).tokenizer(TEXTS)
    assert tokens.ids.shape == (3, length)  # CLIP: the longest of the batch; SigLIP: always full
    assert tokens.mask.sum(1).tolist() == [4, 9, 2]  # words and the end token, also where padding is the end token


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_pixels_are_the_processors_own(kind: str, tmp_path: Path) -> None:
    write(kind, tmp_path)
    ours = load(tmp_path).image_spec(picture())
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    theirs = processor(images=picture(), return_tensors="pt")["pixel_values"][0]
    # torchvision resamples tensors, we resample with PIL: at most two of 255 steps apart, before dividing by std
    assert (ours - theirs).abs().max() <= 2.01 / 255 / min(load(tmp_path).image_spec.std)
    slow = getattr(transformers, f"{type(processor).__name__.removesuffix('Fast')}Pil", None)
    if slow is not None:  # transformers 5: the same processor on PIL
        exact = slow.from_pretrained(tmp_path)(images=picture(), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-5)


def test_scratch_needs_no_weights_and_no_processor(tmp_path: Path) -> None:
    for kind in ("clip", "siglip"):
        folder = tmp_path / kind
        write(kind, folder)
        (folder / "model.safetensors").unlink()
        (folder / "preprocessor_config.json").unlink()
        model = load(folder, init="scratch")
        assert model.image_spec.size == 32
        assert model.image_spec.fit == ("crop" if kind == "clip" else "squash")
        check_round_trip(model, tmp_path / f"{kind}-saved")
        with pytest.raises(ValueError, match=r"has no weights: looked for model\.safetensors.*init: scratch"):
            load(folder)
    assert model.log_logit_scale.item() == pytest.approx(math.log(10))
    assert model.logit_bias is not None
    assert model.logit_bias.item() == -10


def test_siglip_scale_is_not_clamped(tmp_path: Path) -> None:
    write("siglip", tmp_path)
    model = load(tmp_path)
    with torch.no_grad():
        model.log_logit_scale.fill_(5.0)
    model.clamp_logit_scale()
    assert model.log_logit_scale.item() == 5.0
    assert model(inputs(model)).logit_scale.shape == ()


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    write("clip", tmp_path).half().save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in load(tmp_path).parameters()} == {torch.float32}


def test_checkpoint_takes_transformers_names_and_ours(tmp_path: Path) -> None:
    write("clip", tmp_path / "native")
    model = load(tmp_path / "native")
    save_file(model.state_dict(), tmp_path / "ours.safetensors")
    batch = inputs(model)
    for file in (tmp_path / "native" / "model.safetensors", tmp_path / "ours.safetensors"):
        again = load(tmp_path / "native", init="scratch", checkpoint=file)
        assert torch.equal(again(batch).image.embedding, model(batch).image.embedding)


def test_tensors_in_a_torch_file_load_but_objects_do_not(tmp_path: Path) -> None:
    native = write("clip", tmp_path)
    before = inputs(load(tmp_path))
    expected = load(tmp_path)(before).image.embedding
    (tmp_path / "model.safetensors").unlink()
    torch.save(native.state_dict(), tmp_path / "pytorch_model.bin")
    assert torch.equal(load(tmp_path)(before).image.embedding, expected)
    save_unsafe_pickle(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"could not be loaded .*To convert a file whose origin you trust"):
        load(tmp_path)


def test_weights_that_do_not_fit_the_config(tmp_path: Path) -> None:
    write("clip", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    projection = weights.pop("text_projection.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit its config\.json: 1 missing \(text_projection\.weight\)"):
        load(tmp_path)
    weights |= {"text_projection.weight": projection, "made_up": projection.clone()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 unexpected \(made_up\)"):
        load(tmp_path)
    del weights["made_up"]
    save_file(
        {**weights, "text_projection.weight": torch.zeros(25, 32)},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ValueError, match=r"could not be loaded|do not fit"):
        load(tmp_path)


def edit(folder: Path, file: str, **changes: Any) -> None:
    values = json.loads((folder / file).read_text(encoding="utf-8"))
    (folder / file).write_text(json.dumps({**values, **changes}), encoding="utf-8")


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    write("clip", tmp_path)
    edit(tmp_path, "preprocessor_config.json", size={"shortest_edge": 40})
    with pytest.raises(ConfigError, match=r"resizes to .*40.* the model takes 32 x 32"):
        load(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"no readable preprocessor_config\.json"):
        load(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).unlink()
    with pytest.raises(ValueError, match=r"no usable tokenizer .*option `tokenizer`"):
        load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"it has no config\.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("siglip2", "NaFlex SigLIP 2 model.*fixed-resolution"),
        ("bert", r"model_type 'bert', which is not supported\. Supported: clip \(CLIPModel\), siglip \(SiglipModel\)"),
        ("made_up", r"cannot read its config .*Supported: clip"),
    ],
)
def test_other_kinds_of_model(model_type: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        build_model(f"hf:{tmp_path}")


def test_code_in_a_repository_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "made_up", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "code.py").write_text("raise SystemExit('this must never run')", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot read its config"):
        build_model(f"hf:{tmp_path}")


def test_names_that_mean_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch)
    with pytest.raises(ValueError, match=r"no model hf:nobody/nothing: .*without a network"):
        build_model("hf:nobody/nothing")
    with pytest.raises(ConfigError, match=r"there is no folder \./nothing"):
        build_model("hf:./nothing")


def test_options(tmp_path: Path) -> None:
    write("clip", tmp_path / "clip")
    write("siglip", tmp_path / "siglip")
    model = load(tmp_path / "clip", options={"context_length": 3})
    assert model.tokenizer(TEXTS).ids.shape == (3, 3)
    check_round_trip(model, tmp_path / "saved")
    for folder, options, message in (
        ("clip", {"contxt_length": 3}, r"contxt_length: unknown key \(did you mean 'context_length'\?\)"),
        ("clip", {"context_length": 17}, "longer than .* takes: 16"),
        ("siglip", {"context_length": 8}, "must be padded to 16 tokens"),
        ("clip", {"revision": "main"}, "revision is for hub repositories only"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(tmp_path / folder, options=options)
    save_word_tokenizer(tmp_path / "words", end="[END]")
    other = load(tmp_path / "clip", options={"tokenizer": str(tmp_path / "words")})
    assert other.tokenizer.native.eos_token == "[END]"

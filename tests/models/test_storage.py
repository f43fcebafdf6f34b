from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from model_support import TEXTS, inputs, save_unsafe_pickle
from safetensors.torch import save_file
from torch import nn

from cmapkd.config import ConfigError
from cmapkd.models import ModelConfig, build_model, load_model
from cmapkd.models.storage import check_sizes, load_weights, read_description, read_weights, write_model_folder


def test_weights_come_back_from_either_format(tmp_path: Path) -> None:
    weights = {"a": torch.randn(2, 3), "b": torch.arange(3)}
    save_file(weights, tmp_path / "w.safetensors")
    torch.save(weights, tmp_path / "plain.pt")
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in weights.items()}}, tmp_path / "run.pt"
    )
    for file in ("w.safetensors", "plain.pt", "run.pt"):
        read = read_weights(tmp_path / file)
        assert read.keys() == weights.keys()
        assert all(torch.equal(read[key], value) for key, value in weights.items())


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no weight file"):
        read_weights(tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(ValueError, match=r"cut\.safetensors is not a readable safetensors file"):
        read_weights(tmp_path / "cut.safetensors")
    save_unsafe_pickle(tmp_path / "unsafe.pt")
    with pytest.raises(ValueError, match=r"cannot be loaded safely .*convert it once where it was made"):
        read_weights(tmp_path / "unsafe.pt")
    torch.save({"a": 3}, tmp_path / "numbers.pt")
    with pytest.raises(ValueError, match="holds no plain state dict"):
        read_weights(tmp_path / "numbers.pt")


def test_weights_that_do_not_fit_are_listed() -> None:
    model = nn.Linear(2, 3)
    with pytest.raises(
        ValueError, match=r"1 missing \(bias\); 1 unexpected \(scale\); 1 of another shape \(weight: file \(2, 2\), "
    ):
        load_weights(model, {"weight": torch.zeros(2, 2), "scale": torch.zeros(1)}, where="somewhere")
    load_weights(model, {"weight": torch.ones(3, 2).half(), "bias": torch.ones(3)}, where="somewhere")
    assert model.weight.dtype == torch.float32
    assert model.weight.sum().item() == 6


def test_descriptions(tmp_path: Path) -> None:
    write_model_folder(tmp_path / "m", family="tiny", name="tiny:debug", options={"a": 1})
    assert read_description(tmp_path / "m") == {
        "format": 1,
        "family": "tiny",
        "name": "tiny:debug",
        "options": {"a": 1},
    }
    with pytest.raises(ValueError, match=r"has no cmapkd\.json"):
        read_description(tmp_path)
    for text, message in (
        ("{", "not a readable"),
        ("[]", "not a readable"),
        (json.dumps({"format": 2}), "has format 2"),
    ):
        (tmp_path / "cmapkd.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            read_description(tmp_path)


def test_sizes_that_no_model_has_are_refused_and_bases_of_positions_are_no_sizes() -> None:
    check_sizes({"text_config": {"rope_theta": 1e9, "rope_parameters": {"full": {"rope_theta": 5e10}}}}, where="a")
    for key, value in (("vocab_size", 10**8), ("num_hidden_layers", 1001), ("rope_theta", math.inf)):
        with pytest.raises(ValueError, match=f"a: {key} is .*, more than any model has"):
            check_sizes({key: value}, where="a")


def test_a_run_folder_stands_for_its_student(tmp_path: Path) -> None:
    model = build_model("tiny:debug", captions=TEXTS * 3)
    model.save(tmp_path / "student")
    loaded = load_model(tmp_path)
    assert torch.equal(loaded(inputs(model)).image.embedding, model(inputs(model)).image.embedding)
    named = build_model(str(tmp_path / "student"))
    assert torch.equal(named(inputs(model)).text.embedding, model(inputs(model)).text.embedding)
    for config in (
        ModelConfig(name=str(tmp_path / "student"), options={"image_size": 64}),
        ModelConfig(name=str(tmp_path / "student"), init="scratch"),
    ):
        with pytest.raises(ConfigError, match=r"do not apply|needs a family name"):
            build_model(config)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("opn_clip:ViT-B-32", r"unknown model family 'opn_clip' .*\(did you mean 'open_clip'\?\)"),
        ("open_clip:", "names no model after the colon"),
        ("nothing", "there is no model 'nothing'"),
    ],
)
def test_names_that_mean_nothing(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(name)
    with pytest.raises(ValueError, match="there is no model folder"):
        load_model(Path("nothing"))

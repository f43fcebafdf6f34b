"""The table of families: another package's stands in it as ours do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from model_support import inputs

from cmapkd.config import ConfigError, Registry
from cmapkd.models import FAMILIES, ModelConfig, build_model, load_model

PACKAGE = '''
"""A family of another package: small models of fixed sizes."""
from cmapkd.models.storage import WEIGHTS, load_weights, read_weights, write_model_folder
from cmapkd.models.tiny import PRESETS, TinyDualEncoder
from cmapkd.models.vocabulary import TrainedTokenizer


class Little(TinyDualEncoder):
    def write(self, folder):
        write_model_folder(folder, family="little", name=self.name, options={}, weights=self.state_dict())
        self.tokenizer.save(folder)


def build(rest, config, captions):
    tokenizer = TrainedTokenizer.train(captions, vocab_size=60, context_length=PRESETS["debug"].context_length)
    return Little(PRESETS["debug"], tokenizer, name=config.name)


def load(folder, description, load_model):
    tokenizer = TrainedTokenizer.load(folder, context_length=PRESETS["debug"].context_length)
    model = Little(PRESETS["debug"], tokenizer, name=description["name"])
    load_weights(model, read_weights(folder / WEIGHTS), where=folder)
    return model


class Odd:
    @staticmethod
    def build(rest, config, captions):
        return "no model"

    @staticmethod
    def load(folder, description, load_model):
        return None
'''


@pytest.fixture(autouse=True)
def other_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "little_models.py").write_text(PACKAGE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    points = {
        "little": "little_models",
        "odd": "little_models:Odd",
        "empty": "little_models:PRESETS",
        "gone": "no_such_module",
    }
    offered = {name: EntryPoint(name, value, FAMILIES.group) for name, value in points.items()}
    monkeypatch.setitem(FAMILIES.__dict__, "_offered", offered)
    monkeypatch.setattr(FAMILIES, "_loaded", {})
    yield
    sys.modules.pop("little_models", None)


def test_a_family_of_another_package_builds_saves_and_loads(tmp_path: Path) -> None:
    assert isinstance(FAMILIES, Registry)
    assert [*FAMILIES][:4] == ["open_clip", "hf", "timm", "tiny"]
    model = build_model(ModelConfig(name="little:one"), captions=["a red square", "a red circle"] * 3)
    model.save(tmp_path / "saved")
    loaded = load_model(tmp_path / "saved")
    assert type(loaded).__name__ == "Little"
    assert torch.equal(loaded(inputs(model)).image.embedding, model(inputs(model)).image.embedding)


def test_what_another_package_offers_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"model family 'odd' of .* gave a str, which is no cmapkd\.models\.Model"):
        build_model("odd:x")
    with pytest.raises(ConfigError, match=r"'empty' of .* is no model family: it needs the functions build and load"):
        build_model("empty:x")
    with pytest.raises(ConfigError, match=r"'gone' of .* cannot be imported"):
        build_model("gone:x")
    with pytest.raises(ConfigError, match=r"unknown model family 'litle' .*\(did you mean 'little'\?\)"):
        build_model("litle:x")
    with pytest.raises(ConfigError, match="unknown model family 'joined'"):
        build_model("joined:x")

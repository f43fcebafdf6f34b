"""The teachers that ship with the package: small enough, loadable, and as good as their stored scores say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cmapkd import load
from cmapkd.config import ConfigError
from cmapkd.data.open import open_source
from cmapkd.evaluation.run import EvaluationConfig, evaluate
from cmapkd.models import ModelConfig, build_model, packaged, tiny_vlm_family
from cmapkd.models.hf_vlm import HfVlm
from cmapkd.models.packaged import packaged_folder, packaged_models

MAX_BYTES = {"tiny": 10_000_000, "tiny_vlm": 15_000_000}
SHIPPED = [(family, name) for family in MAX_BYTES for name in packaged_models(family)]


@pytest.mark.parametrize(("family", "name"), SHIPPED)
def test_packaged_model_is_small_and_safe(family: str, name: str) -> None:
    files = [path for path in packaged_models(family)[name].rglob("*") if path.is_file()]
    assert sum(file.stat().st_size for file in files) <= MAX_BYTES[family]
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".jinja"}


def test_scenes_teacher_finds_captions_far_above_chance() -> None:
    teacher = load("tiny:scenes-teacher")
    scores = evaluate(teacher, open_source("scenes@val?length=100"), EvaluationConfig(), device=torch.device("cpu"))
    stored = json.loads((packaged_models()["scenes-teacher"] / "scores.json").read_text())["val"]
    assert scores["params"] == stored["params"]
    assert scores["retrieval"]["mean_r@1"] > stored["retrieval"]["mean_r@1"]  # 100 candidates instead of 1,000


def test_the_teacher_that_writes_answers_as_its_scores_say() -> None:
    teacher = build_model("tiny_vlm:scenes-teacher")
    config = EvaluationConfig(tasks=("answering",))
    scores = evaluate(teacher, open_source("scenes@val?length=20"), config, device=torch.device("cpu"))
    stored = json.loads((packaged_models("tiny_vlm")["scenes-teacher"] / "scores.json").read_text())["val"]
    assert scores["params"] == stored["params"]
    assert abs(scores["answering"]["overall"] - stored["answering"]["overall"]) < 15  # of some 130 questions


# ------------------------------------------------------------------------------------- how they are found and loaded


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HfVlm:
    """A small model that writes, in half precision among the packaged ones."""
    small = {"vision_width": 24, "vision_layers": 1, "width": 32, "layers": 1, "patch_size": 16, "max_tokens": 64}
    config = ModelConfig(name="tiny_vlm:small", options=small)
    model = build_model(config, captions=["is there a red circle", "yes", "no"])
    assert isinstance(model, HfVlm)
    folder = tmp_path / "weights" / "tiny-vlm-mine"
    model.half().save(folder)
    monkeypatch.setattr(packaged.resources, "files", lambda _: tmp_path)
    return model.float()


def test_a_model_that_writes_is_found_under_its_own_family_alone(shipped: HfVlm) -> None:
    assert packaged_models() == {}
    assert list(packaged_models("tiny_vlm")) == ["mine"]
    assert tiny_vlm_family.names() == ["small", "base", "mine"]
    assert packaged_models("tiny_vlm")["mine"].name == packaged_folder("tiny_vlm:mine")
    with pytest.raises(ValueError, match="'open_clip:mine' names no model that may ship"):
        packaged_folder("open_clip:mine")


def test_a_packaged_model_that_writes_loads_in_full_precision_under_its_name(shipped: HfVlm) -> None:
    loaded = build_model("tiny_vlm:mine")
    assert isinstance(loaded, HfVlm)
    assert loaded.name == "tiny_vlm:mine"
    assert loaded.vocabulary.digest == shipped.vocabulary.digest
    for key, tensor in shipped.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], tensor, rtol=0, atol=0)


def test_a_packaged_model_has_no_options_and_no_scratch(shipped: HfVlm) -> None:
    with pytest.raises(ConfigError, match=r"trained: its sizes are fixed, options \['layers'\]"):
        build_model(ModelConfig(name="tiny_vlm:mine", options={"layers": 2}))
    with pytest.raises(ConfigError, match="there is no model tiny_vlm:mine"):
        build_model(ModelConfig(name="tiny_vlm:mine", init="scratch"))

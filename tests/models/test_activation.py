"""Weights of a QuickGELU model in a GELU architecture: the same shapes, other scores."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from model_support import images, inputs
from safetensors.torch import save_file
from test_open_clip_family import CONFIGS

from cmapkd.data.types import ModelInput
from cmapkd.models import DualEncoder, ModelConfig, build_model
from cmapkd.models.activation import activation_losses, assumption
from helpers import make_model


@pytest.fixture(autouse=True)
def zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small architecture that comes in both forms, and one that does not."""
    small = CONFIGS["vit"]
    entries = {"ViT-Test": small, "ViT-Test-quickgelu": {**small, "quick_gelu": True}, "ViT-Other": small}
    models = {**open_clip.factory._MODEL_CONFIGS, **copy.deepcopy(entries)}
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", models)


@torch.no_grad()
def fitted(folder: Path, name: str) -> tuple[DualEncoder, ModelInput]:
    """A model whose last image layer was solved for eight pairs, and the pairs; its weights are in `folder`."""
    torch.manual_seed(0)
    model = build_model(f"open_clip:{name}")
    for parameter_name, parameter in model.named_parameters():
        if "attn" in parameter_name or "token_embedding" in parameter_name:
            parameter.mul_(6)  # texts differ
        if parameter_name.startswith("model.visual"):  # both activations are far from each other at -4, and matter
            if parameter_name.endswith("c_fc.bias"):
                parameter.fill_(-4.0)
            if parameter_name.endswith("c_proj.weight"):
                parameter.mul_(3000)
    texts = ["red", "a dog", "two blue circles", "sky", "green grass grows", "my old car", "night", "seven"]
    pairs = ModelInput(images(model, len(texts)), model.tokenizer(texts))
    visual: Any = model.model.visual
    projection, visual.proj = visual.proj, None
    wanted = torch.nn.functional.normalize(model(pairs).text.embedding, dim=-1)
    projection.copy_(torch.linalg.pinv(visual(pairs.images)) @ wanted)
    visual.proj = projection
    model.log_logit_scale.fill_(math.log(10))
    save_file(model.model.state_dict(), folder / "weights.safetensors")
    return model, pairs


def over(name: str, folder: Path, **options: Any) -> DualEncoder:
    checkpoint = folder / "weights.safetensors"
    return build_model(ModelConfig(name=f"open_clip:{name}", init="scratch", checkpoint=checkpoint, options=options))


def test_the_assumption_is_said_and_both_are_compared(tmp_path: Path) -> None:
    source, pairs = fitted(tmp_path, "ViT-Test-quickgelu")
    model = over("ViT-Test", tmp_path)
    assert model.assumed_activation == "gelu"
    line = assumption(model)
    assert line is not None
    assert "ViT-Test is assumed to use GELU" in line
    assert "set options.quick_gelu: true" in line
    twin = model.activation_twin()
    assert twin is not None
    with torch.no_grad():
        assert torch.equal(twin(pairs).image.embedding, source(pairs).image.embedding)
        assert not torch.allclose(model(pairs).image.embedding, source(pairs).image.embedding)
    losses = activation_losses(model, pairs)
    assert list(losses) == ["gelu", "quick_gelu"]
    assert losses["quick_gelu"] < losses["gelu"]


def test_the_right_assumption_has_the_lower_loss(tmp_path: Path) -> None:
    _, pairs = fitted(tmp_path, "ViT-Test")
    losses = activation_losses(over("ViT-Test", tmp_path), pairs)
    assert losses["gelu"] < losses["quick_gelu"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ViT-Test", {"quick_gelu": True}),
        ("ViT-Test", {"quick_gelu": False}),
        ("ViT-Test-quickgelu", {}),
        ("ViT-Other", {}),
    ],
)
def test_nothing_is_assumed_where_it_was_said(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    fitted(tmp_path, "ViT-Test")
    model = over(name, tmp_path, **options)
    assert (model.assumed_activation, assumption(model), model.activation_twin()) == (None, None, None)
    assert activation_losses(model, inputs(model)) == {}


def test_nothing_is_assumed_without_a_checkpoint_and_of_other_families() -> None:
    assert build_model("open_clip:ViT-Test").assumed_activation is None
    assert assumption(make_model()) is None

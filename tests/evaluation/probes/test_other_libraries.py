"""Heads, agreement and cost on open_clip's ViT and ResNet and a timm tower: other layouts, widths and tokenizers."""

from __future__ import annotations

import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from cmapkd.data.scenes.source import ScenesSource
from cmapkd.evaluation import SuiteConfig, evaluate_models
from cmapkd.evaluation.probes.features import patch_level
from cmapkd.evaluation.probes.train import weights_digest
from cmapkd.models import DualEncoder, build_model

TEXT = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
VISION: dict[str, dict[str, Any]] = {
    "vit": {"image_size": 32, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8},
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
    "timm": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"},
}
SMALL = {"steps": 2, "batch_size": 4, "width": 32, "depth": 1}


def small(kind: str, folder: Path) -> DualEncoder:
    path = folder / f"{kind}.json"
    path.write_text(json.dumps({"embed_dim": 24, "vision_cfg": VISION[kind], "text_cfg": TEXT}), encoding="utf-8")
    torch.manual_seed(0)
    return build_model(f"open_clip:{path}")


@pytest.mark.skipif(find_spec("faster_coco_eval") is None, reason="box AP needs the extra detection")
@pytest.mark.parametrize("fine_tune", [False, True])
@pytest.mark.parametrize("kind", VISION)
def test_heads_on_every_layout(kind: str, fine_tune: bool, tmp_path: Path) -> None:
    model = small(kind, tmp_path)
    before = weights_digest(model)
    head = {**SMALL, "fine_tune": fine_tune}
    config = SuiteConfig.from_mapping(
        {"tasks": ["vqa", "detection"], "probes": {"samples": 6}, "vqa": head, "detection": head}
    )
    scored, train = ScenesSource("val", size=32, length=3), ScenesSource("train", size=32)
    scores = evaluate_models({"m": model}, scored, config, device="cpu", train=train)["m"]
    assert scores["vqa"]["num_questions"] == sum(len(scored[index].questions) for index in range(3))
    assert scores["detection"]["num_images"] == 3
    assert weights_digest(model) == before
    assert not any(module.training for module in model.modules())


def test_agreement_and_cost_across_libraries(tmp_path: Path) -> None:
    models = {kind: small(kind, tmp_path) for kind in VISION}
    assert {kind: patch_level(model).name for kind, model in models.items()} == {
        "vit": "blocks.1",
        "resnet": "stages.3",
        "timm": models["timm"].image_levels[-2].name,
    }
    config = SuiteConfig.from_mapping(
        {"tasks": ["agreement", "efficiency"], "efficiency": {"batch_size": 2, "rounds": 3, "warmup": 0}}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = evaluate_models(models, ScenesSource("val", size=32, length=5), config, device="cpu")
    for kind, model in models.items():
        of_model = scores[kind]
        assert {"P2", "P3", "P4", "P5", "L4"} <= set(of_model["agreement"]["cka"])
        assert all(0 <= value <= 1 + 1e-6 for value in of_model["agreement"]["cka"].values())
        counts = of_model["efficiency"]["parameters"]
        assert counts["total"] == model.num_parameters() == counts["image"] + counts["text"] + counts["other"]
        assert counts["text_embedding"] == 49408 * 32
        assert of_model["efficiency"]["image"]["macs"] > 0
        assert of_model["efficiency"]["text_tokens"] == 24

"""Task `patch_text`: scores by hand, tokens in the joint space of every family, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "families"))
from family_support import FAMILIES, make

from cmapkd.data.open import open_source
from cmapkd.evaluation.config import EvaluationConfig
from cmapkd.evaluation.patch_text import cells_inside, patch_text_scores, score_patches
from cmapkd.evaluation.run import evaluate
from cmapkd.evaluation.tasks.patch_text import joint_tokens
from cmapkd.models import build_model

NAMES = torch.eye(3)


def test_scores_are_those_counted_by_hand() -> None:
    cells = torch.tensor([[1.0, 0.2, 0], [0.9, 0, 0.3], [0, 1.0, 0.3], [0.5, 0.4, 0.3]])  # 2 x 2
    boxes = torch.tensor([[0, 0, 1, 0.5], [0.5, 0, 1, 1], [0, 0.5, 0.5, 1], [0, 0, 1, 1.0]])
    labels = torch.tensor([0, 2, 1, -1])  # the last is no object
    found = score_patches(cells, (2, 2), NAMES, boxes, labels)
    assert found.pointed.tolist() == pytest.approx(
        [1, 1, 2 / 3]
    )  # name 2 is equally near to three cells, two of them in its box
    assert found.pointing_chance.tolist() == [0.5, 0.25, 0.5]
    assert found.owners.tolist() == [0, 0, 1, 2]  # both boxes of cell 1 are as large: the first
    assert found.right.tolist() == [1, 1, 1, 0]
    scores = patch_text_scores([found, score_patches(cells, (2, 2), NAMES, boxes[:0], labels[:0])])
    assert scores == {
        "pointing": pytest.approx(100 * (2 + 2 / 3) / 3),
        "pointing_chance": pytest.approx(100 * 1.25 / 3),
        "cells": 75,
        "cells_commonest": 50,
        "num_names": 3,
        "num_cells": 4,
    }


def test_a_cell_belongs_to_the_box_that_its_centre_lies_in() -> None:
    inside = cells_inside((2, 4), torch.tensor([[0.1, 0.2, 0.4, 0.3], [0.9, 0.9, 1.0, 1.0]]))
    assert inside.tolist() == [[True, True] + [False] * 6, [False] * 8]
    with pytest.raises(ValueError, match="no box holds the centre of a cell"):
        patch_text_scores([score_patches(torch.eye(3)[:1], (1, 1), NAMES, torch.zeros(1, 4), torch.tensor([0]))])


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["tiny", "open_clip", "hf CLIP", "joined"])
def test_the_class_tokens_row_is_the_embedding(name: str, tmp_path: Path) -> None:
    model = make(name, tmp_path).eval()
    pixels = torch.randn(2, 3, model.image_spec.size, model.image_spec.size)
    tower = model.encode_image(pixels, (model.image_levels[-1].name,))
    level = tower.levels[model.image_levels[-1].name]
    tokens = model.tokens_in_joint_space(level)
    torch.testing.assert_close(tokens[:, 0], tower.embedding)
    cells, grid = joint_tokens(model, pixels)
    assert cells.shape == (2, grid[0] * grid[1], model.embed_dim)
    torch.testing.assert_close(cells, tokens[:, level.num_prefix :])


@pytest.mark.usefixtures("one_thread")
def test_pooled_tokens_of_a_timm_vit_are_projected_one_by_one(tmp_path: Path) -> None:
    """Its classification token is pooled, behind the norms and the head that every token gets."""
    model = make("timm, SigLIP", tmp_path).eval()
    pixels = torch.randn(1, 3, 48, 48)
    level = model.image_levels[-1].name
    tower = model.encode_image(pixels, (level,))
    torch.testing.assert_close(model.tokens_in_joint_space(tower.levels[level])[:, 0], tower.embedding)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("hf SigLIP", "its image tower pools them by attention"),
        ("timm", "its image tower is no plain ViT"),
        ("parts", "no plain ViT of tiny, open_clip, timm or hf"),
    ],
)
def test_towers_without_such_tokens_are_refused(name: str, why: str, tmp_path: Path) -> None:
    assert name in FAMILIES
    model = make(name, tmp_path).eval()
    with pytest.raises(ValueError, match=f"has no image tokens in the joint space: .*{why}"):
        joint_tokens(model, torch.zeros(1, 3, model.image_spec.size, model.image_spec.size))


def scored(source: Any, **settings: Any) -> dict[str, Any]:
    model = build_model("tiny:scenes-teacher")
    config = EvaluationConfig(tasks=("patch_text",), **settings)
    scores: dict[str, Any] = evaluate(model, source, config, device="cpu")["patch_text"]
    return scores


def test_scenes_are_scored_in_any_batches() -> None:
    whole, parts = (scored(open_source("scenes:easy@val?length=12"), batch_size=size) for size in (12, 5))
    assert whole["num_images"] == 12
    assert whole["num_names"] <= whole["num_cells"]
    for key in ("pointing", "cells", "pointing_chance", "cells_commonest"):
        assert 0 <= whole[key] <= 100
        assert parts[key] == pytest.approx(whole[key])


def test_a_source_without_boxes_is_refused(make_source: Any) -> None:
    with pytest.raises(ValueError, match=r"patch_text.*none of its first \d+ samples has a box"):
        scored(make_source())

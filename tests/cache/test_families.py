"""Answers of the libraries' own models, with every level they have: maps, prefix tokens, padded texts, a logit bias."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_support import LENGTH, VIEWS

from cmapkd.cache import CacheConfig, CachePlan, all_keys
from cmapkd.cache.asked import AskedTowers
from cmapkd.data.batches import BatchBuilder
from cmapkd.data.plans import PlanSampler
from cmapkd.data.readers import DualReader
from cmapkd.features import KeyTokens
from cmapkd.features.pyramid import grid_of, pooled
from cmapkd.models import FrozenTeacher, LevelRequest, build_model
from helpers import MemorySource, make_model

TEXT = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "vit": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": TEXT,
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
COSINE = {"fp32": 1 - 1e-6, "fp16": 1 - 1e-5, "int8": 0.9995}


@pytest.mark.parametrize("detail", ["pooled", "key_tokens", "dense"])
@pytest.mark.parametrize("family", CONFIGS)
def test_every_level_as_live(family: str, detail: Any, tmp_path: Path) -> None:
    path = tmp_path / "small.json"
    path.write_text(json.dumps(CONFIGS[family]))
    torch.manual_seed(0)
    model = build_model(f"open_clip:{path}")
    teacher = FrozenTeacher(model)
    needs = LevelRequest(*(tuple(info.name for info in infos) for infos in (model.image_levels, model.text_levels)))
    source = MemorySource(LENGTH)
    readers = {"teacher": DualReader(model.image_spec, model.tokenizer)}
    plan = PlanSampler(LENGTH, batch_size=6, seed=0, start=0, stop=1).plan(0)
    live = teacher(BatchBuilder(source, VIEWS, readers, seed=0)[plan], needs)
    plans, asked = [], AskedTowers(needs, detail, KeyTokens())
    for store in COSINE:
        config = CacheConfig(folder=tmp_path / store, store=store, batch_size=4)  # type: ignore[arg-type]
        plans.append(CachePlan(config, teacher, asked, source, VIEWS, all_keys(LENGTH, 1), "fp32"))
        plans[-1].build(device="cpu")
    for made in plans:
        reader = made.open()
        batch = BatchBuilder(source, VIEWS, readers, seed=0, stored={"teacher": reader})[plan]
        found = made.cached_teacher(reader, make_model)(batch, needs)
        assert torch.equal(found.logit_scale, live.logit_scale)
        assert (found.logit_bias is None) == (live.logit_bias is None)
        if live.logit_bias is not None:
            assert torch.equal(found.logit_bias, live.logit_bias)
        for tower in ("image", "text"):
            mine, theirs = getattr(found, tower), getattr(live, tower)
            least = COSINE[made.config.store]
            assert float(torch.cosine_similarity(mine.embedding, theirs.embedding).min()) > least
            assert list(mine.levels) == list(theirs.levels)
            for name, level in mine.levels.items():
                wanted = theirs.levels[name]
                assert float(torch.cosine_similarity(pooled(level), pooled(wanted)).min()) > least
                if detail == "dense":
                    assert (level.layout, level.num_prefix, level.grid) == (
                        wanted.layout,
                        wanted.num_prefix,
                        wanted.grid,
                    )
                    assert level.values.shape == wanted.values.shape
                    flat = (each.values.flatten(1) for each in (level, wanted))
                    assert float(torch.cosine_similarity(*flat).min()) > least
                elif detail == "key_tokens":
                    chosen = KeyTokens().of(live)
                    wanted = getattr(chosen, tower).levels[name]
                    assert level.grid == wanted.grid
                    real = wanted.places.shape[1]
                    assert torch.equal(level.places[:, :real], wanted.places)
                    assert bool((level.places[:, real:] == -1).all())
                    flat = (each.flatten(1) for each in (level.values[:, :real], wanted.values))
                    assert float(torch.cosine_similarity(*flat).min()) > least
                elif tower == "image":
                    with pytest.raises(ValueError, match="its 1 patches must be rows x columns"):
                        grid_of(level)

"""`data.teacher_view: whole`: teachers see pictures as they are, live and from a cache of one row a sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import cmapkd
from cmapkd.cache.identity import view_hash
from cmapkd.config import ConfigError
from cmapkd.data.views import WHOLE, ViewSpec, WholePictures, draw_view
from cmapkd.run import RunConfig, method_of, open_training, plan_cache, teacher_views
from helpers import MemorySource, make_builder, make_method, make_teacher
from helpers import make_model as small

CROPS = {"crop_scale": [0.2, 0.5], "flip": 0.5, "jitter": 0.3}
SPEC = ViewSpec.model_validate(CROPS)


def test_whole_pictures_have_the_captions_of_the_views() -> None:
    whole = WholePictures.of(SPEC, once=False)
    for number in range(3):
        shown, view = draw_view("a", number, whole, (40, 30)), draw_view("a", number, SPEC, (40, 30))
        assert shown.caption == view.caption
        assert (shown.box, shown.flip, shown.saturation) == (None, False, 1.0)
        assert view.box is not None
    assert whole.shows_all
    assert view_hash(whole) != view_hash(SPEC)
    assert view_hash(WholePictures.of(WHOLE, once=False)) == view_hash(WHOLE)  # whose caches it may read
    assert [WholePictures.of(SPEC, once=True).view_number(epoch) for epoch in (0, 5)] == [0, 0]


def test_a_batch_shows_each_role_its_own_view() -> None:
    method, source = make_method("hinton"), MemorySource()
    plan = next(iter(_sampler(len(source))))
    plain = make_builder(method, source, views=WHOLE)[plan]
    mixed = make_builder(method, source, views=SPEC, own_views={"teacher": WholePictures.of(SPEC, once=False)})[plan]
    crops = make_builder(method, source, views=SPEC)[plan]
    assert torch.equal(mixed.inputs["teacher"].images, plain.inputs["teacher"].images)
    assert torch.equal(mixed.inputs["student"].images, crops.inputs["student"].images)
    assert torch.equal(mixed.inputs["teacher"].texts.ids, crops.inputs["teacher"].texts.ids)
    alike = make_method(
        "hinton", teacher=None, student=small(image_size=24)
    )  # which reads pictures as its teacher does
    both = make_builder(alike, source, views=SPEC, own_views={"teacher": WholePictures.of(SPEC, once=False)})[plan]
    assert not torch.equal(both.inputs["student"].images, both.inputs["teacher"].images)


def _sampler(length: int) -> Any:
    from cmapkd.data.plans import PlanSampler

    return PlanSampler(length, batch_size=6, seed=0, start=0, stop=1)


def settings(method: dict[str, Any], **data: Any) -> dict[str, Any]:
    return {
        "teacher": "tiny:scenes-teacher",
        "student": {"name": "tiny:debug", "options": {"embed_dim": 16}},
        "data": {"train": "scenes?length=24&size=32", "val": "scenes@val?length=8&size=32", "views": CROPS, **data},
        "method": method,
        "training": {"steps": 6, "batch_size": 8, "log_every": 1, "device": "cpu"},
        "evaluation": {"tasks": ["zero_shot"]},
        "quiet": True,
    }


CLASSES = {"name": "hinton", "form": "classes"}


@pytest.mark.parametrize("method", [CLASSES, {"name": "hinton"}], ids=["pictures alone", "texts too"])
def test_cached_is_live(method: dict[str, Any], tmp_path: Path) -> None:
    values = settings(method, teacher_view="whole")
    values["data"]["views"] = {**CROPS, "num_views": 2}
    losses: dict[str, list[float]] = {}
    cache = {"mode": "auto", "folder": str(tmp_path / "cache"), "store": "fp32"}
    for name, kept in (("live", "off"), ("cached", cache)):
        cmapkd.distill(**values, cache=kept, out=tmp_path / name)
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses[name] = [line["loss"] for line in lines if "loss" in line]
    assert losses["cached"] == pytest.approx(losses["live"], rel=1e-5)


@pytest.mark.parametrize(("method", "rows"), [(CLASSES, 24), ({"name": "hinton"}, 48)])
def test_one_row_a_sample_where_no_text_is_read(method: dict[str, Any], rows: int) -> None:
    values = settings(method, teacher_view="whole") | {"cache": "auto"}
    del values["quiet"]
    values["training"] |= {"steps": 12}
    values["data"]["views"] = {**CROPS, "num_views": 2}
    plan = _planned(RunConfig.from_mapping(values))
    assert len(plan.keys) == rows
    assert plan.views.shows_all


def _planned(config: RunConfig) -> Any:
    source = open_training(config)
    from cmapkd.run import build_student, classes_of, load_teachers

    teachers = load_teachers(config)
    method = method_of(config, build_student(config, source, teachers), teachers, None, classes_of(config, source))
    return plan_cache(config, method, source)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            {"name": "fitnet"},
            r"whole shows teachers another part .* method fitnet, as it is set, compares both place by",
        ),
        ({"name": "dmae", "teacher_sees": "visible"}, "method dmae, as it is set, compares both place by"),
        ({"name": "contrastive"}, "method contrastive has none here"),
    ],
)
def test_methods_that_compare_places_are_refused(method: dict[str, Any], message: str) -> None:
    values = settings(method, teacher_view="whole")
    del values["quiet"]
    config = RunConfig.from_mapping(values)
    with pytest.raises(ConfigError, match=message):
        teacher_views(config, make_method(method["name"], teacher=make_teacher(image_size=16), settings=method))
    assert "teacher_view" in config.plain()["data"]
    assert "teacher_view" not in config.scratch().plain()["data"]

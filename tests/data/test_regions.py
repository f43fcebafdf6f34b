"""Further views that are boxes: which boxes, in which order, and what has none."""

from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image

from cmapkd.config import ConfigError
from cmapkd.data.config import DataConfig
from cmapkd.data.open import open_source
from cmapkd.data.plans import PlanSampler
from cmapkd.data.regions import FurtherViewSpec, RegionReader, boxes_of, check_boxes, further_view
from cmapkd.data.types import Box, Sample
from cmapkd.data.views import WHOLE, View, draw_more_view
from helpers import MemorySource, make_builder, make_method

BOXES = FurtherViewSpec(of="boxes")
SAMPLE = Sample(
    "a",
    Image.new("RGB", (40, 20)),
    boxes=(
        Box(-5, 2, 15, 10, "cat"),
        Box(30, 10, 20, 20, "dog"),
        Box(1, 1, 8, 8, "people", crowd=True),
        Box(39.5, 0, 5, 5, "thin"),
        Box(0, 0, 40, 20, "room"),
    ),
)
INSIDE = [(0.0, 2, 10, 12), (30, 10, 40.0, 20.0), (0, 0, 40, 20)]


def test_boxes_are_cut_to_the_picture_without_crowds_and_slivers() -> None:
    assert boxes_of(SAMPLE) == INSIDE
    readers = [RegionReader(most).read(SAMPLE, View(), 0) for most in (2, 5)]
    assert readers == [2, 3]
    assert RegionReader(4).read(replace(SAMPLE, boxes=()), View(), 0) == 1


def test_each_box_is_shown_once_and_then_the_whole_picture() -> None:
    orders = set()
    for number in range(20):
        views = [further_view(SAMPLE, number, "regions", place, BOXES) for place in range(5)]
        assert sorted(view.box for view in views[:3] if view.box) == sorted(INSIDE)
        assert [view.box for view in views[3:]] == [None, None]
        assert views == [further_view(SAMPLE, number, "regions", place, BOXES) for place in range(5)]
        orders.add(tuple(view.box for view in views))
    assert len(orders) == 6
    flipped = further_view(SAMPLE, 0, "regions", 0, FurtherViewSpec(of="boxes", flip=1.0))
    left, _, right, _ = flipped.box or (0, 0, 0, 0)
    _, box = flipped.prepare(SAMPLE.image)
    assert box is not None
    assert (box[0], box[2]) == (40 - right, 40 - left)
    plain = FurtherViewSpec(crop_scale=(0.2, 0.5))
    assert further_view(SAMPLE, 3, "local", 1, plain) == draw_more_view("a", 3, "local", 1, plain, (40, 20))


def test_a_batch_brings_regions_and_how_many_they_are() -> None:
    source = open_source("scenes?length=12&size=32")
    method = make_method("dclip", settings={"regions": 3})
    builder = make_builder(method, source, views=WHOLE, view_specs={"regions": BOXES})
    batch = builder[PlanSampler(12, batch_size=4, seed=0, start=0, stop=1).plan(0)]
    found = batch.pairs("teacher").more_images["regions"]
    for row, index in enumerate(PlanSampler(12, batch_size=4, seed=0, start=0, stop=1).plan(0).mine):
        sample = source[index]
        assert int(batch.extra["regions"][row]) == min(3, max(1, len(boxes_of(sample))))
        for place in range(3):
            shown = further_view(sample, batch.view, "regions", place, BOXES).prepare(sample.image)
            expected = builder.readers["teacher"].read(*shown, None)
            assert (found[row * 3 + place] == expected).all()


def test_random_crops_are_all_regions_whatever_boxes_the_data_have() -> None:
    """As `dclip` advises for data without boxes: each crop counts in the meta-teacher's vector."""
    method, crops = make_method("dclip", settings={"regions": 3}).train(), FurtherViewSpec(crop_scale=(0.2, 0.5))
    plan = PlanSampler(8, batch_size=4, seed=0, start=0, stop=1).plan(0)
    for source in (MemorySource(8), open_source("scenes?length=8&size=32")):
        builder = make_builder(method, source, views=WHOLE, view_specs={"regions": crops})
        batch = builder[plan]
        assert batch.extra["regions"].tolist() == [3, 3, 3, 3]
        pairs = batch.pairs("teacher")
        last = pairs.more_images["regions"].clone().unflatten(0, (4, 3))
        last[:, 2] = 0.5
        changed = replace(pairs, more_images={"regions": last.flatten(0, 1)})
        other = replace(batch, inputs={**batch.inputs, "teacher": changed})
        assert method(batch)["meta_teacher"].value != method(other)["meta_teacher"].value


def test_what_has_no_boxes_is_refused() -> None:
    check_boxes(open_source("scenes?length=4&size=32"), {"regions": 2}, {"regions": BOXES})
    check_boxes(MemorySource(), {"regions": 2}, {"regions": FurtherViewSpec()})
    with pytest.raises(ConfigError, match=r"data\.more_views\.regions shows objects .* memory has a box: .*of=picture"):
        check_boxes(MemorySource(), {"regions": 2}, {"regions": BOXES})
    views = {"regions": {"of": "boxes", "crop_scale": [0.2, 0.5]}}
    with pytest.raises(ConfigError, match=r"leave crop_scale and crop_ratio out"):
        DataConfig.from_mapping({"train": "scenes", "more_views": views}, where="data")

"""What a batch holds is cut, pinned and moved together: pixels of every view, texts of every pool, extras, streams."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cmapkd.config import ConfigError
from cmapkd.data.config import DataConfig
from cmapkd.data.labels import LabelReader
from cmapkd.data.plans import Plan
from cmapkd.data.types import Batch, ModelInput, Sample, TokenBatch
from cmapkd.data.views import WHOLE, View, ViewSpec, draw_more_view, draw_view
from helpers import MemorySource, make_builder, make_method, make_teacher, random_batch

SPECS = {"local": ViewSpec(crop_scale=(0.1, 0.3), flip=0.5), "other": ViewSpec(jitter=0.2)}
LOCAL_AND_OTHER = {"more_views": {"local": 3, "other": 1}, "view_specs": SPECS}


class Halves:
    """An extra that cuts itself."""

    def __init__(self, rows: list[int]) -> None:
        self.rows = rows

    def part(self, start: int, stop: int) -> Halves:
        return Halves(self.rows[start:stop])


def with_extra(**extra: Any) -> Batch:
    return replace(random_batch(6), extra=extra)


# ------------------------------------------------------------------------------------------------ extras


def test_every_kind_of_extra_is_cut_with_the_batch() -> None:
    texts = TokenBatch(torch.arange(12)[:, None], torch.ones(12, 1).bool(), per_sample=2)
    batch = with_extra(
        labels=torch.arange(6),
        names=("a", "b", "c", "d", "e", "f"),
        array=np.arange(6),
        by_name={"deep": {"x": torch.arange(6)}},
        own=Halves([0, 1, 2, 3, 4, 5]),
        texts=texts,
    )
    part = batch.part(2, 5)
    assert part.extra["labels"].tolist() == [2, 3, 4]
    assert part.extra["names"] == ("c", "d", "e")
    assert part.extra["array"].tolist() == [2, 3, 4]
    assert part.extra["by_name"]["deep"]["x"].tolist() == [2, 3, 4]
    assert part.extra["own"].rows == [2, 3, 4]
    assert part.extra["texts"].ids[:, 0].tolist() == [4, 5, 6, 7, 8, 9]
    last = batch.part(4, 8)  # the last micro-batch may be shorter
    assert last.extra["labels"].tolist() == [4, 5]
    assert part.part(1, 2).extra["labels"].tolist() == [3]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (3.5, TypeError, r"batch.extra\['odd'\] is of type float, which cannot be cut"),
        ("six", TypeError, "of type str"),
        (torch.arange(5), ValueError, r"batch.extra\['odd'\] has 5 rows for a batch of 6 samples"),
        (torch.tensor(1.0), ValueError, "has no rows for a batch of 6"),
        ([1, 2], ValueError, "has 2 rows"),
        ({"in": [1]}, ValueError, r"odd\['in'\]"),
    ],
)
def test_an_extra_that_cannot_be_cut_is_refused(value: Any, error: type[Exception], message: str) -> None:
    batch = with_extra(odd=value)
    assert batch.to("cpu").extra.keys() == {"odd"}  # whole batches may bring anything
    with pytest.raises(error, match=message):
        batch.part(0, 3)


def test_extras_move_and_are_pinned_with_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = with_extra(labels=torch.arange(6), by_name={"x": torch.arange(6)}, names=list("abcdef"))
    moved = batch.to("meta")
    assert moved.extra["labels"].device.type == moved.extra["by_name"]["x"].device.type == "meta"
    assert moved.extra["names"] == list("abcdef")
    pinned: list[int] = []

    def pin(self: Tensor) -> Tensor:
        pinned.append(id(self))
        return self

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batch.pin_memory()
    assert {id(batch.extra["labels"]), id(batch.extra["by_name"]["x"])} <= {*pinned}


def test_labels_stay_with_their_rows_in_a_micro_batch() -> None:
    """Row i of a part was once paired with label i of the whole batch."""
    source = MemorySource()
    batch = make_builder(make_method("hinton"), source, extras={"labels": LabelReader()})[
        Plan(0, 0, *[(7, 2, 5, 4)] * 2)
    ]
    by_id = dict(zip(batch.ids, batch.extra["labels"].tolist(), strict=True))
    assert len(set(by_id.values())) > 1
    for start in (0, 1, 3):
        part = batch.part(start, start + 2)
        assert part.extra["labels"].tolist() == [by_id[sample] for sample in part.ids]


def test_an_extra_is_told_the_view() -> None:
    class Boxes:
        def read(self, sample: Sample, view: View, epoch: int) -> Any:
            return sample.id, view.box, epoch

        def join(self, items: Any) -> Any:
            return list(items)

    source, views = MemorySource(), ViewSpec(crop_scale=(0.3, 0.6))
    batch = make_builder(make_method("contrastive"), source, views=views, extras={"boxes": Boxes()})[
        Plan(0, 2, (3, 5), (3, 5))
    ]
    for row, index in enumerate((3, 5)):
        sample = source[index]
        assert batch.extra["boxes"][row] == (sample.id, draw_view(sample.id, 2, views, sample.image.size).box, 2)


# ------------------------------------------------------------------------------------------------ several views


def test_a_batch_brings_the_views_that_are_asked_for() -> None:
    source = MemorySource()
    builder = make_builder(make_method("hinton"), source, views=WHOLE, **LOCAL_AND_OTHER)
    batch = builder[Plan(0, 4, (3, 5), (3, 5))]
    for role, side in (("student", 16), ("teacher", 24)):
        inputs = batch.inputs[role]
        assert inputs["local"].shape == (6, 3, side, side)
        assert inputs["other"].shape == (2, 3, side, side)
        assert inputs["main"] is inputs.images
        for row, index in enumerate((3, 5)):
            sample = source[index]
            for place in range(3):
                view = draw_more_view(sample.id, 4, "local", place, SPECS["local"], sample.image.size)
                expected = builder.readers[role].preprocess.raw(*view.prepare(sample.image))
                torch.testing.assert_close(inputs["local"][3 * row + place], expected, rtol=0, atol=0)
    with pytest.raises(KeyError, match=r"no view 'locale', only main, local, other"):
        batch.inputs["student"]["locale"]


def test_further_views_are_cut_by_sample() -> None:
    batch = make_builder(make_method("hinton"), **LOCAL_AND_OTHER)[Plan(0, 0, (3, 5, 8), (3, 5, 8))]
    part = batch.part(1, 3).inputs["student"]
    whole = batch.inputs["student"]
    assert part["local"].equal(whole["local"][3:9])
    assert part["other"].equal(whole["other"][1:3])
    assert part.images.equal(whole.images[1:3])
    kept = batch.to("meta", images=False).inputs["student"]
    assert kept["local"].device.type == "cpu"
    assert kept.texts.ids.device.type == "meta"
    assert batch.to("meta").inputs["student"]["local"].device.type == "meta"


def test_further_views_change_nothing_else() -> None:
    plan = Plan(0, 3, (3, 5, 8), (3, 5, 8))
    plain, more = (
        make_builder(make_method("hinton"))[plan],
        make_builder(make_method("hinton"), **LOCAL_AND_OTHER)[plan],
    )
    assert plain.captions == more.captions
    assert plain.inputs["teacher"].images.equal(more.inputs["teacher"].images)


def test_further_views_differ_from_each_other_and_repeat() -> None:
    size = (200, 100)
    spec = SPECS["local"]
    drawn = {
        (number, name, place): draw_more_view("a", number, name, place, spec, size)
        for number in range(3)
        for name in ("local", "else")
        for place in range(3)
    }
    assert len({view.box for view in drawn.values()}) == len(drawn)
    assert drawn[1, "local", 2] == draw_more_view("a", 1, "local", 2, spec, size)
    assert draw_view("a", 1, spec, size).box not in {view.box for view in drawn.values()}


def test_models_that_agree_share_the_pixels_of_further_views() -> None:
    alike = make_method("hinton", teacher=make_teacher(image_size=16))
    batch = make_builder(alike, **LOCAL_AND_OTHER)[Plan(0, 0, (3, 5), (3, 5))]
    assert batch.inputs["student"]["local"] is batch.inputs["teacher"]["local"]


def test_views_that_nobody_describes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"2 further views 'locale'.* did you mean 'local'|locale.*local"):
        make_builder(make_method("hinton"), more_views={"locale": 2}, view_specs=SPECS)
    with pytest.raises(ConfigError, match="described: none"):
        make_builder(make_method("hinton"), more_views={"local": 2})
    with pytest.raises(ValueError, match="at least 1"):
        make_builder(make_method("hinton"), more_views={"local": 0}, view_specs=SPECS)


@pytest.mark.parametrize("name", ["main", "two words", ""])
def test_names_of_views_are_words(name: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be a name in data\.more_views"):
        DataConfig.from_mapping({"train": "scenes", "more_views": {name: {}}}, where="data")


def test_further_views_follow_the_main_ones() -> None:
    with pytest.raises(ConfigError, match=r"set data\.views\.num_views instead"):
        DataConfig.from_mapping({"train": "scenes", "more_views": {"local": {"num_views": 2}}}, where="data")
    with pytest.raises(ConfigError, match=r"sets reading, but all views of a run are read alike"):
        DataConfig.from_mapping({"train": "scenes", "more_views": {"local": {"reading": "fast"}}}, where="data")
    config = DataConfig.from_mapping({"train": "scenes", "more_views": {"local": {"flip": 0.5}}}, where="data")
    assert config.more_views["local"].flip == 0.5


def test_rows_of_texts_are_those_of_the_samples() -> None:
    texts = TokenBatch(torch.arange(12)[:, None], torch.ones(12, 1).bool(), torch.zeros(12, 1, 2), per_sample=3)
    assert texts.rows(torch.tensor([2, 0])).ids[:, 0].tolist() == [6, 7, 8, 0, 1, 2]
    assert texts.part(1, 3).ids[:, 0].tolist() == [3, 4, 5, 6, 7, 8]
    assert texts.part(1, 3).per_sample == 3
    cut = ModelInput(torch.zeros(4, 3, 2, 2), texts).part(1, 2)
    assert len(cut.images) == 1

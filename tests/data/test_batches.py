"""Batches: plans that resume and divide, bad samples that are replaced, one view for both models."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch

from cmapkd.data.batches import BatchBuilder
from cmapkd.data.loading import make_loader
from cmapkd.data.plans import Plan, PlanSampler
from cmapkd.data.types import BadSampleError, Batch
from cmapkd.data.views import WHOLE, ViewSpec, draw_view
from helpers import MemorySource, make_builder, make_method, make_model, make_teacher


def sampler(length: int = 23, **options: Any) -> PlanSampler:
    return PlanSampler(length, **{"batch_size": 4, "seed": 0, "start": 0, "stop": 15, **options})


def builder(source: MemorySource | None = None, method: str = "hinton", **options: Any) -> BatchBuilder:
    return make_builder(make_method(method), source, **options)


# ------------------------------------------------------------------------------------------------ plans


def test_an_epoch_shows_every_sample_at_most_once() -> None:
    plans = list(sampler())
    for epoch in range(3):
        shown = list(chain.from_iterable(plan.everyone for plan in plans if plan.epoch == epoch))
        assert len(shown) == len(set(shown)) == 20  # five batches of four; three samples wait for another epoch
    first, second = ([plan.everyone for plan in plans if plan.epoch == epoch] for epoch in (0, 1))
    assert first != second
    assert len(set(chain.from_iterable(chain(first, second)))) > 20  # others are left out the second time


def test_resume_gives_the_plans_of_the_uninterrupted_run() -> None:
    whole = list(sampler())
    for start in (0, 1, 4, 5, 14):
        assert list(sampler(start=start)) == whole[start:]
        assert len(sampler(start=start)) == 15 - start


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_the_batch_out(world_size: int) -> None:
    parts = [list(sampler(rank=rank, world_size=world_size)) for rank in range(world_size)]
    for step, plan in enumerate(sampler()):
        assert tuple(chain.from_iterable(part[step].mine for part in parts)) == plan.everyone == plan.mine
        assert all(part[step].everyone == plan.everyone for part in parts)


def test_plans_that_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="3 samples, fewer than one batch of 4"):
        sampler(3)
    with pytest.raises(ValueError, match="4 does not divide among 3 processes"):
        sampler(world_size=3)


# ------------------------------------------------------------------------------------------------ bad samples


def plan_of(*indices: int, step: int = 0) -> Plan:
    return Plan(step, 0, indices, indices)


def test_bad_samples_are_replaced_by_others_and_reported() -> None:
    made = builder(MemorySource(24, bad=(1, 2), without_caption=(3,)))
    batch = made[plan_of(0, 1, 2, 3)]
    assert len(batch) == len(set(batch.ids)) == 4
    assert batch.ids[0] == "m0"
    assert not {"m1", "m2", "m3"} & set(batch.ids)
    assert dict(batch.bad) == {
        "m1": "truncated: no end marker",
        "m2": "truncated: no end marker",
        "m3": "no caption",
    }
    assert batch.inputs["student"].images.shape[0] == batch.inputs["teacher"].images.shape[0] == 4


def test_replacements_are_the_same_again_and_differ_by_step() -> None:
    source = MemorySource(1000, bad=range(0, 1000, 2))
    made = builder(source)
    first, again = made[plan_of(0, 2, 5)], made[plan_of(0, 2, 5)]
    assert first.ids == again.ids
    assert first.bad == again.bad
    assert made[plan_of(0, 2, 5, step=1)].ids != first.ids


def test_replacements_do_not_depend_on_the_number_of_processes() -> None:
    made = builder(MemorySource(1000, bad=(1, 6)))
    everyone = (0, 1, 5, 6)
    whole = made[Plan(3, 0, everyone, everyone)]
    parts = [made[Plan(3, 0, everyone, everyone[start : start + 2])] for start in (0, 2)]
    assert whole.ids == parts[0].ids + parts[1].ids
    assert whole.bad == parts[0].bad + parts[1].bad


@pytest.mark.parametrize("step", range(20))
def test_a_replacement_is_never_in_the_batch_already(step: int) -> None:
    made = builder(MemorySource(12, bad=(0, 1, 2)), method="contrastive")
    batch = made[plan_of(0, 1, 2, 3, 4, 5, 6, step=step)]
    assert len(set(batch.ids)) == 7


def test_error_mode_stops_at_the_first_bad_sample() -> None:
    made = builder(MemorySource(24, bad=(1,)), on_bad_sample="error")
    with pytest.raises(BadSampleError, match="sample 'm1': truncated"):
        made[plan_of(0, 1)]


@pytest.mark.parametrize("length", [4, 500])
def test_data_without_a_readable_sample_stops(length: int) -> None:
    made = builder(MemorySource(length, bad=range(length)))
    with pytest.raises(BadSampleError, match="no readable sample was found to take its place at step 7"):
        made[plan_of(0, 1, step=7)]


# ------------------------------------------------------------------------------------------------ views and models


def test_both_models_see_one_view_each_through_its_own_preprocessing() -> None:
    source, views = MemorySource(), ViewSpec(crop_scale=(0.3, 0.6), flip=0.5, jitter=0.2)
    made = builder(source, views=views)
    batch = made[Plan(9, 4, (3, 5, 8), (3, 5, 8))]
    assert batch.view == 4
    for row, index in enumerate((3, 5, 8)):
        sample = source[index]
        view = draw_view(sample.id, 4, views, sample.image.size)
        picture, box = view.prepare(sample.image)
        for role, side in (("student", 16), ("teacher", 24)):
            pixels = batch.inputs[role].images[row]
            assert pixels.shape == (3, side, side)
            spec = made.readers[role].preprocess
            assert pixels.dtype == torch.uint8
            assert torch.equal(pixels, spec.raw(picture, box))
            assert torch.equal(spec.to_model(pixels), spec(picture, box))
        assert batch.captions[row] == view.choose(sample.captions)
    tokens = make_model().tokenizer(batch.captions)
    assert torch.equal(batch.inputs["student"].texts.ids, tokens.ids)
    assert torch.equal(batch.inputs["student"].texts.mask, tokens.mask)


def test_models_that_agree_on_preprocessing_share_the_pixels() -> None:
    agreeing = make_builder(make_method("hinton", teacher=make_teacher(image_size=16)))[plan_of(0, 1)]
    assert agreeing.inputs["student"].images is agreeing.inputs["teacher"].images
    differing = builder()[plan_of(0, 1)]
    assert differing.inputs["student"].images is not differing.inputs["teacher"].images


def test_models_of_one_size_share_the_pixels_whatever_their_means() -> None:
    """On a device, too; each then normalises them its own way."""
    teacher = make_teacher(image_size=16)
    teacher.model.image_spec = replace(teacher.model.image_spec, mean=(0.4, 0.45, 0.5), std=(0.2, 0.3, 0.4))
    source = MemorySource()
    made = make_builder(make_method("hinton", teacher=teacher), source, views=WHOLE)
    batch = made[plan_of(0, 1)]
    for each in (batch, batch.to("cpu"), batch.part(0, 1)):
        pixels = [each.inputs[role].images for role in ("student", "teacher")]
        assert pixels[0].data_ptr() == pixels[1].data_ptr()
    assert made.bytes_of(1) == 3 * 16 * 16
    for row in (0, 1):
        seen = []
        for role in ("student", "teacher"):
            spec = made.readers[role].preprocess
            seen.append(spec.to_model(batch.inputs[role].images)[row])
            assert torch.equal(seen[-1], spec(source[row].image))
        assert not torch.allclose(seen[0], seen[1])


def test_views_repeat_when_their_number_is_limited() -> None:
    made = builder(views=ViewSpec(crop_scale=(0.3, 0.6), num_views=2))
    batches = [made[Plan(0, epoch, (0, 1), (0, 1))] for epoch in range(4)]
    pixels = [batch.inputs["student"].images for batch in batches]
    assert torch.equal(pixels[0], pixels[2])
    assert torch.equal(pixels[1], pixels[3])
    assert not torch.equal(pixels[0], pixels[1])
    assert [batch.view for batch in batches] == [0, 1, 0, 1]


def test_without_a_view_pictures_are_fitted_as_in_evaluation() -> None:
    source = MemorySource()
    batch = builder(source, views=WHOLE)[plan_of(2)]
    spec = make_teacher().model.image_spec
    assert torch.equal(spec.to_model(batch.inputs["teacher"].images[0]), spec(source[2].image))


def same(one: Batch, other: Batch) -> bool:
    return (one.ids, one.captions, one.view, one.bad) == (other.ids, other.captions, other.view, other.bad) and all(
        torch.equal(one.inputs[role].images, other.inputs[role].images)
        and torch.equal(one.inputs[role].texts.ids, other.inputs[role].texts.ids)
        for role in one.inputs
    )


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a single core
def test_workers_make_the_same_batches() -> None:
    made = builder(MemorySource(23, bad=(4,), without_caption=(7,)))
    state = torch.get_rng_state()
    alone, helped = (list(make_loader(made, sampler(stop=8), workers=workers, pin_memory=False)) for workers in (0, 2))
    assert len(alone) == len(helped) == 8
    assert all(same(one, other) for one, other in zip(alone, helped, strict=True))
    assert any(batch.bad for batch in alone)
    assert torch.equal(torch.get_rng_state(), state)  # making batches draws nothing from the run's random state


def test_a_bad_sample_stops_the_run_from_inside_a_worker_with_its_reason() -> None:
    made = builder(MemorySource(23, bad=range(23)), method="contrastive")
    with pytest.raises(BadSampleError, match="no readable sample was found"):
        list(make_loader(made, sampler(stop=2), workers=1, pin_memory=False))

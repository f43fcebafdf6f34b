"""Where tokens stand in their texts: batches say it where a method matches words of two tokenizers, and only there."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cmapkd.cache import CacheConfig, CachePlan, all_keys
from cmapkd.data.plans import PlanSampler
from cmapkd.data.readers import DualReader
from cmapkd.data.types import Batch
from cmapkd.data.views import WHOLE
from cmapkd.methods import DualEncoderMethod
from cmapkd.models import DualEncoder, FrozenTeacher
from cmapkd.models.vocabulary import TrainedTokenizer
from cmapkd.own_loop import Distiller
from cmapkd.run import RunConfig, readers_of
from helpers import (
    CLIP_KD_IN_FULL,
    CMAPKD_EXACT,
    DUAL,
    LENT,
    ONE_WIDTH,
    WORDS,
    MemorySource,
    make_builder,
    make_method,
    make_model,
)

pytestmark = pytest.mark.usefixtures("one_thread")

MATCHING: dict[str, tuple[str, dict[str, Any]]] = {
    "cmapkd": ("cmapkd", {}),
    "cmapkd, everything": ("cmapkd", CMAPKD_EXACT),
    "cmapkd, key tokens": ("cmapkd", {"places": "key_tokens", "key_tokens": 4}),
    "clip_kd, everything": ("clip_kd", CLIP_KD_IN_FULL),
    "clip_rd, lent hints": ("clip_rd", LENT),
    "fitnet, texts": ("fitnet", {"text_guided_layer": 1.0, "text_hint_layer": 1.0}),
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in DUAL if name != "cmapkd"},
    "cmapkd, pooled": ("cmapkd", {"places": "pooled"}),
    "cmapkd, sentences": ("cmapkd", {"language_levels": {"L3": 1.0, "L4": 1.0}}),
    "cmapkd, pictures": ("cmapkd", {"language_weight": 0}),
    "cmapkd, levels as vectors": ("cmapkd", {"language_levels": {"L4": 1.0}, "ablations": {"relation_weight": 1.0}}),
    "clip_kd, hints of pictures": ("clip_kd", {"hints": {"P2": 1.0, "L3": 1.0}}),
}
CASES = MATCHING | OTHERS


@cache
def other_tokenizer() -> TrainedTokenizer:
    """Spells the words of `MemorySource` otherwise than that of `make_model`."""
    return TrainedTokenizer.train([" ".join(WORDS)] * 4, vocab_size=40, context_length=12)


def made(case: str, *, other: bool) -> DualEncoderMethod:
    """The method with a teacher of another tokenizer, or of the student's."""
    name, settings = CASES[case]
    teacher = make_model(dim=16 if name in ONE_WIDTH else 24, image_size=24, seed=7)
    if other:
        teacher.tokenizer = other_tokenizer()
    method = make_method(name, teacher=FrozenTeacher(teacher), settings=settings)
    assert isinstance(method, DualEncoderMethod)
    return method.train()


def batch_of(method: DualEncoderMethod, *, spans: bool | None, **options: Any) -> Batch:
    """As the run makes it; or with spans in any case, or in none."""
    builder = make_builder(method, **options)
    if spans is not None:
        readers = {role: replace(reader, spans=spans) for role, reader in builder.readers.items()}
        builder = make_builder(method, readers=readers, views=builder.views, stored=builder.stored)
    return builder[PlanSampler(24, batch_size=8, seed=0, start=0, stop=1).plan(0)]


def results(method: DualEncoderMethod, batch: Batch, micro_batch: int | None = None) -> dict[str, Tensor]:
    """Terms, and the student's gradients."""
    method = copy.deepcopy(method)
    method.micro_batch = micro_batch
    terms = method(batch)
    torch.stack([term.weight * term.value for term in terms.values()]).sum().backward()
    gradients = {f"d {name}": each.grad for name, each in method.named_parameters() if each.grad is not None}
    return {name: term.value.detach() for name, term in terms.items()} | gradients


def has_spans(batch: Batch) -> set[bool]:
    return {inputs.texts.spans is not None for inputs in batch.inputs.values()}


@pytest.mark.parametrize("case", CASES)
def test_a_method_asks_for_what_it_reads(case: str) -> None:
    """With a teacher of another tokenizer: the losses and gradients are those of batches that say it in any case."""
    method = made(case, other=True)
    asked, always = batch_of(method, spans=None), batch_of(method, spans=True)
    assert has_spans(always) == {True}
    assert has_spans(asked) == {case in MATCHING}
    for micro_batch in (None, 3):
        found, expected = results(method, asked, micro_batch), results(method, always, micro_batch)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    if case in MATCHING:
        with pytest.raises(ValueError, match=r"says so in `matches_words`"):
            method(batch_of(method, spans=False))


@pytest.mark.parametrize("case", MATCHING)
def test_the_same_tokenizer_needs_no_spans(case: str) -> None:
    method = made(case, other=False)
    assert method.matches_words
    asked = batch_of(method, spans=None)
    assert has_spans(asked) == {False}
    for micro_batch in (None, 3):
        found = results(method, asked, micro_batch)
        expected = results(method, batch_of(method, spans=True), micro_batch)
        assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("case", ["cmapkd", "cmapkd, key tokens"])
def test_beside_a_cached_teacher(case: str, tmp_path: Path) -> None:
    """Its rows hold levels, and the batch brings its tokens: with spans, where the student has others."""
    method = made(case, other=True)
    expected = results(method, batch_of(method, spans=None, views=WHOLE))
    config, keys = CacheConfig(folder=tmp_path / "cache", store="fp32"), all_keys(24, 1)
    plan = CachePlan.of_method(config, method, source=MemorySource(), views=WHOLE, keys=keys, precision="fp32")
    plan.build(device="cpu")
    method.teacher = plan.cached_teacher(plan.open(), make_model)
    assert method.needs_spans
    batch = batch_of(method, spans=None, views=WHOLE, stored={"teacher": plan.open()})
    assert has_spans(batch) == {True}
    found = results(method, batch)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("other", [True, False])
def test_a_loop_of_ones_own(other: bool) -> None:
    method = made("cmapkd", other=other)
    loop = Distiller(method, total=1, seed=0)
    pixels = {role: torch.zeros(2, 3, side, side) for role, side in (("student", 16), ("teacher", 24))}
    assert has_spans(loop.batch(pixels, ["red cat", "green dog near tree"])) == {other}


@pytest.mark.parametrize("other", [True, False])
@pytest.mark.parametrize("case", ["cmapkd", "hinton"])
def test_readers_of_a_run(case: str, other: bool) -> None:
    method = made(case, other=other)
    about = {"data": {"train": "scenes?length=8"}, "student": "tiny:small", "teacher": "tiny:base"}
    config = RunConfig.from_mapping({**about, "method": CASES[case][0], "training": {"steps": 1}, "baseline": "none"})
    readers = readers_of(method, config)
    assert readers.keys() == {"student", "teacher"}
    for reader in readers.values():
        assert isinstance(reader, DualReader)
        assert reader.spans == (case == "cmapkd" and other)


def test_a_momentum_teacher_reads_the_students_tokens() -> None:
    """It has none of its own that could differ, although its tokenizer is another object."""
    from cmapkd.models import MomentumTeacher

    method = made("cmapkd", other=False)
    momentum = MomentumTeacher(method.student)
    momentum.model.tokenizer = other_tokenizer()
    assert isinstance(momentum.model, DualEncoder)
    method.teachers["momentum"] = momentum
    assert not method.needs_spans

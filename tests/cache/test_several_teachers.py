"""Several teachers, each with a cache of its own, and rows of further texts."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_support import LENGTH, VIEWS, losses

from cmapkd.cache import (
    CacheConfig,
    CachedTeacher,
    CacheError,
    CacheFolder,
    CachePlan,
    CacheReader,
    CacheWarning,
    all_keys,
)
from cmapkd.data.plans import Plan
from cmapkd.data.texts import TextChoice
from cmapkd.methods import Method
from helpers import MemorySource, make_builder, make_method, make_teacher, make_trainer, second_teacher


def two_teachers(**settings: Any) -> Method:
    return make_method("mobileclip", settings={"synthetic": True, **settings}, more_teachers=[second_teacher()])


def plan_of(folder: Path, method: Method, role: str, keys: Any = None, mix: float = 0.0) -> CachePlan:
    source = MemorySource(LENGTH)
    config = CacheConfig(folder=folder / "c", batch_size=4, store="fp32")
    keys = all_keys(LENGTH, 2) if keys is None else keys
    return CachePlan.of_method(
        config,
        method,
        source=source,
        views=VIEWS,
        keys=keys,
        precision="fp32",
        role=role,
        texts=TextChoice(method.text_pools, mix),
    )


def run(out: Path, method: Method, *, stored: Any = None, steps: int = 7, **options: Any) -> list[dict[str, float]]:
    builder: dict[str, Any] = {"views": VIEWS, "stored": stored or {}, "texts": TextChoice(method.text_pools)}
    torch.manual_seed(1)
    make_trainer(out, method, source=MemorySource(LENGTH), steps=steps, builder=builder, **options).run()
    return losses(out)


def cached(folder: Path, *, keys: Any = None) -> tuple[Method, dict[str, CacheReader]]:
    method = two_teachers()
    stored = {}
    for role in [*method.teachers]:
        plan = plan_of(folder, method, role, keys)
        plan.build(device="cpu")
        stored[role] = CacheReader(CacheFolder.open(plan.folder))
        again = {"teacher": make_teacher, "second": second_teacher}[role]
        method.teachers[role] = plan.cached_teacher(stored[role], lambda again=again: again().model)
    return method, stored


def test_each_teacher_answers_from_its_own_cache(tmp_path: Path) -> None:
    live = run(tmp_path / "live", two_teachers())
    method, stored = cached(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"c", "c-second"}
    for role, teacher in method.teachers.items():
        assert isinstance(teacher, CachedTeacher)
        assert teacher.role == role
        names = {field.name for field in teacher.cache.layout.fields}
        assert names == {"image", "text", "text/synthetic"}
    for options in ({}, {"micro_batch": 3}):
        used = cached(tmp_path)[0] if options else method
        found = run(tmp_path / f"cached{len(options)}", used, stored=stored, **options)
        for mine, theirs in zip(found, live, strict=True):
            for key, value in theirs.items():
                assert mine[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


def test_the_live_teachers_answer_what_is_missing(tmp_path: Path) -> None:
    live = run(tmp_path / "live", two_teachers(), steps=3)
    method, stored = cached(tmp_path, keys=all_keys(LENGTH, 1).first(20))
    with pytest.warns(CacheWarning, match="the teacher is loaded"):
        found = run(tmp_path / "cached", method, stored=stored, steps=3)
    for mine, theirs in zip(found, live, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_other_texts_are_refused(tmp_path: Path) -> None:
    plan_of(tmp_path, two_teachers(), "teacher").build(device="cpu")
    for method, mix in ((two_teachers(synthetic=False), 0.0), (two_teachers(), 0.5)):
        with pytest.raises(CacheError, match="it answers other texts of the samples"):
            plan_of(tmp_path, method, "teacher", mix=mix).open()


def test_without_further_texts_nothing_of_a_cache_changes(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, two_teachers(synthetic=False), "teacher")
    assert "texts" not in plan.identity
    assert [field.name for field in plan.layout.fields] == ["image", "text"]
    other = plan_of(tmp_path, make_method("hinton"), "teacher")
    assert (plan.identity, plan.layout.plain()) == (other.identity, other.layout.plain())


def test_a_run_with_two_teachers_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", two_teachers(), steps=6, checkpoint_every=3)
    half = "checkpoints/step-000000003"
    shutil.copytree(tmp_path / "whole" / half, tmp_path / "again" / half)
    method = two_teachers()
    builder = {"views": VIEWS, "texts": TextChoice(method.text_pools)}
    trainer = make_trainer(
        tmp_path / "again", method, source=MemorySource(LENGTH), steps=6, builder=builder, checkpoint_every=3
    )
    trainer.run(resume=True)
    assert losses(tmp_path / "again") == whole[3:]


@pytest.mark.parametrize("keys", [None, all_keys(LENGTH, 1).first(7)])
@pytest.mark.parametrize("store", ["fp32", "int8"])
def test_several_texts_of_a_pool_are_stored_for_each_sample(tmp_path: Path, store: Any, keys: Any) -> None:
    texts, source, live = TextChoice({"captions": 2, "synthetic": 3}), MemorySource(LENGTH), make_teacher()
    method = make_method("hinton")
    plan = CachePlan.of_method(
        CacheConfig(folder=tmp_path / "c", batch_size=4, store=store),
        method,
        source=source,
        views=VIEWS,
        keys=all_keys(LENGTH, 2) if keys is None else keys,
        precision="fp32",
        texts=texts,
    )
    assert plan.identity["texts"] == "captions*2,synthetic*3 mixed 0"
    plan.build(device="cpu")
    reader = CacheReader(CacheFolder.open(plan.folder))
    teacher = plan.cached_teacher(reader, lambda: make_teacher().model)
    places = (5, 1, 9, 3)
    whole, stored = (
        make_builder(method, source, views=VIEWS, texts=texts, stored=answers)[Plan(0, 0, places, places)]
        for answers in ({}, {"teacher": reader})
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CacheWarning)
        for batch, other in ((stored, whole), (stored.part(1, 3), whole.part(1, 3))):
            found, expected = teacher(batch), live(other)
            for pool, count in texts.counts.items():
                assert len(found.more_texts[pool].embedding) == count * len(batch)
                torch.testing.assert_close(
                    found.more_texts[pool].embedding,
                    expected.more_texts[pool].embedding,
                    rtol=1e-4,
                    atol=1e-5 if store == "fp32" else 2e-2,
                )

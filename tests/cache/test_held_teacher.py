"""A teacher whose weights are held in bf16: the same caches, losses and runs, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_support import VIEWS, cache_plan, contents, losses, train
from torch import Tensor

import cmapkd
from cmapkd.cache import CachedTeacher, CacheWarning
from cmapkd.cache.identity import weight_hash
from cmapkd.data.open import open_source
from cmapkd.data.types import Batch
from cmapkd.methods import Method
from cmapkd.models import DualEncoder, FrozenTeacher
from helpers import (
    CLIP_KD_IN_FULL,
    CMAPKD_EXACT,
    DUAL,
    LENT,
    MemorySource,
    make_builder,
    make_method,
    make_model,
    make_teacher,
    random_batch,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def unheld(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A switch: teachers that are made after it keep their own weights."""
    return lambda: monkeypatch.setattr(FrozenTeacher, "hold_in_bf16", lambda self: None)


@pytest.mark.parametrize("name", ["clip_kd", "cmapkd"])
def test_the_same_cache(name: str, unheld: Any, tmp_path: Path) -> None:
    """Its identity, too, which has a hash of the teacher's own weights."""
    held = make_method(name)
    plan = cache_plan(tmp_path / "held", held, precision="bf16")
    plan.build(device="cpu")
    assert isinstance(held.teacher, FrozenTeacher)
    assert held.teacher.model.held
    assert plan.existing() is not None
    assert plan.identity["teacher"] == weight_hash(make_teacher().model)
    unheld()
    method = make_method(name)
    cache_plan(tmp_path / "own", method, precision="bf16").build(device="cpu")
    assert isinstance(method.teacher, FrozenTeacher)
    assert not method.teacher.model.held
    assert contents(tmp_path / "held") == contents(tmp_path / "own")


def test_in_fp32_nothing_is_held(tmp_path: Path) -> None:
    method = make_method("clip_kd")
    cache_plan(tmp_path / "cache", method).build(device="cpu")
    assert isinstance(method.teacher, FrozenTeacher)
    assert not method.teacher.model.held


def test_a_teacher_that_is_loaded_again(unheld: Any, tmp_path: Path) -> None:
    source = MemorySource(24, bad=(3, 11))

    def trained(name: str) -> tuple[list[dict[str, float]], Method]:
        source.bad = {3, 11}  # while the cache is built
        plan = cache_plan(tmp_path / name, make_method("clip_kd"), source=source, precision="bf16")
        plan.build(device="cpu")
        source.bad = set()
        with pytest.warns(CacheWarning, match="the teacher is loaded to answer"):
            return train(
                tmp_path / f"run {name}",
                "clip_kd",
                cache={"folder": tmp_path / name},
                source=source,
                precision="bf16",
                reload=lambda: make_teacher().model,
            )

    found, method = trained("held")
    assert method.teacher.live.model.held  # type: ignore[union-attr]
    unheld()
    expected, method = trained("own")
    assert not method.teacher.live.model.held  # type: ignore[union-attr]
    assert found == expected


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in DUAL},
    "cmapkd, everything": ("cmapkd", CMAPKD_EXACT),
    "clip_kd, everything": ("clip_kd", CLIP_KD_IN_FULL),
    "clip_rd, lent hints": ("clip_rd", LENT),
}


def terms_of(case: str, batch: Batch, *, micro_batch: int | None, hold: bool) -> dict[str, Tensor]:
    """Terms and gradients of a step."""
    name, settings = CASES[case]
    method = make_method(name, settings=settings).train()
    method.micro_batch = micro_batch
    teachers = [teacher for teacher in method.teachers.values() if isinstance(teacher, FrozenTeacher)]
    for teacher in teachers if hold else ():
        teacher.hold_in_bf16()
        assert bool(teacher.model.held) != teacher.shared
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            method(replace(batch, ids=tuple(f"earlier{number}" for number in range(len(batch)))))
        terms = method(batch)
    torch.stack([term.weight * term.value.float() for term in terms.values()]).sum().backward()
    gradients = {f"d {key}": each.grad for key, each in method.named_parameters() if each.grad is not None}
    return {key: term.value.detach() for key, term in terms.items()} | gradients


@pytest.mark.parametrize(  # in micro-batches a teacher is asked by the code that methods share
    ("case", "micro_batch"),
    [*((case, None) for case in CASES), *((case, 3) for case in ("contrastive", "acam_kd", "cmapkd, everything"))],
)
def test_every_methods_step(case: str, micro_batch: int | None) -> None:
    name, settings = CASES[case]
    method = make_method(name, settings=settings)
    batch = random_batch(8, pools=method.text_pools, views=method.more_views)
    found = terms_of(case, batch, micro_batch=micro_batch, hold=True)
    expected = terms_of(case, batch, micro_batch=micro_batch, hold=False)
    assert found.keys() == expected.keys()
    assert [key for key, value in expected.items() if not torch.equal(found[key], value)] == []


@pytest.mark.parametrize("cache", ["off", "auto"])
def test_whole_runs(cache: str, unheld: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A run holds its live teacher, and the student and all scores are those of one that does not."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    settings: dict[str, Any] = {
        "teacher": "tiny:scenes-teacher",
        "student": {"name": "tiny:debug", "options": {"embed_dim": 16}},
        "data": {"train": "scenes?length=24&size=32", "val": "scenes@val?length=8&size=32"},
        "method": "clip_kd",
        "training": {"steps": 3, "batch_size": 8, "log_every": 1, "device": "cpu", "precision": "bf16"},
        "cache": cache,
    }
    cmapkd.distill(**settings, out=tmp_path / "held")
    said = capsys.readouterr().out
    assert ("of its parameters in bf16, with the same answers" in said) == (cache == "off")
    unheld()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another home"))
    cmapkd.distill(**settings, out=tmp_path / "own", quiet=True)
    assert losses(tmp_path / "held") == losses(tmp_path / "own")
    weights = [(tmp_path / name / "student" / "model.safetensors").read_bytes() for name in ("held", "own")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_teacher_whose_towers_are_random_can_be_loaded_again(precision: str, tmp_path: Path) -> None:
    """They are drawn from its role: another draw would be other weights, which are refused."""
    from cmapkd.run import RunConfig, answer_from_cache, load_teachers, method_of

    options = {"embed_dim": 16, "text_width": 32, "text_layers": 1, "text_heads": 2, "context_length": 12}
    about = {
        "teacher": {"name": "timm:test_vit", "init": "scratch", "options": {**options, "image_size": 48}},
        "student": "tiny:debug",
        "data": {"train": "scenes?length=4&size=48"},
        "method": "clip_kd",
        "training": {"steps": 1, "batch_size": 4, "device": "cpu", "precision": precision},
        "cache": {"folder": str(tmp_path / "cache")},
        "baseline": "none",
    }
    config = RunConfig.from_mapping(about)
    teachers = load_teachers(config)
    method = method_of(config, make_model(), teachers)
    answer_from_cache(config, method, open_source("scenes?length=4&size=48"), None)
    torch.manual_seed(99)
    assert isinstance(method.teacher, CachedTeacher)
    with pytest.warns(CacheWarning):
        live = method.teacher.loaded(1, torch.device("cpu"))
    assert bool(live.model.held) == (precision == "bf16")
    if precision == "fp32":
        assert weight_hash(live.model) == weight_hash(teachers["teacher"].model)


def test_frozen_towers_of_a_student_keep_their_weights(tmp_path: Path) -> None:
    """Its cache asks them, and the student goes on with them."""
    from cmapkd.cache import CachePlan

    class Towers(type(make_model())):  # type: ignore[misc]
        def pooled_towers(self, towers: Any) -> DualEncoder:
            return self

        @property
        def frozen_towers(self) -> Any:
            return ("image", "text")

    student = make_model(kind=Towers)
    known = weight_hash(student)
    plan = cache_plan(tmp_path / "cache", precision="bf16")
    plan = CachePlan.of_student(
        plan.config,
        student,
        source=MemorySource(24),
        views=VIEWS,
        keys=plan.keys,
        precision="bf16",
        texts=make_builder(make_method("contrastive")).texts,  # type: ignore[arg-type]
    )
    assert plan.build(device="cpu").rows
    assert not student.held
    assert weight_hash(student) == known

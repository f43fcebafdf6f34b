"""The pass in which a teacher answers the training data once, before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cmapkd.cache import CacheConfig, CachePlan
from cmapkd.config import ConfigError
from cmapkd.data.batches import BatchBuilder
from cmapkd.data.plans import Plan
from cmapkd.features import sample_keys
from cmapkd.methods.targets import Answered
from cmapkd.own_loop import Distiller
from cmapkd.run.targets import prepare_targets
from helpers import MemorySource, make_method, make_model
from surveyed import survey_of


def test_every_sample_is_answered_once_in_its_first_view() -> None:
    method, source = make_method("clip_kd"), MemorySource(40, bad=(3, 17))
    survey = survey_of(method, "data.views.num_views=2", source=source)
    parts = [*survey()]
    found = Answered.joined(iter(parts))
    good = [f"m{i}" for i in range(40) if i not in (3, 17)]
    assert sorted(found.keys.tolist()) == sorted(sample_keys(good).tolist())
    assert max(len(part.keys) for part in parts) == 5  # of the micro-batch
    assert found.labels.eq(-1).all()  # the method reads none
    first = survey.plans(None)[0]
    assert isinstance(first, Plan)
    assert set(first.epochs) == {0}
    assert first.mine == (0, 1, 2, 3, 4)


def test_what_the_run_never_reads_is_left_out() -> None:
    survey = survey_of(make_method("clip_kd"), "training.steps=2")
    assert sum(len(plan.mine) for plan in survey.plans(None)) == 16
    drawn = [index for plan in survey.plans(7) for index in plan.mine]
    assert len(set(drawn)) == 7
    assert drawn == [index for plan in survey.plans(7) for index in plan.mine]


def test_a_cache_and_a_live_teacher_answer_alike(tmp_path: Path) -> None:
    method, source = make_method("hinton", settings={"form": "classes"}), MemorySource(40)
    live = survey_of(method, "data.views.num_views=2")
    expected = Answered.joined(live())
    assert torch.equal(expected.labels, torch.tensor([i % 5 if i % 3 else -1 for i in range(40)]))
    alone = Answered.joined(live(towers=("image",)))
    assert alone.text.shape == (40, 0)
    torch.testing.assert_close(alone.image, expected.image)
    config = CacheConfig(folder=tmp_path, store="fp32", batch_size=8)
    plan = CachePlan.of_method(
        config, method, source=source, views=live.config.data.views, keys=live.wanted, precision="fp32"
    )
    plan.build(device="cpu")
    reader = plan.open()
    method.teacher = plan.cached_teacher(reader, make_model)
    found = Answered.joined(survey_of(method, "data.views.num_views=2", stored={"teacher": reader})())
    for name in ("keys", "labels"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    for name in ("image", "text"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-6)


def test_answers_are_those_of_a_step() -> None:
    method, source = make_method("clip_kd"), MemorySource(40)
    survey = survey_of(method)
    found = Answered.joined(survey())
    builder: BatchBuilder = survey._builder("teacher")
    batch = builder[Plan(0, 0, (7, 8), (7, 8))]
    assert batch.ids == (source[7].id, source[8].id)
    rows = [found.keys.tolist().index(key) for key in sample_keys(batch.ids).tolist()]
    torch.testing.assert_close(found.image[rows], method.encode_teacher(batch).image.embedding, rtol=1e-5, atol=1e-6)


class Prepares(type(make_method("clip_kd"))):  # type: ignore[misc]
    """Counts how often it is asked to prepare."""

    prepares = True
    asked = 0

    def prepare(self, survey: Any) -> None:
        self.asked += 1
        assert sum(len(part.keys) for part in survey()) == 40


def test_it_is_made_before_the_first_step_alone(tmp_path: Path) -> None:
    method = make_method(Prepares)
    survey, said = survey_of(method), list[str]()

    def prepare(resume: bool) -> None:
        prepare_targets(
            survey.config, method, survey.source, {}, survey.texts, out=tmp_path, resume=resume, voice=said.append
        )

    prepare(resume=False)
    prepare(resume=True)  # killed before its first checkpoint
    assert method.asked == 2
    (tmp_path / "checkpoints" / "step-000010").mkdir(parents=True)
    prepare(resume=True)
    assert method.asked == 2
    assert said == ["building targets of the teacher's answers"] * 2


def test_a_loop_of_ones_own_refuses_such_a_method() -> None:
    with pytest.raises(ConfigError, match="builds targets of the teacher's answers to the training data"):
        Distiller(make_method(Prepares), total=1, seed=0)

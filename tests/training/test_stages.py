"""Stages: their terms, parts and rates, in any method; where they begin and end; resuming inside any of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cmapkd.config import ConfigError
from cmapkd.data.streams import JoinedSource
from cmapkd.methods import StageConfig
from cmapkd.methods.stages import stage_ends
from cmapkd.training import TrainConfig, Trainer
from contracted import NormedStudent
from helpers import MemorySource, make_method, make_model, make_trainer, read_lines
from training.test_resume import assert_same_end, interrupt

STAGES: list[dict[str, Any]] = [
    {"name": "coarse", "share": 0.3, "terms": ["feature"], "learning_rate": 2e-3},
    {"name": "modules", "share": 0.3, "train": ["modules"]},
    {"name": "all", "share": 0.4, "learning_rate": 1e-4},
]


def staged(out: Path, method: str = "clip_kd", stages: list[dict[str, Any]] = STAGES, **training: Any) -> Trainer:
    return make_trainer(out, method, steps=10, stages=[StageConfig(**stage) for stage in stages], **training)


def test_ends_follow_shares_steps_and_epochs() -> None:
    def ends(*lengths: dict[str, Any], total: int = 100) -> list[int]:
        return stage_ends([StageConfig(**length) for length in lengths], total=total, steps_per_epoch=12)

    assert ends({"share": 0.25}, {"share": 0.25}, {"share": 0.5}) == [25, 50, 100]
    assert ends({"share": 1 / 3}, {"share": 1 / 3}, {"share": 1 / 3}, total=10) == [3, 7, 10]
    assert ends({"share": 0.001}, {"share": 0.999}, total=5) == [1, 5]
    assert ends({"steps": 3}, {"steps": 4}) == [3, 7]
    assert ends({"epochs": 1.5}, {"epochs": 2}) == [18, 42]
    with pytest.raises(ConfigError, match="2 steps are too few for 3 stages"):
        ends({"share": 0.3}, {"share": 0.3}, {"share": 0.4}, total=2)


def test_lengths_are_stated_once_and_in_one_way() -> None:
    assert TrainConfig(stages=(StageConfig(steps=3), StageConfig(steps=4))).num_steps(10) == 7
    assert TrainConfig(stages=(StageConfig(epochs=1), StageConfig(epochs=2))).num_steps(10) == 30
    with pytest.raises(ValueError, match="in different ways"):
        TrainConfig(steps=5, stages=(StageConfig(share=0.5), StageConfig(steps=4)))
    with pytest.raises(ValueError, match=r"sum to 0\.7"):
        TrainConfig(steps=5, stages=(StageConfig(share=0.5), StageConfig(share=0.2)))
    with pytest.raises(ValueError, match="leave steps out"):
        TrainConfig(steps=5, stages=(StageConfig(steps=4),))
    with pytest.raises(ValueError, match="neither"):
        TrainConfig(stages=(StageConfig(share=1.0),))
    with pytest.raises(ValueError, match="give share, steps or epochs"):
        StageConfig(name="without length")


def test_a_baseline_is_as_long_in_one_piece() -> None:
    shares = TrainConfig(steps=9, stages=(StageConfig(share=0.5, levels=("P5",)), StageConfig(share=0.5)))
    assert (shares.without_stages().stages, shares.without_stages().num_steps(10)) == ((), 9)
    for stages, total in (
        ((StageConfig(steps=3), StageConfig(steps=4)), 7),
        ((StageConfig(epochs=1, terms=("bank",)), StageConfig(epochs=2)), 30),
    ):
        whole = TrainConfig(stages=stages).without_stages()
        assert (whole.stages, whole.num_steps(10)) == ((), total)
    assert TrainConfig(epochs=2).without_stages() == TrainConfig(epochs=2)


def test_each_stage_has_its_terms_and_its_rate(tmp_path: Path) -> None:
    staged(tmp_path, optim={"schedule": "constant", "learning_rate": 1e-3}).run()
    lines = [line for line in read_lines(tmp_path / "metrics.jsonl") if "loss" in line]
    every = {"terms/contrastive", "terms/relational", "terms/feature", "terms/interactive"}
    found = [{key for key in line if key.startswith("terms/")} for line in lines]
    assert found == [{"terms/feature"}] * 3 + [every] * 7
    assert [line["learning_rate"] for line in lines[2:]] == [2e-3] + [1e-3] * 3 + [1e-4] * 4


def test_only_the_parts_of_a_stage_learn(tmp_path: Path) -> None:
    trainer = staged(tmp_path)
    changed: list[set[str]] = []
    step = trainer._step

    def watched(batch: Any) -> Any:
        before = {name: parameter.detach().clone() for name, parameter in trainer.method.named_parameters()}
        values = step(batch)
        after = dict(trainer.method.named_parameters())
        changed.append({trainer.method.part_of(n) for n, old in before.items() if not torch.equal(old, after[n])})
        return values

    trainer._step = watched  # type: ignore[method-assign]
    trainer.run()
    assert changed == [{"student", "modules"}] * 3 + [{"modules"}] * 3 + [{"student", "modules"}] * 4


@pytest.mark.parametrize("method", ["contrastive", "hinton", "clip_kd"])
def test_one_stage_of_everything_is_no_stage(tmp_path: Path, method: str) -> None:
    plain, whole = (
        make_trainer(tmp_path / "a", method, steps=3),
        make_trainer(tmp_path / "b", method, steps=3, stages=[StageConfig(share=1.0)]),
    )
    plain.run()
    whole.run()
    assert_same_end(plain, whole)


@pytest.mark.parametrize("steps", [(1, 4, 9), (3, 6)])
def test_a_run_interrupted_in_any_stage_ends_the_same(
    tmp_path: Path, steps: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = staged(tmp_path / "whole")
    whole.run()
    for step in steps:
        interrupt(staged(tmp_path / "parts"), step, monkeypatch, resume=step > steps[0])
    again = staged(tmp_path / "parts")
    again.run(resume=True)
    assert_same_end(whole, again)


def test_batch_norms_that_do_not_learn_keep_their_statistics(tmp_path: Path) -> None:
    stages = [StageConfig(share=0.5, train=("modules",)), StageConfig(share=0.5)]
    student = make_model(kind=NormedStudent)
    assert isinstance(student, NormedStudent)
    trainer, means = make_trainer(tmp_path, make_method("clip_kd", student=student), steps=4, stages=stages), []
    step = trainer._step

    def watched(batch: Any) -> Any:
        values = step(batch)
        means.append(student.norm.running_mean.clone())
        return values

    trainer._step = watched  # type: ignore[method-assign]
    trainer.run()
    assert not means[0].any()
    assert not means[1].any()
    assert means[2].any()
    assert student.norm.momentum == 0.1


def test_names_that_the_method_lacks_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no term 'feture' \(did you mean 'feature'\?\)"):
        staged(tmp_path, stages=[{"share": 1.0, "terms": ["feture"]}])
    with pytest.raises(ConfigError, match="no level 'P2'; it has: none"):
        staged(tmp_path, stages=[{"share": 1.0, "levels": ["P2"]}])
    with pytest.raises(ConfigError, match="nothing learns, this run has no weighting"):
        staged(tmp_path, stages=[{"share": 1.0, "train": ["weighting"]}])
    with pytest.raises(ConfigError, match=r"train has 'modul' \(did you mean 'modules'\?\)"):
        staged(tmp_path, stages=[{"share": 1.0, "train": ["modul"]}])
    method = make_method("clip_kd", settings={"relational_weight": 0})
    with pytest.raises(ConfigError, match="no term 'relational'"):  # switched off by its weight
        make_trainer(tmp_path, method, stages=[StageConfig(share=1.0, terms=("relational",))])


def test_a_stage_may_read_one_stream_alone(tmp_path: Path) -> None:
    source = JoinedSource({"train": MemorySource(24), "extra": MemorySource(16)}, {"extra": 0.25})
    stages = [{"steps": 2}, {"steps": 2, "data": "extra"}, {"steps": 1, "data": "train"}]
    trainer = make_trainer(tmp_path, "contrastive", source=source, steps=None, stages=stages)
    read: list[dict[str, int]] = []
    step = trainer._step

    def watched(batch: Any) -> Any:
        read.append({name: batch.streams.count(name) for name in dict.fromkeys(batch.streams)})
        assert all(
            identity.startswith("extra/") == (name == "extra")
            for identity, name in zip(batch.ids, batch.streams, strict=True)
        )
        return step(batch)

    trainer._step = watched  # type: ignore[method-assign]
    trainer.run()
    assert read == [{"train": 6, "extra": 2}] * 2 + [{"extra": 8}] * 2 + [{"train": 8}]


def test_a_stage_that_names_no_stream_of_the_data_is_refused(tmp_path: Path) -> None:
    source = JoinedSource({"train": MemorySource(24), "extra": MemorySource(4)}, {"extra": 0.25})
    with pytest.raises(ConfigError, match=r"no stream 'extar' \(did you mean 'extra'\?\)"):
        make_trainer(tmp_path, source=source, stages=[StageConfig(share=1.0, data="extar")])
    with pytest.raises(ConfigError, match="stream 'extra' has 4 samples, fewer than one batch of 8"):
        make_trainer(tmp_path, source=source, stages=[StageConfig(share=1.0, data="extra")])

"""Arms whose runs begin with the student of the one before, and what is kept of their tasks."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cmapkd.compare import ComparisonConfig, compare, execute, make_plan
from cmapkd.compare.sequence import measures_of
from cmapkd.config import ConfigError
from cmapkd.report.arms import arms_of, seed_of
from cmapkd.report.read import RunFolder
from cmapkd.results import RunResult
from cmapkd.run import RunConfig

TASKS = {"first": "scenes@val?length=20", "second": "scenes@val?length=20&label=count", "third": "scenes@ood?length=20"}
CHAIN = {"method": "hinton", "then": [{"data.train": "scenes?length=33&label=count"}, ["training.steps=3"]]}


def written(**changes: Any) -> ComparisonConfig:
    values: dict[str, Any] = {
        "base": "hinton_scenes",
        "overrides": ["data.train=scenes?length=300", "training.steps=2", "training.batch_size=32", "data.val=null"],
        "seeds": [0, 1],
        "arms": {"chain": CHAIN, "joint": {"training.steps": 5}},
        "evaluate": TASKS,
        "tasks": list(TASKS),
        "metrics": ["third.zero_shot.top1"],
        "reference": "joint",
    }
    return ComparisonConfig.from_mapping(values | changes, where="comparison")


class Fake:
    """Stands for runs and evaluations: a run's score on a task follows from its place in the chain."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, str, str, int]] = []
        self.fails: Callable[[RunConfig], bool] = lambda _: False

    def run(self, config: RunConfig, *, out: Path, resume: bool = False, **_: Any) -> RunResult:
        if self.fails(config):
            raise ValueError("no luck")
        assert config.teacher is not None
        self.begun.append((config.student.name, config.teacher.name, config.data.train, config.training.steps or 0))
        out.mkdir(parents=True, exist_ok=resume)
        (out / "config.yaml").write_text(yaml.safe_dump(config.plain(), sort_keys=False))
        metrics = {
            "teacher": None,
            "student": {"params": 9},
            "seed": config.seed,
            "steps": 2,
            "method": "hinton",
        }
        (out / "metrics.json").write_text(json.dumps(metrics))
        return RunResult(out, metrics)

    def score(self, model: Any, source: Any, config: RunConfig, *_: Any) -> dict[str, Any]:
        return {"zero_shot": {"top1": 10.0 * len(self.begun) + list(TASKS.values()).index(source) + config.seed}}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake()
    monkeypatch.setattr(execute, "run", made.run)
    monkeypatch.setattr(execute, "_score", made.score)
    monkeypatch.setattr(execute, "load_model", lambda folder: folder)
    monkeypatch.setattr(execute, "open_source", lambda spec, split: spec)
    monkeypatch.setattr(execute, "build_teacher", lambda config: config)
    monkeypatch.setitem(sys.modules, "cmapkd.compare.plots", None)  # nothing is drawn, with or without matplotlib
    monkeypatch.setattr("gc.collect", lambda: 0)
    return made


def test_the_measures_are_the_paper_s() -> None:
    scores = [[9.0, 2.0, 4.0], [6.0, 8.0, 3.0], [5.0, 6.0, 7.0]]
    found = measures_of(scores)
    assert found["Transfer"] == pytest.approx((2 + (4 + 3) / 2) / 2)
    assert found["Average"] == pytest.approx(50 / 9)
    assert found["Last"] == pytest.approx(6)
    assert measures_of([[1.0, 2.0, 3.0]]) == {"Last": 2.0}
    assert measures_of([[1.0]]) == {"Last": 1.0}


def test_each_run_begins_with_the_student_of_the_one_before(fake: Fake, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert not compare(written(seeds=[0]), out=out).failed
    one, two, three, joint = fake.begun
    names = {path.name for path in (out / "runs").iterdir()}
    assert one[0] == joint[0] == "tiny:small"
    assert Path(two[0]).relative_to(out).as_posix() in {
        f"runs/{name}/student" for name in names if "chain-seed0" in name
    }
    assert Path(three[0]).parent.name.startswith("chain-run2-seed0-")
    assert {each[1] for each in fake.begun} == {"tiny:scenes-teacher"}
    first, other = "scenes?length=300", "scenes?length=33&label=count"
    assert [each[2:] for each in fake.begun] == [(first, 2), (other, 2), (first, 3), (first, 5)]

    # read back, also where the folder has moved
    moved = out.rename(tmp_path / "moved")
    assert not compare(written(seeds=[0]), out=moved).failed
    assert len(fake.begun) == 4
    text = next((moved / "runs").glob("chain-run2-*")) / "config.yaml"
    text.write_text(text.read_text().replace("/student", "/other"))
    assert next(iter(compare(written(seeds=[0]), out=moved).failed)).startswith("chain-run2-")


def test_the_table_of_tasks(fake: Fake, tmp_path: Path) -> None:
    result = compare(written(), out=tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "differ in student" not in table
    assert "Tasks one after the other (first, second, third; zero-shot top1)" in table
    assert "| arm | Transfer | Average | Last | first, zero-shot top1, after the last run |" in table
    sequences = {each["row"]: each for each in json.loads((tmp_path / "results.json").read_text())["sequences"]}
    # of seed 0 the runs come 1st, 2nd and 3rd; a score is 10 a run, 1 a place of the task, and the seed
    assert sequences["chain"]["scores"]["0"] == [[10.0, 11.0, 12.0], [20.0, 21.0, 22.0], [30.0, 31.0, 32.0]]
    assert measures_of(sequences["chain"]["scores"]["0"]) == {"Transfer": 14.0, "Average": 21.0, "Last": 31.0}
    assert list(sequences["joint"]["measures"]) == ["Last"]
    head, *lines = csv.reader((tmp_path / "tasks.csv").read_text().splitlines())
    assert head == ["arm", "seed", "after_run", "task", "score"]
    assert lines[5] == ["chain", "0", "2", "third", "22.0"]
    assert len(lines) == 2 * (9 + 3)
    assert [row.label for row in result.tables[0].rows] == ["chain", "joint"]
    records = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    arms = [record["arm"] for record in records if record["seed"] == "0"]
    assert arms == ["chain (run 1 of 3)", "chain (run 2 of 3)", "chain", "joint"]
    assert result.tables[0].rows[0].cells["third.zero_shot.top1"].values[0] == 32.0


def test_a_run_that_failed_ends_its_chain_and_no_other(fake: Fake, tmp_path: Path) -> None:
    fake.fails = lambda config: config.seed == 0 and "label" in config.data.train
    result = compare(written(), out=tmp_path)
    failed = {name.partition("-seed")[0]: why for name, why in result.failed.items()}
    assert failed["chain-run2"] == "no luck"
    assert (
        failed["chain-run2-run3"]
        if "chain-run2-run3" in failed
        else "begins with the student of" in failed["chain-run3"]
    )
    fake.fails = lambda _: False
    assert not compare(written(), out=tmp_path).failed
    assert len(fake.begun) == 8


def test_equal_chains_are_equal_runs() -> None:
    plan = make_plan(written(seeds=[0], arms={"joint": CHAIN, "b": CHAIN, "c": {"method": "hinton"}}))
    assert len(plan.runs) == 3
    other = {**CHAIN, "then": CHAIN["then"][::-1]}
    assert len(make_plan(written(seeds=[0], arms={"joint": CHAIN, "b": other})).runs) == 5


@pytest.mark.parametrize(
    ("arm", "told"),
    [
        ({"then": []}, "then is a list with the settings of each later run"),
        ({"then": [{}, {"then": [{}]}]}, "a later run has no `then` of its own"),
        ({"then": [{"student": "tiny:base"}, {}]}, "begins with the student of the one before: leave student out"),
        ({"then": ["student.init=scratch", {}]}, "begins with the student of the one before: leave student out"),
        ({"then": [{}]}, "arm 'a' is a chain of 2 runs, and tasks names 3: name one for each"),
        ({}, "tasks are named, and no arm has `then`"),
    ],
)
def test_wrong_chains_are_refused(arm: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        written(arms={"a": arm})


def test_a_wrong_key_of_a_later_run_is_told_before_any_run() -> None:
    with pytest.raises(ConfigError, match=r"a: training\.stepz: unknown key"):
        make_plan(written(arms={"a": {"then": [{"training.stepz": 3}, {}]}}))
    with pytest.raises(ConfigError, match="tasks: 'fourth' is no name in evaluate"):
        written(tasks=["first", "second", "fourth"])
    with pytest.raises(ConfigError, match="tuning, equal_time and folds know no chains"):
        written(equal_time={"to": "joint"})


def test_a_report_takes_runs_of_chains_with_other_seeds_together() -> None:
    def left(seed: int, student: str, digest: str) -> RunFolder:
        config = {"seed": seed, "student": {"name": f"out/runs/{student}-seed{seed}-{digest}/student"}}
        return RunFolder(Path(f"{student}-run2-seed{seed}"), {"seed": seed}, config, {}, (), (), (), ())

    arms = arms_of([left(0, "a", "0a1b2c3d"), left(1, "a", "ffffffff"), left(0, "b", "01234567")])
    assert [[seed_of(run) for run in arm.runs] for arm in arms] == [[0, 1], [0]]

"""Tuning in a comparison: what is drawn, which trials run, who wins, what is left, and what is refused."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cmapkd.cli import main
from cmapkd.compare import ComparisonConfig, compare, load_comparison, make_plan, tune
from cmapkd.compare.resolve import Resolver
from cmapkd.compare.space import draw, edges, read_space
from cmapkd.compare.trials import Family, plan_trials
from cmapkd.compare.tuning import TuningConfig
from cmapkd.compare.winners import read_tuned
from cmapkd.config import ConfigError, RunStopped
from cmapkd.data.open import open_source, split_of
from cmapkd.results import RunResult
from cmapkd.run import RunConfig
from cmapkd.training import Interrupted, NonFiniteLossError
from compare_support import leave_figures_blank, write_recipe

RATES = [5e-4, 1e-3, 2e-3, 4e-3]
BEST_RATE = 2e-3


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of two small steps with a teacher on disk, validation and test data."""
    return write_recipe(tmp_path_factory.mktemp("tuned_recipe"), test="scenes@test?length=20&size=32", steps=8)


class FakeRun:
    """Stands for `run`: leaves a finished run, best at a rate of 2e-3 and at a feature weight of 16."""

    def __init__(self) -> None:
        self.calls: list[RunConfig] = []
        self.before: Callable[[RunConfig, Path], None] = lambda config, out: None

    def __call__(self, config: RunConfig, *, out: Path, resume: bool = False, **_: Any) -> RunResult:
        self.calls.append(config)
        out.mkdir(parents=True, exist_ok=resume)
        (out / "config.yaml").write_text(yaml.safe_dump(config.plain(), sort_keys=False))
        self.before(config, out)
        score = 50 - 10 * abs(math.log2(config.optim.learning_rate / BEST_RATE)) + config.seed / 1000
        weight = getattr(config.method, "feature_weight", 16.0)
        score -= abs(math.log2(max(weight, 1e-3) / 16)) + 100 / (config.training.steps or 1)
        scores = {"retrieval": {"mean_r@1": score, "i2t": {"median_rank": 60 - score}}, "params": 10}
        metrics: dict[str, Any] = {"teacher": None, "student": scores, "steps": config.training.steps}
        (out / "metrics.json").write_text(json.dumps(metrics))
        return RunResult(out, metrics)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    fake = FakeRun()
    monkeypatch.setattr("cmapkd.compare.execute.run", fake)
    monkeypatch.setattr("gc.collect", lambda: 0)
    leave_figures_blank(monkeypatch)
    return fake


def comparison(recipe: Path, tuning: dict[str, Any] | None = None, **changes: Any) -> ComparisonConfig:
    block = {
        "trials": 6,
        "halving": [{"steps": 2, "keep": 3}, {"steps": 8, "keep": 1}],
        "seeds": [100],
        "space": {"optim.learning_rate": RATES},
        "families": {"kd": {"space": {"method.feature_weight": {"log": [1, 64]}}}, "hinton": {}},
    }
    arms = {"scratch": {"method": "contrastive"}, "kd": {}, "hinton": {"method": "hinton"}}
    values = {"base": str(recipe), "seeds": [0, 1], "arms": arms, "tuning": block | (tuning or {})}
    return ComparisonConfig.from_mapping(values | changes)


def families(config: ComparisonConfig) -> dict[str, Family]:
    return {family.name: family for family in plan_trials(config, Resolver.of(config))}


# ------------------------------------------------------------------------------------------------ what is drawn


def test_draws_are_a_latin_hypercube_and_every_time_the_same() -> None:
    space = read_space({"a": {"log": [1, 100]}, "b": {"uniform": [-1, 1]}, "c": ["x", "y"]})
    drawn = draw(space, 10, seed="0 kd")
    assert len({math.floor(10 * math.log10(each["a"]) / 2 - 1e-9) for each in drawn}) == 10
    assert len({math.floor(5 * (each["b"] + 1) - 1e-9) for each in drawn}) == 10
    assert sorted(each["c"] for each in drawn) == 5 * ["x"] + 5 * ["y"]
    assert drawn == draw(space, 10, seed="0 kd")
    assert drawn != draw(space, 10, seed="1 kd")
    # pinned, so that a change of draws, which would orphan finished trials, is seen
    assert drawn[0] == {"a": 20.3, "b": -0.428, "c": "x"}


def test_a_space_of_lists_is_drawn_whole_and_nothing_twice() -> None:
    space = read_space({"a": [1, 2, 3], "b": [True, False]})
    drawn = draw(space, 20, seed="0", known=[{"a": 2, "b": True}])
    assert len(drawn) == 5
    assert {"a": 2, "b": True} not in drawn
    assert len({tuple(each.values()) for each in drawn}) == 5


def test_edges() -> None:
    ranges = {"log": {"log": [1, 100]}, "plain": {"uniform": [0, 10]}}
    space = read_space(ranges | {"list": [4, 1, 2], "words": ["a", "b"]})
    inner = {"list": 2, "log": 10.0, "plain": 5.0, "words": "a"}
    assert edges(space, inner) == []
    assert edges(space, inner | {"list": 4}) == ["list 4 (highest searched: 4)"]
    assert edges(space, inner | {"log": 1.5}) == ["log 1.5 (lowest searched: 1)"]
    assert edges(space, inner | {"log": 1.6}) == []
    assert edges(space, inner | {"plain": 30.0}) == ["plain 30 (highest searched: 10)"]  # declared beyond the space
    assert edges(space, inner | {"list": None, "log": 0.0}) == ["log 0 (lowest searched: 1)"]


@pytest.mark.parametrize(
    ("halving", "expected"),
    [
        (1, [(1.0, 1)]),
        (4, [(0.25, 4), (1.0, 1)]),
        (2, [(0.125, 8), (0.25, 4), (0.5, 2), (1.0, 1)]),
        (16, [(1.0, 1)]),
    ],
)
def test_halving_as_a_number(halving: int, expected: list[tuple[float, int]]) -> None:
    tuning = TuningConfig.from_mapping(
        {"halving": halving, "seeds": [1], "space": {"optim.learning_rate": RATES}, "families": ["a"]}
    )
    assert [(each.share, each.keep) for each in tuning.rounds(16)] == expected


def test_the_split_that_a_source_names() -> None:
    assert split_of("scenes@test?length=3") == "test"
    assert split_of("scenes:hard", default="val") == "val"
    assert split_of("hf:some/name:test", default="val") == "test"
    assert split_of("csv:file.csv", default="val") is None


# ------------------------------------------------------------------------------------------------ which trials


def test_trials_are_runs_of_their_own_lengths_and_seeds_without_test_data(recipe: Path) -> None:
    found = families(comparison(recipe, {"seeds": [100, 101]}))
    kd, hinton = found["kd"], found["hinton"]
    assert (len(kd.trials), kd.lengths, kd.keeps, kd.entering()) == (6, ("2 steps", "8 steps"), (3, 1), [6, 3])
    assert len(hinton.trials) == 4  # its space has no more: three rates beside the declared one
    assert hinton.trials[0].values == {"optim.learning_rate": 1e-3}
    assert {trial.values["optim.learning_rate"] for trial in hinton.trials} == set(RATES)
    declared = kd.trials[0].runs[1][101]
    assert (
        declared.config.plain()
        == make_plan(comparison(recipe))
        .tables[0]
        .rows[1]
        .config.model_copy(update={"seed": 101, "data": declared.config.data.model_copy(update={"test": None})})
        .plain()
    )
    assert declared.name == f"tuning-kd-trial00-8steps-seed101-{declared.digest}"
    for trial in kd.trials:
        for steps, runs in zip((2, 8), trial.runs, strict=True):
            assert list(runs) == [100, 101]
            for seed, run in runs.items():
                config = run.config
                assert (config.seed, config.training.steps, config.data.final) == (seed, steps, config.data.val)
                assert {"optim.learning_rate": config.optim.learning_rate} | {
                    "method.feature_weight": config.method.feature_weight  # type: ignore[attr-defined]
                } == trial.values


def test_lengths_may_be_shares_of_steps_or_epochs_and_axes_are_fixed(recipe: Path) -> None:
    shares = {"halving": [{"share": 0.25, "keep": 2}, {"share": 1, "keep": 1}], "at": {"training.steps": 12}}
    (kd, _) = families(comparison(recipe, shares, axes={"training.steps": [12, 40]})).values()
    assert kd.lengths == ("3 steps", "12 steps")
    epochs = ["training.epochs=2", "training.steps=null"]
    (kd, _) = families(comparison(recipe, {"halving": 2}, overrides=epochs)).values()
    assert (kd.lengths, kd.steps) == (("0.5 epochs", "1 epochs", "2 epochs")[-len(kd.lengths) :], (None,) * 2)


def test_settings_of_all_arms_reach_trials(recipe: Path) -> None:
    found = families(comparison(recipe, overrides=["method.task_weight=0.5"]))
    assert {run.config.method.task_weight for each in found.values() for run in each.trials[1].runs[0].values()} == {
        0.5
    }  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------ who wins


def test_the_winner_s_settings_become_the_arm_s(recipe: Path, fake: FakeRun, tmp_path: Path) -> None:
    result = compare(comparison(recipe), out=tmp_path / "c")
    trials = [config for config in fake.calls if config.seed == 100]
    finals = [config for config in fake.calls if config.seed != 100]
    assert [config.training.steps for config in trials] == 6 * [2] + 3 * [8] + 4 * [2] + 3 * [8]
    assert len(finals) == 3 * 2
    assert {config.data.test is None for config in trials} == {True}
    rows = {row.label: row.config for row in result.plan.tables[0].rows}
    assert rows["scratch"].optim.learning_rate == 1e-3  # not tuned
    assert rows["hinton"].optim.learning_rate == BEST_RATE
    stored = json.loads((tmp_path / "c" / "tuning.json").read_text())["families"]["kd"]
    scores = {trial["trial"]: trial["rounds"][-1]["score"] for trial in stored["trials"] if len(trial["rounds"]) == 2}
    assert len(scores) == 3
    assert stored["winner"] == max(scores, key=scores.__getitem__)
    chosen = stored["trials"][stored["winner"]]["values"]
    assert rows["kd"].optim.learning_rate == chosen["optim.learning_rate"]
    assert rows["kd"].method.feature_weight == chosen["method.feature_weight"]  # type: ignore[attr-defined]
    with (tmp_path / "c" / "tuning.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 9 + 7
    assert {line["steps"] for line in lines if line["round"] == "2"} == {"8"}
    assert sum(line["kept"] == "True" for line in lines) == 3 + 1 + 3 + 1
    # the same again runs nothing, and ends with the same files
    before = (tmp_path / "c" / "tuned.yaml").read_text()
    again = compare(load_comparison(tmp_path / "c" / "comparison.yaml"), out=tmp_path / "c")
    assert len(fake.calls) == len(trials) + len(finals)
    assert (tmp_path / "c" / "tuned.yaml").read_text() == before
    assert again.tables == result.tables


def test_the_table_says_what_the_tuning_was(recipe: Path, fake: FakeRun, tmp_path: Path) -> None:
    compare(comparison(recipe), out=tmp_path / "c")
    text = (tmp_path / "c" / "table.md").read_text()
    assert "- Tuned on scenes@val?length=20&amp;size=32 by retrieval.mean_r@1, with seed 100, before the" in text
    assert "- hinton: 4 trials of 2 steps, 3 of 8 steps; best: optim.learning_rate 0.002." in text
    assert "- Not tuned, with settings as declared: scratch." in text
    assert "- The budgets of tuning are not equal: kd 6 trials of 2 steps, 3 of 8 steps; hinton 4 trials of" in text
    assert "at the edge" not in text


@pytest.mark.parametrize(("longest", "warned"), [(3, True), (4, False), (8, False)])
def test_trials_far_shorter_than_the_runs_are_warned_of(
    recipe: Path, fake: FakeRun, tmp_path: Path, longest: int, warned: bool
) -> None:
    rounds = [{"steps": 2, "keep": 3}, {"steps": longest, "keep": 1}]
    result = compare(comparison(recipe, {"halving": rounds}), out=tmp_path / "c")
    notes = "\n".join(result.tables[0].notes)
    told = "The longest trials of kd; hinton have 3 steps, and these runs up to 8. Settings that are best so early"
    assert (told in notes) == warned
    assert ("The longest trials" in notes) == warned


def test_a_winner_at_the_edge_is_warned_of_and_equal_budgets_are_not(
    recipe: Path, fake: FakeRun, tmp_path: Path
) -> None:
    space = {"optim.learning_rate": {"log": [1e-4, 1.9e-3]}}
    result = compare(comparison(recipe, {"space": space, "trials": 12}), out=tmp_path / "c")
    notes = "\n".join(result.tables[0].notes)
    assert "hinton: its best settings lie at the edge of what was searched" in notes
    assert "(highest searched: 0.0019)" in notes
    assert "not equal" not in notes


def test_settings_as_declared_win_a_tie_and_go_by_the_direction_of_the_metric(
    recipe: Path, fake: FakeRun, tmp_path: Path
) -> None:
    arms = {"hinton": {"method": "hinton", "optim": {"learning_rate": BEST_RATE}}, "kd": {}}
    ranks = {"metric": "retrieval.i2t.median_rank"}
    result = compare(comparison(recipe, ranks, arms=arms), out=tmp_path / "c")
    tuned = read_tuned(tmp_path / "c" / "tuned.yaml")
    assert (tuned.families["hinton"].trial, tuned.families["hinton"].settings) == (0, {})
    assert "hinton: 4 trials of 2 steps, 3 of 8 steps; best: as declared." in result.tables[0].notes
    # the weight makes no difference in two trials of one rate
    free = {"space": {"method.task_weight": [1.0, 0.5]}, "families": ["kd"]}
    tuned = tune(comparison(recipe, free), out=tmp_path / "d")
    assert tuned is not None
    assert tuned.families["kd"].trial == 0


def test_several_arms_get_one_family_s_settings_and_the_untuned_one_stands_beside(
    recipe: Path, fake: FakeRun, tmp_path: Path
) -> None:
    arms = {"kd": {}, "kd, tuned": {}, "kd, no task": {"method.task_weight": 0.0}}
    block = {"families": {"clip": {"arms": ["kd, tuned", "kd, no task"]}}}
    result = compare(comparison(recipe, block, arms=arms), out=tmp_path / "c")
    rates = {row.label: row.config.optim.learning_rate for row in result.plan.tables[0].rows}
    assert rates == {"kd": 1e-3, "kd, tuned": BEST_RATE, "kd, no task": BEST_RATE}
    assert "Not tuned, with settings as declared: kd." in result.tables[0].notes
    assert any(note.startswith("kd, tuned and kd, no task: 4 trials") for note in result.tables[0].notes)


# ------------------------------------------------------------------------------------------------ what is lost


def test_a_trial_that_diverges_loses_and_is_not_tried_again(recipe: Path, fake: FakeRun, tmp_path: Path) -> None:
    def diverge(config: RunConfig, out: Path) -> None:
        if config.seed == 100 and config.optim.learning_rate == BEST_RATE:
            raise NonFiniteLossError("the loss is not finite at step 1")

    fake.before = diverge
    block = {"families": ["hinton"], "seeds": [100, 101]}
    result = compare(comparison(recipe, block), out=tmp_path / "c")
    assert not result.failed
    tuned = read_tuned(tmp_path / "c" / "tuned.yaml").families["hinton"]
    assert len(tuned.lost) == 1
    assert tuned.settings.get("optim.learning_rate", 1e-3) in (1e-3, 4e-3)
    assert any("; 1 diverged or failed; best:" in note for note in result.tables[0].notes)
    lost = [config for config in fake.calls if config.optim.learning_rate == BEST_RATE]
    assert len(lost) == 1  # its other seed need not run
    calls = len(fake.calls)
    compare(comparison(recipe, block), out=tmp_path / "c")
    assert len(fake.calls) == calls
    (line,) = [line for line in (tmp_path / "c" / "tuning.csv").read_text().splitlines() if "diverged" in line]
    assert line.endswith("the loss is not finite at step 1")


def test_a_trial_that_fails_otherwise_loses_for_now(recipe: Path, fake: FakeRun, tmp_path: Path) -> None:
    def fail(config: RunConfig, out: Path) -> None:
        if config.seed == 100 and config.optim.learning_rate == BEST_RATE:
            raise ValueError("does not fit")

    fake.before = fail
    tuned = tune(comparison(recipe, {"families": ["hinton"]}), out=tmp_path / "c")
    assert tuned is not None
    assert tuned.families["hinton"].settings != {"optim.learning_rate": BEST_RATE}
    fake.before = lambda config, out: None
    tuned = tune(comparison(recipe, {"families": ["hinton"]}), out=tmp_path / "c")
    assert tuned is not None
    assert tuned.families["hinton"].settings == {"optim.learning_rate": BEST_RATE}


def test_a_family_that_loses_every_trial_stops_after_the_others(recipe: Path, fake: FakeRun, tmp_path: Path) -> None:
    def diverge(config: RunConfig, out: Path) -> None:
        if config.method.name == "clip_kd":
            raise NonFiniteLossError("no number")

    fake.before = diverge
    with pytest.raises(RunStopped, match=r"family kd: every trial of its last round diverged or failed.* no number"):
        compare(comparison(recipe), out=tmp_path / "c")
    assert {config.method.name for config in fake.calls} == {"clip_kd", "hinton"}
    assert {config.seed for config in fake.calls} == {100}
    assert not (tmp_path / "c" / "tuned.yaml").exists()


def test_an_interrupted_tuning_goes_on(recipe: Path, fake: FakeRun, tmp_path: Path) -> None:
    def stop(config: RunConfig, out: Path) -> None:
        if len(fake.calls) == 4:
            raise Interrupted(1, out / "step-00000001")

    fake.before = stop
    with pytest.raises(Interrupted):
        compare(comparison(recipe), out=tmp_path / "c")
    with (tmp_path / "c" / "tuning.csv").open(newline="") as file:
        kd = [line["status"] for line in csv.DictReader(file) if line["family"] == "kd"]
    assert kd == 3 * ["finished"] + 3 * ["missing"]
    compare(comparison(recipe), out=tmp_path / "c")
    assert len(fake.calls) == 1 + 6 + 3 + 4 + 3 + 6  # the fourth began twice


# ------------------------------------------------------------------------------------------------ winners elsewhere


@pytest.fixture
def tuned_file(recipe: Path, fake: FakeRun, tmp_path: Path) -> Path:
    assert tune(comparison(recipe), out=tmp_path / "tuning") is not None
    return tmp_path / "tuning" / "tuned.yaml"


def with_winners(recipe: Path, file: Path, **changes: Any) -> ComparisonConfig:
    values = comparison(recipe).plain() | {"tuning": {"winners": str(file)}}
    return ComparisonConfig.from_mapping(values | changes)


def test_winners_are_taken_from_a_file_without_trials(
    recipe: Path, fake: FakeRun, tuned_file: Path, tmp_path: Path
) -> None:
    calls = len(fake.calls)
    there = compare(comparison(recipe), out=tmp_path / "tuning")
    here = compare(with_winners(recipe, tuned_file), out=tmp_path / "here")
    assert len(fake.calls) == calls + 6 + 6
    assert [run.digest for run in here.plan.runs] == [run.digest for run in there.plan.runs]
    assert here.tables[0].notes == there.tables[0].notes
    # the folder holds a copy, so that it can be moved with its comparison.yaml
    (tmp_path / "here").rename(tmp_path / "moved")
    tuned_file.unlink()
    compare(load_comparison(tmp_path / "moved" / "comparison.yaml"), out=tmp_path / "moved")
    assert len(fake.calls) == calls + 12


def test_rows_unlike_the_trials_are_named(recipe: Path, fake: FakeRun, tuned_file: Path, tmp_path: Path) -> None:
    config = with_winners(recipe, tuned_file, overrides=["training.batch_size=8", "training.steps=4"])
    (note,) = [note for note in compare(config, out=tmp_path / "c").tables[0].notes if "The trials had" in note]
    assert note == "The trials had other values than some of these rows: training.batch_size."


def test_winners_that_do_not_fit_are_refused(recipe: Path, fake: FakeRun, tuned_file: Path, tmp_path: Path) -> None:
    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            compare(with_winners(recipe, tuned_file, **changes), out=tmp_path / "c")
        assert not (tmp_path / "c").exists()

    refused("were chosen with seed 100, which this comparison has too", seeds=[1, 100])
    refused("are of kd, hinton, and this comparison has none of these arms", arms={"a": {}})
    refused(r"chosen on scenes@val.*, which this comparison would be measured on", overrides=["data.test=null"])
    other = comparison(recipe).plain()["tuning"] | {"winners": str(tuned_file), "trials": 7}
    refused("is of another tuning, which differs in trials", tuning=other)
    refused("there is no .*nothing.yaml", tuning={"winners": str(tmp_path / "nothing.yaml")})
    (tmp_path / "bad.yaml").write_text("families: 3\n")
    refused(r"bad\.yaml has .* problems", tuning={"winners": str(tmp_path / "bad.yaml")})
    same = comparison(recipe).plain()["tuning"] | {"winners": str(tuned_file)}
    assert not compare(with_winners(recipe, tuned_file, tuning=same), out=tmp_path / "d").failed


def test_a_winners_file_beside_the_comparison_is_found(recipe: Path, tuned_file: Path) -> None:
    file = tuned_file.parent / "mine.yaml"
    file.write_text(yaml.safe_dump(comparison(recipe).plain() | {"tuning": {"winners": "tuned.yaml"}}))
    found = load_comparison(file).tuning
    assert found is not None
    assert found.winners == str(tuned_file)


# ------------------------------------------------------------------------------------------------ refusals, command


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [0]}, "tuning.seeds 0 are seeds of the comparison too"),
        ({"seeds": []}, "trials need seeds of their own"),
        ({"families": {}}, "there is nothing to tune"),
        ({"families": ["hintn"]}, r"there is no arm 'hintn' \(did you mean 'hinton'\?\)"),
        ({"families": {"kd": {"arms": ["kd"]}, "b": {"arms": ["kd"]}}}, "arm 'kd' is in families 'kd' and 'b'"),
        ({"space": {}}, "family 'hinton' has nothing to search"),
        ({"space": {"seed": [1, 2]}}, "seed cannot be searched: tuning has seeds of its own"),
        ({"space": {"training.steps": [1, 2]}}, "training.steps cannot be searched: `halving` says"),
        ({"space": {"evaluation.tasks": [1, 2]}}, "evaluation.tasks cannot be searched"),
        ({"space": {"a": {"log": [0, 1]}}}, r"a: log takes two numbers above 0, the smaller first; got \[0, 1\]"),
        ({"space": {"a": {"uniform": [2, 1]}}}, "a: uniform takes two numbers, the smaller first"),
        ({"space": {"a": {"lg": [1, 2]}}}, r"there is no range 'lg' \(did you mean 'log'\?\)"),
        ({"space": {"a": [1]}}, "a must list two values or more, each once"),
        ({"space": {"a": [1, 1]}}, "a must list two values or more, each once"),
        ({"space": {"a": 3}}, r"a must be a list of values, \{log: \[from, to\]\}"),
        ({"halving": 0}, "halving is 1 for one round at the full length, or more; got 0"),
        ({"halving": [{"steps": 2, "keep": 2}]}, r"the last one 1; got keep \[2\]"),
        ({"halving": [{"steps": 2, "keep": 1}, {"steps": 4, "keep": 1}]}, r"keep fewer and fewer"),
        ({"halving": [{"steps": 4, "keep": 2}, {"steps": 2}]}, r"rounds of halving get longer"),
        ({"halving": [{"steps": 4, "keep": 2}, {"share": 1}]}, r"rounds of halving get longer, all in steps or all in"),
        ({"halving": [{"keep": 1}]}, "give steps or share, not neither"),
        ({"at": {"student": "x"}}, "tuning.at: there is no axis 'student'"),
        ({"trails": 3}, r"tuning\.trails: unknown key \(did you mean 'trials'\?\)"),
    ],
)
def test_mistakes_in_a_tuning(change: dict[str, Any], message: str, recipe: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        comparison(recipe, change)


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        ({}, r"tuning is done at one value of each axis: name it, at: \{student: tiny:debug\}"),
        ({"at": {"student": "none"}}, "axis student has no value 'none'; known: tiny:debug, tiny:small"),
        ({"at": {"student": "tiny:debug"}, "space": {"student.options.width": [1, 2]}}, "which axis student sets"),
    ],
)
def test_axes_need_a_point_at_which_to_tune(tuning: dict[str, Any], message: str, recipe: Path) -> None:
    axes = {"training.steps": [4, 8], "student": ["tiny:debug", "tiny:small"]}
    with pytest.raises(ConfigError, match=message):
        comparison(recipe, tuning, axes=axes)


@pytest.mark.parametrize(
    ("tuning", "overrides", "message"),
    [
        ({"space": {"optim.lr": RATES}}, [], r"kd; hinton: space: optim\.lr: unknown key.* Known here: betas"),
        (
            {"space": {"method.feature_weight": [1, 2]}},
            [],
            r"1 problem .*\n  hinton: space: method\.feature_weight: unk",
        ),
        ({"space": {"optim.learning_rate": [1e-3, -1.0]}}, [], r"kd; hinton: optim\.learning_rate: .* > 0"),
        ({}, ["data.val=null"], "tuning chooses on data.val, and there is none"),
        ({}, ["data.val=scenes@test"], "tuning chooses on data.val, which is a test split: scenes@test"),
        ({}, ["data.test=null"], "the comparison would be measured on the same data"),
        ({"families": {"kd": {"arms": ["kd", "scratch"], "space": {"method.feature_weight": [1, 2]}}}}, [], "unknown"),
    ],
)
def test_mistakes_show_before_the_first_trial(
    tuning: dict[str, Any], overrides: list[str], message: str, recipe: Path, fake: FakeRun, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        compare(comparison(recipe, tuning, overrides=overrides), out=tmp_path / "c")
    assert not fake.calls
    assert not (tmp_path / "c").exists()


def test_a_metric_that_no_trial_has_is_refused_at_the_first(recipe: Path, fake: FakeRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no score retrieval\.mean_r@2 \(did you mean 'retrieval\.mean_r@1'\?\)"):
        tune(comparison(recipe, {"metric": "retrieval.mean_r@2"}), out=tmp_path / "c")
    assert len(fake.calls) == 1


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cmapkd", "compare", *arguments])
        monkeypatch.setenv("COLUMNS", "160")
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return call


def test_the_command(cli: Any, recipe: Path, fake: FakeRun, tmp_path: Path) -> None:
    file, out = tmp_path / "mine.yaml", tmp_path / "c"
    file.write_text(yaml.safe_dump(comparison(recipe).plain()))
    code, printed, errors = cli(str(file), "--dry-run", "--out", str(out))
    assert (code, fake.calls, out.exists()) == (0, [], False), errors
    assert "tuning kd: 6 of 2 steps, 3 of 8 steps: 36 steps" in printed
    assert printed.count("missing") == 6 + 4
    assert "hinton; kd: runs as declared are listed, with the winners' settings they are others" in printed
    code, printed, errors = cli(str(file), "--tune-only", "--family", "hinton", "--out", str(out))
    assert code == 0, errors
    assert {config.method.name for config in fake.calls} == {"hinton"}
    assert printed.endswith(f"{out}: tuning.csv, tuning.json\n")
    code, printed, _ = cli(str(file), "--tune-only", "--out", str(out))
    assert code == 0
    assert printed.endswith(f"{out}: tuning.csv, tuning.json, tuned.yaml\n")
    assert {config.seed for config in fake.calls} == {100}
    code, printed, _ = cli(str(file), "--dry-run", "--out", str(out))
    assert printed.count("finished  tuning-kd-trial") == 6 + 3
    assert "runs as declared are listed" not in printed
    assert "best: optim.learning_rate 0.002" in printed
    for words, message in (
        (("--family", "kd"), "--family chooses what --tune-only tunes: add --tune-only"),
        (("--tune-only", "--family", "kdd"), "there is no family 'kdd' (did you mean 'kd'?)"),
    ):
        code, _, errors = cli(str(file), "--out", str(out), *words)
        assert code == 2
        assert message in errors


def test_a_stopped_tuning_says_how_to_go_on(cli: Any, recipe: Path, fake: FakeRun, tmp_path: Path) -> None:
    def stop(config: RunConfig, out: Path) -> None:
        raise Interrupted(1, out / "step-00000001")

    fake.before = stop
    file, out = tmp_path / "mine.yaml", tmp_path / "c"
    file.write_text(yaml.safe_dump(comparison(recipe).plain()))
    code, printed, _ = cli(str(file), "--tune-only", "--family", "kd", "--out", str(out))
    assert code == 130
    assert f"cmapkd compare {out / 'comparison.yaml'} --out {out} --tune-only --family kd" in printed


def test_tuning_of_a_comparison_without_it(cli: Any, recipe: Path, tmp_path: Path) -> None:
    code, _, errors = cli(str(recipe), "--axis", "training.steps=2,4", "--tune-only", "--out", str(tmp_path / "c"))
    assert code == 2
    assert "there is nothing to tune or to measure: add tuning or equal_time" in errors
    with pytest.raises(ConfigError, match="this comparison tunes nothing: add tuning to it"):
        tune(comparison(recipe).model_copy(update={"tuning": None}), out=tmp_path / "c")


# ------------------------------------------------------------------------------------------------ the whole path


def test_a_real_tuning(recipe: Path, tmp_path: Path) -> None:
    block = {
        "trials": 2,
        "halving": [{"share": 0.5, "keep": 1}],
        "families": {"kd": {"space": {"method.feature_weight": [1.0, 16.0]}}},
    }
    arms = {"scratch": {"method": "contrastive"}, "kd": {}}
    config = comparison(recipe, block, arms=arms, seeds=[0], overrides=["training.steps=2"])
    result = compare(config, out=tmp_path / "c")
    assert not result.failed
    stored = json.loads((tmp_path / "c" / "tuning.json").read_text())["families"]["kd"]
    for trial in stored["trials"]:
        (last,) = trial["rounds"]
        metrics = json.loads((tmp_path / "c" / "runs" / last["runs"]["100"] / "metrics.json").read_text())
        assert (metrics["steps"], metrics["evaluated_on"]) == (1, open_source("scenes@val?length=20&size=32").name)
        assert metrics["student"]["retrieval"]["mean_r@1"] == last["score"]
    folders = {path: path.stat().st_mtime_ns for path in (tmp_path / "c" / "runs").rglob("*")}
    assert compare(config, out=tmp_path / "c").tables == result.tables
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "c" / "runs").rglob("*")} == folders

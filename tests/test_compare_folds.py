"""Cross-validation in a comparison: a fold of the data a seed, its teacher, its test pictures and its interval."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

from cmapkd.compare import ComparisonConfig, load_comparison
from cmapkd.compare.plan import make_plan
from cmapkd.compare.resolve import Resolver
from cmapkd.compare.statistics import t_critical
from cmapkd.compare.trials import plan_trials
from cmapkd.config import ConfigError
from compare_support import ARMS, PretendedRuns, compare_pretended, leave_ranks, score_of, write_recipe

SEEDS = (10, 11, 12, 13)
TEACHERS = {10: 80.0, 11: 70.0, 12: 90.0, 13: 60.0}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), evaluate_every=10)


def fold(number: int) -> dict[str, Any]:
    return {
        "data.train": f"scenes?length=64&size=32&start={1000 * number}",
        "data": {"test": f"scenes@test?length=20&size=32&start={1000 * number}"},
    }


FOLDS = {seed: fold(number) for number, seed in enumerate(SEEDS)}


def comparison(recipe: Path, **values: Any) -> ComparisonConfig:
    return ComparisonConfig.from_mapping(
        {"base": str(recipe), "seeds": list(SEEDS), "arms": ARMS, "folds": FOLDS} | values
    )


def test_each_seed_has_the_data_of_its_fold_over_all_other_settings(recipe: Path) -> None:
    arms = {"one view": {"method": "clip_kd", "data.views.num_views": 1}, "plain": {"method": "hinton"}}
    plan = make_plan(comparison(recipe, arms=arms, overrides=["data.train=scenes?length=32&size=32"]))
    for row in plan.tables[0].rows:
        for number, seed in enumerate(SEEDS):
            config = row.runs[seed].config
            assert (config.seed, config.data.train, config.data.test) == (
                seed,
                f"scenes?length=64&size=32&start={1000 * number}",
                f"scenes@test?length=20&size=32&start={1000 * number}",
            )
    assert len({run.digest for run in plan.runs}) == 8


def test_seeds_named_on_the_command_line_keep_their_folds(recipe: Path, tmp_path: Path) -> None:
    file = tmp_path / "folds.yaml"
    file.write_text(json.dumps(comparison(recipe).plain()))
    whole, part = (make_plan(load_comparison(file, seeds=seeds)) for seeds in ((), (12, 11)))
    assert {run.digest for run in part.runs} < {run.digest for run in whole.runs}
    assert all(run.config.seed in (11, 12) for run in part.runs)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"seeds": [10, 11, 14, 15]}, "folds has no settings for seed 14, 15"),
        ({"folds": FOLDS | {11: {"method.feature_weight": 2}}}, "the fold of seed 11 sets method.feature_weight"),
        ({"folds": {seed: {"data": {"trian": "scenes"}} for seed in SEEDS}}, "trian"),
        ({"folds": {"first": {}}}, "folds"),
        ({"arms": {"own": {"data.train": "scenes?length=32"}}}, "own: it sets data.train, and the folds set it anew"),
        ({"axes": {"data.test": ["scenes@val"]}}, "it sets data.test, and the folds set it anew"),
        (
            {"arms": {"chain": {"method": "clip_kd", "then": [{"data.train": "scenes?length=32"}]}, **ARMS}},
            "know no chains",
        ),
    ],
)
def test_wrong_folds_are_refused(recipe: Path, values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make_plan(comparison(recipe, **values))


def run_folds(
    recipe: Path, out: Path, monkeypatch: pytest.MonkeyPatch, folds: dict[int, dict[str, Any]]
) -> tuple[Any, dict[str, Any]]:
    runs = PretendedRuns(
        score_of,
        teacher=lambda config: TEACHERS[config.seed],
        leave=lambda config, folder: leave_ranks(config, folder, digest=str(config.data.final)),
    )
    declared = [{"arm": "clip_kd", "against": "contrastive", "smallest": 1.0}]
    result = compare_pretended(
        recipe, out, monkeypatch, runs, seeds=list(folds), folds=folds, contrasts=declared, gap_rising=None
    )
    (table,) = result.tables
    return table, json.loads((out / "results.json").read_text())["tables"][0]


def test_the_interval_is_over_folds_and_the_gap_leads_to_the_fold_s_teacher(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, stored = run_folds(recipe, tmp_path / "c", monkeypatch, FOLDS)
    cell, start = (table.rows[place].cells["retrieval.mean_r@1"] for place in (2, 0))
    differences = [cell.values[seed] - start.values[seed] for seed in SEEDS]
    half = t_critical(3) * statistics.stdev(differences) * math.sqrt(1 / 4 + 1 / 3)  # folds share training samples
    mean = statistics.fmean(differences)
    assert cell.two_way.covers == "folds"
    assert cell.two_way.interval == pytest.approx((mean - half, mean + half))
    assert table.contrasts[0].contrast.estimate == cell.two_way
    assert table.contrasts[0].verdict == "above"
    assert cell.gap == pytest.approx(
        {seed: (cell.values[seed] - start.values[seed]) / (TEACHERS[seed] - start.values[seed]) for seed in SEEDS}
    )
    assert [row.label for row in table.teachers] == [f"teacher {recipe.parent / 'teacher'}"]
    assert table.teachers[0].cells["retrieval.mean_r@1"].values == TEACHERS
    assert next(iter(stored["teachers"].values()))["retrieval.mean_r@1"] == 75.0
    assert any("folds share training pictures" in note for note in table.notes)
    assert not any("Owen 2007" in note for note in table.notes)


def test_seeds_that_share_a_fold_are_one_number(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds in each of two folds see the same pictures: they are not four independent numbers."""
    folds = {seed: fold(number // 2) for number, seed in enumerate(SEEDS)}
    table, _ = run_folds(recipe, tmp_path / "c", monkeypatch, folds)
    cell, start = (table.rows[place].cells["retrieval.mean_r@1"] for place in (2, 0))
    differences = [cell.values[seed] - start.values[seed] for seed in SEEDS]
    means = [statistics.fmean(differences[:2]), statistics.fmean(differences[2:])]
    assert cell.two_way.degrees == 1
    assert cell.two_way.error == pytest.approx(statistics.stdev(means) * math.sqrt(1 / 2 + 1))


def test_teachers_of_folds_with_names_of_their_own_are_one_row(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in SEEDS:
        shutil.copytree(recipe.parent / "teacher", tmp_path / f"teacher-{seed}")
    folds = {seed: {**FOLDS[seed], "teacher": str(tmp_path / f"teacher-{seed}")} for seed in SEEDS}
    table, _ = run_folds(recipe, tmp_path / "c", monkeypatch, folds)
    assert [row.label for row in table.teachers] == ["teachers of the folds"]


def test_tuning_may_not_choose_on_what_a_fold_tests(recipe: Path) -> None:
    """The data of all arms have no test part of their own: the folds' count."""
    tuning = {
        "metric": "retrieval.mean_r@1", "trials": 2, "halving": [{"steps": 5, "keep": 1}], "seeds": [9],
        "space": {"optim.learning_rate": [0.001, 0.002]}, "families": {"clip_kd": {"space": {}}},
    }  # fmt: skip
    val = "scenes@val?length=20&size=32"
    fair = comparison(recipe, tuning=tuning)
    (family,) = plan_trials(fair, Resolver.of(fair))
    assert {run.config.data.val for each in family.trials[0].runs for run in each.values()} == {val}
    unfair = comparison(recipe, tuning=tuning, folds=FOLDS | {12: {"data.test": val}})
    with pytest.raises(ConfigError, match="flatters the arms that were tuned"):
        plan_trials(unfair, Resolver.of(unfair))

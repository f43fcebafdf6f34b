"""Declared contrasts: which rows they compare, their tests, Holm's correction, verdicts, and what is refused."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmapkd.compare import ComparisonConfig, make_plan
from cmapkd.compare.statistics import Estimate, holm, paired_difference, t_critical, t_tail
from cmapkd.compare.verdicts import Contrast, judge
from cmapkd.config import ConfigError
from cmapkd.run import RunConfig
from compare_support import ARMS, PretendedRuns, compare_pretended, write_recipe

NOISE = (0.3, -0.2, 0.1, -0.4, 0.2, 0.0)
LEAD = {"contrastive": 0.0, "hinton": 0.1, "clip_kd": 5.0}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), evaluate_every=10)


def noisy_score(config: RunConfig) -> float:
    """The scratch arm's seeds scatter otherwise than the others', so that differences have a deviation."""
    name = config.method.name
    noise = 0.0 if name == "contrastive" else NOISE[config.seed]
    return 30 + config.seed + LEAD[name] + noise * (2 if name == "hinton" else 1)


# ------------------------------------------------------------------------------------------------ the tests


def test_the_tail_of_t_against_its_quantiles() -> None:
    for degrees in (1, 2, 4, 5, 30, 999):
        assert 2 * t_tail(t_critical(degrees), degrees) == pytest.approx(0.05)
        assert t_tail(0.0, degrees) == pytest.approx(0.5)
        assert t_tail(-1.3, degrees) == pytest.approx(1 - t_tail(1.3, degrees))
    assert t_tail(1.0, 1) == pytest.approx(0.25)  # Cauchy
    assert t_tail(math.sqrt(2.0), 2) == pytest.approx((1 - math.sqrt(2) / 2) / 2)  # P(|T| <= t) = t / sqrt(2 + t^2)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([0.6, 0.9]) == (1.0, 1.0)
    assert holm([]) == ()


def test_holm_keeps_the_share_of_families_with_a_false_rejection() -> None:
    """3,000 families of 8 true hypotheses: at most 5 % of the families may reject any, and few less."""
    families = np.random.default_rng(0).uniform(size=(3000, 8))
    wrong = np.mean([min(holm(list(family))) < 0.05 for family in families])
    assert 0.035 < wrong < 0.06
    assert np.mean((families < 0.05).any(1)) > 0.3  # uncorrected


def test_p_of_a_difference_and_of_equality() -> None:
    """Mean 2, deviation 1, three seeds: t = 2 sqrt(3) with two degrees, p = 1 - t / sqrt(2 + t^2)."""
    difference = paired_difference({0: 11.0, 1: 23.0, 2: 32.0}, {0: 10.0, 1: 20.0, 2: 30.0})
    assert difference is not None
    estimate = difference.estimate
    assert estimate is not None
    t = 2 * math.sqrt(3)
    assert estimate.p_different() == pytest.approx(1 - t / math.sqrt(2 + t**2))
    assert estimate.p_within(4.0) == pytest.approx(estimate.p_different() / 2)  # as far from 4 as from 0
    assert estimate.p_within(2.0) == pytest.approx(0.5)
    assert estimate.p_within(1.0) > 0.5


def test_equality_is_the_90_percent_interval_within_the_bounds() -> None:
    estimate = Estimate(mean=0.3, error=0.2, degrees=7, covers="seeds")
    edge = 0.3 + t_critical(7, 0.90) * 0.2
    assert estimate.p_within(edge) == pytest.approx(0.05)
    assert Estimate(-0.3, 0.2, 7, "seeds").p_within(edge) == pytest.approx(0.05)


def test_differences_without_any_scatter() -> None:
    assert Estimate(5.0, 0.0, 4, "seeds").p_different() == 0.0
    assert Estimate(0.0, 0.0, 4, "seeds").p_different() == 1.0
    assert (Estimate(0.5, 0.0, 4, "seeds").p_within(1.0), Estimate(1.0, 0.0, 4, "seeds").p_within(1.0)) == (0.0, 1.0)


def contrast(
    mean: float, error: float, *, smallest: float | None = 1.0, seeds: int = 5, key: object = None
) -> Contrast:
    base = dict.fromkeys(range(seeds), 0.0)
    difference = paired_difference(dict.fromkeys(base, mean), base)
    estimate = Estimate(mean, error, seeds - 1, "seeds")
    return Contrast(
        "a", "b", "metric", smallest, difference, estimate, family_key=key or (mean, error, smallest, seeds)
    )


@pytest.mark.parametrize(
    ("mean", "error", "smallest", "verdict"),
    [
        (3.0, 0.2, 1.0, "above"),
        (-3.0, 0.2, 1.0, "below"),
        (0.1, 0.2, 1.0, "equal"),
        (0.5, 0.1, 1.0, "equal"),  # differs from 0, but by less than matters
        (0.5, 0.1, None, "above"),
        (0.1, 0.2, None, "not resolved"),
        (1.0, 0.6, 1.0, "not resolved"),
    ],
)
def test_verdicts(mean: float, error: float, smallest: float | None, verdict: str) -> None:
    (tested,) = judge([contrast(mean, error, smallest=smallest)])
    assert (tested.verdict, tested.reason, tested.family_size) == (verdict, "", 1)
    assert tested.p_holm == tested.p


def test_a_verdict_needs_more_than_three_seeds() -> None:
    (tested,) = judge([contrast(30.0, 0.01, seeds=3)])
    assert tested.verdict == "not resolved"
    assert tested.reason == "3 seeds: a verdict needs 4 or more"
    assert tested.p_holm is not None
    assert tested.p_holm < 0.05
    assert judge([contrast(30.0, 0.01, seeds=4)])[0].verdict == "above"


def test_the_correction_is_over_the_declared_family() -> None:
    alone = judge([contrast(1.0, 0.3, smallest=None)])[0]
    assert alone.verdict == "above"
    among = judge([contrast(1.0, 0.3, smallest=None), *(contrast(0.1 * n, 0.5, smallest=None) for n in (1, 2, 3))])
    assert among[0].p == alone.p
    assert among[0].p_holm == pytest.approx(4 * (alone.p or 0))
    assert among[0].verdict == "not resolved"
    # what could not be computed was declared all the same; what is declared twice is one test
    missing = Contrast("a", "b", "metric", None, None, None, family_key="missing")
    tested = judge([contrast(1.0, 0.3, smallest=None, key="x"), contrast(1.0, 0.3, smallest=None, key="x"), missing])
    assert tested[0].p_holm == pytest.approx(2 * (alone.p or 0))
    assert (tested[2].p, tested[2].p_holm, tested[2].verdict) == (None, None, "not resolved")
    assert {each.family_size for each in tested} == {2}


# ------------------------------------------------------------------------------------------------ which rows


def plan_of(recipe: Path, **values: Any) -> Any:
    return make_plan(ComparisonConfig.from_mapping({"base": str(recipe), "arms": ARMS} | values))


def pairs(table: Any) -> list[tuple[str, str]]:
    return [(table.rows[each.arm].label, table.rows[each.against].label) for each in table.contrasts]


def test_a_contrast_stands_for_each_value_of_an_axis(recipe: Path) -> None:
    declared = [{"arm": "clip_kd", "against": "hinton"}, {"arm": "clip_kd, steps=4", "against": "steps=2"}]
    axes = {"training.steps": [2, 4]}
    with pytest.raises(ConfigError, match=r"contrasts, against: there is no 'steps=2'"):
        plan_of(recipe, axes=axes, contrasts=declared)
    declared[1]["against"] = "training.steps=2"
    (table,) = plan_of(recipe, axes=axes, contrasts=declared).tables
    assert pairs(table) == [
        ("clip_kd, steps=2", "hinton, steps=2"),
        ("clip_kd, steps=4", "hinton, steps=4"),
        ("clip_kd, steps=4", "clip_kd, steps=2"),
    ]


def test_a_table_takes_the_contrasts_whose_rows_it_has_or_its_own(recipe: Path) -> None:
    declared = [{"arm": "clip_kd", "against": "hinton"}, {"arm": "clip_kd", "against": "contrastive"}]
    tables = {
        "All": {},
        "Two": {"arms": ["clip_kd", "hinton"]},
        "Own": {"contrasts": [{"arm": "hinton", "against": "contrastive", "smallest": 0.5}]},
        "None": {"contrasts": []},
    }
    every, two, own, none = plan_of(recipe, contrasts=declared, tables=tables).tables
    assert pairs(every) == [("clip_kd", "hinton"), ("clip_kd", "contrastive")]
    assert pairs(two) == [("clip_kd", "hinton")]
    assert (pairs(own), own.contrasts[0].declared.smallest) == ([("hinton", "contrastive")], 0.5)
    assert pairs(none) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"contrasts": [{"arm": "clip_dk", "against": "hinton"}]}, r"contrasts, arm: there is no 'clip_dk' \(did you"),
        ({"contrasts": [{"arm": "hinton", "against": "hinton"}]}, "compares a row with itself"),
        ({"contrasts": [{"arm": "hinton", "against": "clip_kd", "smallest": 0}]}, r"smallest: .*> 0"),
        (
            {"contrasts": [{"arm": "hinton", "agianst": "clip_kd"}]},
            r"agianst: unknown key \(did you mean 'against'\?\)",
        ),
        (
            {"contrasts": [{"arm": "clip_dk", "against": "hinton"}], "tables": {"T": {}, "U": {}}},
            r"no table can take 'clip_dk' against 'hinton'. Table 'T', arm: there is no 'clip_dk'",
        ),
        (
            {"contrasts": [{"arm": "clip_kd", "against": "hinton"}], "tables": {"T": {"contrasts": []}}},
            "because each has contrasts of its own",
        ),
        (
            {"tables": {"T": {"contrasts": [{"arm": "x", "against": "hinton"}]}}},
            r"contrasts of table 'T', arm: there is no 'x'",
        ),
    ],
)
def test_wrong_contrasts_are_refused_before_the_first_run(recipe: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(recipe, **values)


# ------------------------------------------------------------------------------------------------ the outputs


def test_verdicts_of_a_comparison(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    declared = [
        {"arm": "clip_kd", "against": "contrastive", "smallest": 1.0},
        {"arm": "hinton", "against": "contrastive", "smallest": 1.0, "metric": "zero_shot.top1"},
        {"arm": "contrastive", "against": "clip_kd"},
    ]
    result = compare_pretended(
        recipe, tmp_path / "c", monkeypatch, PretendedRuns(noisy_score), contrasts=declared, reference="contrastive"
    )
    (table,) = result.tables
    assert [tested.verdict for tested in table.contrasts] == ["above", "equal", "below"]
    first = table.contrasts[0]
    assert first.contrast.difference is not None
    assert first.contrast.difference.mean == pytest.approx(5.0)
    assert first.family_size == 3
    text = (tmp_path / "c" / "table.md").read_text()
    assert "exploratory" not in text.lower()
    assert "| clip_kd − contrastive | mean R@1 | +5.0 [" in text
    assert "Holm's correction goes over all 3 of this comparison's file" in text
    assert len({line.count("|") for line in text.splitlines() if "−" in line and line.startswith("| ")}) == 2
    # an undeclared difference is shown, without a verdict
    (line,) = [line for line in text.splitlines() if line.startswith("| hinton |")]
    assert "[" in line
    assert not any(verdict in line for verdict in ("above", "below", "equal", "not resolved"))
    stored = json.loads((tmp_path / "c" / "results.json").read_text())["tables"][0]
    assert [each["verdict"] for each in stored["contrasts"]] == ["above", "equal", "below"]
    assert stored["contrasts"][0]["seeds"] == list(range(6))
    assert stored["rows"][2]["metrics"]["retrieval.mean_r@1"]["difference"]["interval"] == pytest.approx(
        stored["contrasts"][0]["interval"]
    )
    with (tmp_path / "c" / "contrasts.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(each["arm"], each["against"], each["verdict"]) for each in lines] == [
        ("clip_kd", "contrastive", "above"), ("hinton", "contrastive", "equal"), ("contrastive", "clip_kd", "below"),
    ]  # fmt: skip
    assert float(lines[0]["low"]) < float(lines[0]["difference"]) < float(lines[0]["high"])


def test_three_seeds_are_called_exploratory(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    declared = [{"arm": "clip_kd", "against": "contrastive"}]
    tables = {"Methods": {}}
    runs = PretendedRuns(noisy_score)
    result = compare_pretended(
        recipe, tmp_path / "c", monkeypatch, runs, contrasts=declared, tables=tables, seeds=[0, 1, 2]
    )
    text = (tmp_path / "c" / "table.md").read_text()
    assert "## Methods (exploratory, uncorrected: 3 seeds)" in text
    assert result.tables[0].title == "Methods"
    assert [tested.verdict for tested in result.tables[0].contrasts] == ["not resolved"]
    assert "clip_kd − contrastive: 3 seeds: a verdict needs 4 or more." in text
    four = compare_pretended(
        recipe, tmp_path / "c", monkeypatch, runs, contrasts=declared, tables=tables, seeds=[0, 1, 2, 3]
    )
    assert four.tables[0].heading == "Methods"
    assert [tested.verdict for tested in four.tables[0].contrasts] == ["above"]


def test_a_contrast_in_two_tables_counts_once(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = compare_pretended(
        recipe,
        tmp_path / "c",
        monkeypatch,
        PretendedRuns(noisy_score),
        contrasts=[{"arm": "clip_kd", "against": "hinton"}],
        tables={"All": {}, "Two": {"arms": ["clip_kd", "hinton"]}},
    )
    every, two = (table.contrasts[0] for table in result.tables)
    assert every.family_size == two.family_size == 1
    assert every.p_holm == two.p_holm == every.p

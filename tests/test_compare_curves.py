"""Medians and plateaus of seeds, and the gap to the teacher that may not begin where a curve still rises."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cmapkd.compare import ComparisonConfig, summarize
from cmapkd.compare.curves import late_rise, read_validations
from cmapkd.compare.gap import GapStart, check_start
from cmapkd.compare.rows import Row
from cmapkd.compare.statistics import is_bimodal
from cmapkd.config import ConfigError
from cmapkd.run import RunConfig
from compare_support import TEACHER_SCORE, PretendedRuns, compare_pretended, write_recipe

SCRATCH = (9.99, 1.45, 9.06, 0.80, 1.54, 1.20)  # half of the seeds stay on a plateau
FLAT = {10: 0.5, 20: 0.8, 30: 0.99, 40: 1.0}
RISING = {10: 0.1, 20: 0.4, 30: 0.7, 40: 1.0}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), evaluate_every=10)


def score(config: RunConfig) -> float:
    if config.method.name == "contrastive":
        return SCRATCH[config.seed]
    return 30.0 + config.seed + (5.0 if config.method.name == "clip_kd" else 0.0)


# ------------------------------------------------------------------------------------------------ medians, plateau


def test_which_seeds_count_as_two_groups() -> None:
    assert is_bimodal(SCRATCH)
    assert is_bimodal([9.0, 9.5, 10.2, 1.2, 9.9])  # one seed on a plateau
    assert not is_bimodal([30.0, 31.0, 32.0, 33.0, 34.0])
    assert not is_bimodal([50.1, 50.2, 50.3, 53.0])  # an outlier, but by a twentieth of the score
    assert not is_bimodal([1.0, 9.0])  # of two values nothing can be said
    assert not is_bimodal([2.0, 2.0, 2.0])


def test_seeds_that_merely_scatter_are_seldom_called_two_groups() -> None:
    random = np.random.default_rng(0)
    worlds = random.normal(30.0, 3.0, size=(2000, 5))
    assert np.mean([is_bimodal(list(world)) for world in worlds]) < 0.01


def test_the_median_of_a_summary() -> None:
    odd, even = summarize(SCRATCH[:5]), summarize([1.0, 2.0, 4.0, 10.0])
    assert odd is not None
    assert even is not None
    assert (odd.median, even.median) == (1.54, 3.0)


def test_medians_stand_where_seeds_are_divided(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = compare_pretended(recipe, tmp_path / "c", monkeypatch, PretendedRuns(score, curve=FLAT))
    text = (tmp_path / "c" / "table.md").read_text()
    assert "| contrastive (reference) | 4.0 ± 4.3 (median 1.5) |" in text
    assert text.count("median ") == 3  # both metrics of one row, and the note
    assert "A median stands beside a mean where the seeds fall into two groups: the widest gap" in text
    assert "off plateau" not in text
    assert result.tables[0].rows[0].off_plateau is None
    stored = json.loads((tmp_path / "c" / "results.json").read_text())["tables"][0]
    summary = stored["rows"][0]["metrics"]["retrieval.mean_r@1"]["summary"]
    assert (summary["median"], summary["bimodal"]) == (pytest.approx(1.495), True)


def test_the_share_of_seeds_off_the_plateau(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = compare_pretended(
        recipe,
        tmp_path / "c",
        monkeypatch,
        PretendedRuns(score, curve=FLAT),
        plateau=33.5,
        tables={"All": {}, "Zero-shot": {"metrics": ["zero_shot.top1"], "plateau": 2.0}},
    )
    shares = [row.off_plateau for row in result.tables[0].rows]
    assert shares == [(0, 6), (2, 6), (6, 6)]
    assert [row.off_plateau for row in result.tables[1].rows] == [(2, 6), (6, 6), (6, 6)]
    text = (tmp_path / "c" / "table.md").read_text()
    assert "Off the plateau: seeds whose mean R@1 is above 33.5." in text
    assert "Off the plateau: seeds whose zero-shot top1 is above 2." in text
    (line,) = [line for line in text.splitlines() if line.startswith("| hinton | 32.5")]
    assert "(median 32.5)" in line  # these seeds are one group, but the plateau divides them
    assert "| 2/6 |" in line
    stored = json.loads((tmp_path / "c" / "results.json").read_text())["tables"]
    assert [table["plateau"] for table in stored] == [33.5, 2.0]
    assert stored[0]["rows"][1]["off_plateau"] == [2, 6]


# ------------------------------------------------------------------------------------------------ the gap


def test_the_rise_over_the_last_quarter() -> None:
    assert late_rise({10: 1.0, 30: 7.0, 40: 9.5}, 40) == pytest.approx(2.5)
    assert late_rise({20: 4.0, 40: 8.0}, 40) == pytest.approx(2.0)  # 30 lies half way
    assert late_rise({10: 5.0, 30: 7.0, 39: 6.0}, 40) == pytest.approx(-1.0)
    assert late_rise({10: 1.0, 30: 7.0, 36: 9.0}, 40) is None  # nothing near the end
    assert late_rise({35: 1.0, 40: 2.0}, 40) is None  # nothing before the last quarter
    assert late_rise({}, 40) is None


def test_validations_are_read_of_finished_runs(tmp_path: Path) -> None:
    lines = ['{"step": 1, "loss": 3.0}', '{"step": 2, "validation/mean_r@1": 4.0, "validation/score": 4.0}', '{"ste']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_validations(tmp_path) == {}
    (tmp_path / "metrics.json").write_text("{}")
    assert read_validations(tmp_path) == {"mean_r@1": {2: 4.0}, "score": {2: 4.0}}


def scratch_of(config: RunConfig) -> float:
    return 20.0 if config.method.name == "contrastive" else score(config)


def test_a_gap_begins_at_a_row_that_has_learned(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = compare_pretended(recipe, tmp_path / "c", monkeypatch, PretendedRuns(scratch_of, curve=FLAT))
    cell = result.tables[0].rows[1].cells["retrieval.mean_r@1"]
    assert cell.gap == pytest.approx({seed: (10 + seed) / (TEACHER_SCORE - 20) for seed in range(6)})
    text = (tmp_path / "c" / "table.md").read_text()
    assert "| gap closed from contrastive (mean R@1) |" in text
    assert "still rises" not in text


def test_a_gap_from_a_rising_curve_is_withheld(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scratch arm ends at 20 and is at 14 after three quarters: it rises by 6 points."""
    runs = PretendedRuns(scratch_of, curve=RISING)
    result = compare_pretended(recipe, tmp_path / "c", monkeypatch, runs)
    (table,) = result.tables
    assert all(row.cells["retrieval.mean_r@1"].gap == {} for row in table.rows)
    note = (
        "Share of the gap withheld: contrastive, where the gap begins, still rises by 6.0 points of validation "
        "mean_r@1 over the last quarter of its steps, more than gap_rising = 1."
    )
    assert [each for each in table.notes if each.startswith(note)]
    assert not [each for each in table.notes if each.startswith("Gap closed:")]
    text = (tmp_path / "c" / "table.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("| hinton |")]
    assert "| withheld |" in line
    stored = json.loads((tmp_path / "c" / "results.json").read_text())["tables"][0]
    assert stored["rows"][1]["metrics"]["retrieval.mean_r@1"]["gap_closed"]["remark"].startswith(note)
    # a larger allowance, given in the file, lets it pass
    allowed = compare_pretended(recipe, tmp_path / "c", monkeypatch, runs, gap_rising=6.5)
    assert allowed.tables[0].rows[1].cells["retrieval.mean_r@1"].gap
    assert not [each for each in allowed.tables[0].notes if "still rises" in each]


@pytest.mark.parametrize(
    ("settings", "curve", "reason"),
    [
        ({}, {}, "its runs logged no validation of mean_r@1 before 3/4 of their steps and at the end"),
        ({"gap_rising": None}, RISING, "gap_rising is none"),
    ],
)
def test_a_gap_that_was_not_checked_says_so(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, None],
    curve: dict[int, float],
    reason: str,
) -> None:
    runs = PretendedRuns(scratch_of, curve=curve)
    (table,) = compare_pretended(recipe, tmp_path / "c", monkeypatch, runs, **settings).tables
    assert table.rows[1].cells["retrieval.mean_r@1"].gap
    (note,) = [each for each in table.notes if "was not checked" in each]
    assert note.startswith("Whether contrastive, where the gap begins, still rises was not checked:")
    assert reason in note


def test_points_say_nothing_of_bits_per_byte() -> None:
    row = Row({}, "sft", {})
    start = check_start(row, "perplexity.negative_bits_per_byte", {}, {}, 1.0)
    assert start == GapStart(
        False, "Whether sft, where the gap begins, still rises was not checked: -bits/byte is no percent."
    )


def test_a_negative_allowance_is_refused(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"gap_rising: .*>= 0"):
        ComparisonConfig.from_mapping({"base": str(recipe), "arms": {"a": {}}, "gap_rising": -1})

"""The bootstrap over seeds and pictures: whether it covers, what a comparison makes of it, and its committed form."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmapkd.compare.bootstrap import MAX_GROUPS, Part, two_way_estimate
from cmapkd.compare.picture_table import PictureTable
from cmapkd.compare.pictures import NoPictures, measures_of, resampled_difference
from cmapkd.compare.statistics import Estimate, paired_difference, t_critical
from cmapkd.run.measure import RANKS
from compare_support import PretendedRuns, compare_pretended, leave_ranks, score_of, write_recipe

SEEDS, PICTURES = 5, 100


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), evaluate_every=10)


# ------------------------------------------------------------------------------------------------ coverage


def normal_worlds(of_seeds: float, of_pictures: float, rest: float) -> Iterator[np.ndarray]:
    """Differences of mean 0 with these standard deviations, [seeds, pictures]."""
    random = np.random.default_rng(1)
    while True:
        seeds, pictures = random.normal(size=(SEEDS, 1)), random.normal(size=(1, PICTURES))
        yield of_seeds * seeds + of_pictures * pictures + rest * random.normal(size=(SEEDS, PICTURES))


def covers(estimate: Estimate | None, truth: float = 0.0) -> bool:
    assert estimate is not None
    low, high = estimate.interval
    return low <= truth <= high


def seeds_alone_cover(differences: np.ndarray, truth: float = 0.0) -> bool:
    means = differences.mean(1)
    return bool(abs(means.mean() - truth) <= t_critical(SEEDS - 1) * means.std(ddof=1) / SEEDS**0.5)


@pytest.mark.parametrize(
    ("of_seeds", "of_pictures", "rest"),
    [(0.1, 1.0, 1.0), (0.05, 1.0, 2.0), (0.5, 1.0, 1.0), (0.05, 0.0, 2.0)],
)
def test_the_two_way_interval_covers_as_often_as_it_says(of_seeds: float, of_pictures: float, rest: float) -> None:
    worlds = normal_worlds(of_seeds, of_pictures, rest)
    covered = np.mean(
        [covers(two_way_estimate([Part(next(worlds), np.ones(PICTURES))], resamples=300)) for _ in range(500)]
    )
    assert 0.92 <= covered <= 0.98


def test_the_interval_over_seeds_alone_fails_for_new_pictures() -> None:
    worlds = normal_worlds(0.1, 1.0, 1.0)
    assert np.mean([seeds_alone_cover(next(worlds)) for _ in range(500)]) < 0.85


def test_hits_of_pictures_with_several_captions() -> None:
    """Two arms' hits are binary, of 1 to 5 captions a picture, harder in some pictures; recall is a ratio of sums."""
    random = np.random.default_rng(2)
    both: list[bool] = []
    alone: list[bool] = []
    for _ in range(400):
        queries = random.integers(1, 6, size=PICTURES)
        ease, lead = random.normal(size=PICTURES), 0.5 + random.normal(size=PICTURES)
        arms = []
        for shift in (lead, np.zeros(PICTURES)):
            chance = 1 / (1 + np.exp(-(ease + shift + 0.05 * random.normal(size=(SEEDS, 1)))))
            arms.append(random.binomial(queries, chance))
        part = Part(100.0 * (arms[0] - arms[1]), queries.astype(float))
        both.append(covers(two_way_estimate([part], resamples=300), TRUE_LEAD))
        means = part.sums.sum(1) / part.queries.sum()
        alone.append(abs(means.mean() - TRUE_LEAD) <= t_critical(SEEDS - 1) * means.std(ddof=1) / SEEDS**0.5)
    assert 0.92 <= np.mean(both) <= 0.98
    assert np.mean(alone) < 0.85


def _true_lead() -> float:
    """Points of recall between the arms of the world above, over 4 million pictures."""
    random = np.random.default_rng(3)
    ease, lead, seeds = random.normal(size=(3, 4_000_000))
    hits = [1 / (1 + np.exp(-(ease + shift + 0.05 * seeds))) for shift in (0.5 + lead, 0.0)]
    return 100 * float((hits[0] - hits[1]).mean())


TRUE_LEAD = _true_lead()


def test_the_error_is_that_of_an_analysis_of_variance() -> None:
    """Of seeds, pictures and rest, each counted once: the pigeonhole bootstrap alone counts the rest three times."""
    values = next(normal_worlds(0.5, 1.0, 2.0))
    rest = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    mean_square = (rest**2).sum() / (SEEDS - 1) / (PICTURES - 1)
    expected = values.mean(1).var(ddof=1) / SEEDS + values.mean(0).var(ddof=1) / PICTURES
    expected -= mean_square / (SEEDS * PICTURES)
    estimate = two_way_estimate([Part(values, np.ones(PICTURES))], resamples=20_000)
    assert estimate is not None
    assert estimate.error**2 == pytest.approx(
        expected, rel=0.08
    )  # of 20,000 resamples; uncorrected it is twice as much
    assert SEEDS - 1 < estimate.degrees < SEEDS * PICTURES
    again = two_way_estimate([Part(values, np.ones(PICTURES))], resamples=20_000)
    assert again == estimate  # the draws are seeded


def test_many_pictures_are_resampled_in_groups() -> None:
    random = np.random.default_rng(4)
    count = 3 * MAX_GROUPS + 17
    sums, queries = random.normal(0.1, 1.0, size=(4, count)), random.integers(1, 6, size=count).astype(float)
    estimate = two_way_estimate([Part(sums, queries)])
    assert estimate is not None
    assert estimate.mean == pytest.approx(sums.sum() / 4 / queries.sum())
    assert estimate.error == pytest.approx(1 / 3 / (4 * count) ** 0.5, rel=0.1)  # the truth: deviation 1, 3 queries
    assert estimate.error >= (sums.sum(1) / queries.sum()).std(ddof=1) / 2


def test_one_seed_or_one_picture_has_no_two_way_interval() -> None:
    assert two_way_estimate([Part(np.ones((1, 9)), np.ones(9))]) is None
    assert two_way_estimate([Part(np.ones((9, 1)), np.ones(1))]) is None
    assert two_way_estimate([Part(np.ones((3, 9)), np.ones(9))]) is None  # nothing differs: no chance is seen


def test_seeds_that_agree_by_chance_leave_the_chance_of_pictures() -> None:
    """Two seeds each gain one picture, another one: without a floor the variance is that of the seeds, zero."""
    sums = np.zeros((2, 1000))
    sums[0, [3, 5, 900]] = (100, 100, -100)
    sums[1, [7, 9, 901]] = (100, 100, -100)
    estimate = two_way_estimate([Part(sums, np.ones(1000))])
    assert estimate is not None
    assert estimate.mean == pytest.approx(0.1)
    alone = sums.mean(0).std(ddof=1) / 1000**0.5
    assert estimate.error >= alone > 0
    assert estimate.interval[0] < 0 < estimate.interval[1]


def test_which_metrics_are_means_over_pictures() -> None:
    assert measures_of("retrieval.mean_r@1") == ("i2t.r@1", "t2i.r@1")
    assert measures_of("retrieval.t2i.r@10") == ("t2i.r@10",)
    assert measures_of("zero_shot.top5") == ("zero_shot.top5",)
    for path in ("retrieval.i2t.median_rank", "retrieval.i2t.map", "zero_shot.mean_per_class", "params"):
        with pytest.raises(NoPictures, match="is no mean over pictures"):
            measures_of(path)


# ------------------------------------------------------------------------------------------------ in a comparison


def test_a_comparison_resamples_the_pictures_that_its_runs_keep(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = PretendedRuns(score_of, leave=leave_ranks)
    declared = [{"arm": "clip_kd", "against": "contrastive", "smallest": 1.0}]
    result = compare_pretended(recipe, tmp_path / "c", monkeypatch, runs, contrasts=declared)
    (table,) = result.tables
    cell = table.rows[2].cells["retrieval.mean_r@1"]
    assert cell.two_way is not None
    assert cell.two_way.mean == pytest.approx(cell.difference.mean)  # type: ignore[union-attr]
    assert table.contrasts[0].contrast.estimate == cell.two_way
    assert (table.contrasts[0].verdict, table.contrasts[0].contrast.remark) == ("above", "")
    text = (tmp_path / "c" / "table.md").read_text()
    low, high = cell.two_way.interval
    assert f"[{low:+.1f}, {high:+.1f}], 6/6 |" in text
    assert "− contrastive [95 %], and pictures [95 %], wins" in text
    assert "| seeds and pictures |" in text
    assert "Intervals of zero-shot top1 are over seeds alone, because the kept ranks have no zero_shot." in text
    stored = json.loads((tmp_path / "c" / "results.json").read_text())["tables"][0]
    assert stored["rows"][2]["metrics"]["retrieval.mean_r@1"]["two_way"]["interval"] == pytest.approx([low, high])
    assert stored["contrasts"][0]["covers"] == "seeds and pictures"


@pytest.mark.parametrize(
    ("leave", "reason"),
    [
        (lambda config, out: None, "their runs keep no ranks of pictures"),
        (
            lambda config, out: leave_ranks(config, out, digest=config.method.name),
            "the runs were tested on different pictures or captions",
        ),
        (lambda config, out: (out / RANKS).write_bytes(b"damaged"), "holds no ranks of pictures"),
        (
            lambda config, out: leave_ranks(config.model_copy(update={"seed": 9 if config.seed else 0}), out),
            "give a difference of",
        ),
    ],
)
def test_where_pictures_cannot_be_resampled_the_reason_is_given(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leave: Any, reason: str
) -> None:
    declared = [{"arm": "clip_kd", "against": "contrastive"}]
    runs = PretendedRuns(score_of, leave=leave)
    result = compare_pretended(recipe, tmp_path / "c", monkeypatch, runs, contrasts=declared)
    (table,) = result.tables
    assert table.rows[2].cells["retrieval.mean_r@1"].two_way is None
    tested = table.contrasts[0]
    assert tested.contrast.estimate is not None
    assert tested.contrast.estimate.covers == "seeds"
    assert tested.contrast.remark.startswith("the interval is over seeds alone, because")
    assert reason in tested.contrast.remark
    assert any(reason in note and "over seeds alone" in note for note in table.notes)


def test_the_committed_table_gives_the_same_intervals(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = PretendedRuns(score_of, leave=leave_ranks)
    result = compare_pretended(recipe, tmp_path / "c", monkeypatch, runs)
    with (tmp_path / "c" / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    arms = {
        name: {int(line["seed"]): line for line in lines if line["arm"] == name} for name in ("clip_kd", "contrastive")
    }
    values = [{seed: float(line["retrieval.mean_r@1"]) for seed, line in arm.items()} for arm in arms.values()]
    difference = paired_difference(*values)
    assert difference is not None
    runs_of = [{seed: line["run"] for seed, line in arm.items()} for arm in arms.values()]
    table = PictureTable(tmp_path / "c" / "pictures.csv")
    estimate = resampled_difference(table, *runs_of, "", "retrieval.mean_r@1", difference)
    kept = result.tables[0].rows[2].cells["retrieval.mean_r@1"].two_way
    assert estimate is not None
    assert kept is not None
    assert (estimate.mean, estimate.error) == (pytest.approx(kept.mean), pytest.approx(kept.error))
    with pytest.raises(NoPictures, match=r"has no zero_shot\.top1 of"):
        table.scores(runs_of[0][0], "", "zero_shot.top1")


def test_a_damaged_committed_table_is_refused(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = PretendedRuns(score_of, leave=leave_ranks)
    compare_pretended(recipe, tmp_path / "c", monkeypatch, runs, seeds=[0])
    path = tmp_path / "c" / "pictures.csv"
    lines = list(csv.DictReader(path.read_text().splitlines()))
    run = next(line for line in lines if line["measure"] == "i2t.r@1")
    for changed in (
        {"values": run["values"][:-8] + "AAAAAAA="},
        {"pictures": "61"},
        {"values": "?"},
        {"pictures": "3"},
    ):
        path.write_text("\n".join(
            [",".join(run), *(",".join((line | changed if line == run else line).values()) for line in lines)]
        ))  # fmt: skip
        with pytest.raises(ValueError, match="are damaged"):
            PictureTable(path).scores(run["run"], "", "i2t.r@1")
    path.write_text("run,score\na,1\n")
    with pytest.raises(ValueError, match="is no table of pictures"):
        PictureTable(path)

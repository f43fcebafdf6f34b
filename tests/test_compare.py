"""Comparisons: which runs they need, how they go on, what their numbers are, and what they refuse."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from cmapkd.cli import main
from cmapkd.cli.compare import spread
from cmapkd.compare import (
    ComparisonConfig,
    compare,
    execute,
    load_comparison,
    make_plan,
    paired_difference,
    summarize,
    t_critical,
)
from cmapkd.compare.arms import parse_arm, parse_axis
from cmapkd.compare.left import TimeLeft
from cmapkd.compare.outcome import Outcome
from cmapkd.compare.picture_table import PictureTable
from cmapkd.compare.write import _value, rich_table
from cmapkd.config import ConfigError
from cmapkd.results import RunResult
from cmapkd.run import RunConfig
from cmapkd.training import Interrupted, NonFiniteLossError
from compare_support import leave_figures_blank, write_recipe
from helpers import MemorySource

METHODS = {name: {"method": name} for name in ("contrastive", "hinton", "clip_kd")}
TEACHER_SCORE = 80.0
BONUS = {"contrastive": 0.0, "hinton": 5.0, "clip_kd": 12.0}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of two small steps with a teacher on disk."""
    return write_recipe(tmp_path_factory.mktemp("recipe"), baseline="scratch", steps=2, log_every=1, evaluate_every=1)


class FakeRun:
    """Stands for `run`: leaves the folder of a finished run whose scores follow from method, steps and seed."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, bool]] = []
        self.known_teachers: list[dict[str, Any] | None] = []
        self.before: Callable[[RunConfig, Path], None] = lambda config, out: None
        self.sizes: tuple[int, int] | None = None

    def __call__(
        self,
        config: RunConfig,
        *,
        out: Path,
        resume: bool = False,
        console: Any = None,
        teacher_scores: dict[str, Any] | None = None,
        keep: int | None = None,
    ) -> RunResult:
        assert keep == (None if "keep_checkpoints" in config.training.model_fields_set else 0)
        self.known_teachers.append(teacher_scores)
        self.calls.append((config.method.name, config.seed, resume))
        out.mkdir(parents=True, exist_ok=resume)
        (out / "config.yaml").write_text(yaml.safe_dump(config.plain(), sort_keys=False))
        self.before(config, out)
        steps = config.training.steps or 0
        score = 30.0 + BONUS[config.method.name] + steps / 100 + 2 * config.seed
        lines = [{"step": step, "validation/mean_r@1": score} for step in (1, steps)]
        (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        metrics: dict[str, Any] = {
            "teacher": None if config.teacher is None else scores(TEACHER_SCORE, params=100),
            "student": scores(score, params=10),
            "method": config.method.name,
            "seed": config.seed,
            "steps": steps,
            "batch_size": config.training.batch_size,
            "train_seconds": 4.0,
            "peak_memory_bytes": 1500 * 2**20,
            "extra_params": 70000,
            "evaluated_on": "fake",
        }
        if self.sizes is not None:
            metrics["student"]["retrieval"] |= dict(zip(("num_images", "num_texts"), self.sizes, strict=True))
        (out / "metrics.json").write_text(json.dumps(metrics))
        return RunResult(out, metrics)


def scores(mean: float, *, params: int) -> dict[str, Any]:
    return {
        "retrieval": {"mean_r@1": mean, "i2t": {"r@5": mean + 1, "median_rank": 100 - mean}},
        "zero_shot": {"top1": mean / 2},
        "params": params,
    }


def test_recall_stands_beside_the_images_and_captions_that_it_is_of(
    recipe: Path, fake: FakeRun, tmp_path: Path
) -> None:
    def sized(config: RunConfig, out: Path) -> None:
        fake.sizes = (1000 if config.method.name == "clip_kd" else 900, 4500)

    fake.before = sized
    result = compare(comparison(recipe), out=tmp_path / "out")
    text = (tmp_path / "out" / "table.md").read_text()
    one, other = "900 images, 4,500 captions", "1,000 images, 4,500 captions"
    assert f"Retrieval is over {one} in some runs, and over {other} in others." in text
    head, *lines = list(csv.reader((tmp_path / "out" / "results.csv").read_text().splitlines()))
    place = head.index("retrieval.num_images")
    assert {line[place] for line in lines} == {"1000.0", "900.0"}
    assert not result.failed


def test_a_method_as_an_axis_is_one_column(recipe: Path, fake: FakeRun, tmp_path: Path) -> None:
    def uneven(config: RunConfig, out: Path) -> None:
        BONUS["hinton"] = 100 * 0.0511  # 5.109999999999999

    fake.before = uneven
    both = {"arms": {}, "axes": {"method": ["contrastive", "hinton"]}, "seeds": [0]}
    compare(comparison(recipe, **both), out=tmp_path / "out")
    BONUS["hinton"] = 5.0
    head, *lines = list(csv.reader((tmp_path / "out" / "results.csv").read_text().splitlines()))
    assert head.count("method") == 1
    assert [line[head.index("method")] for line in lines] == ["contrastive", "hinton"]
    assert max(len(line[head.index("retrieval.mean_r@1")]) for line in lines) < 8
    named = both | {"axes": {"method": {"alone": "contrastive", "taught": "hinton"}}}
    compare(comparison(recipe, **named), out=tmp_path / "out")
    head, *lines = list(csv.reader((tmp_path / "out" / "results.csv").read_text().splitlines()))
    assert len(set(head)) == len(head)
    assert [line[head.index("method (axis)")] for line in lines] == ["alone", "taught"]


def test_a_gap_that_is_nearly_none_has_no_minus() -> None:
    assert _value(summarize([-0.2, 0.1]), 0) == "0 ± 0"
    assert _value(summarize([-0.7]), 0) == "-1"
    assert _value(summarize([-0.04]), 1) == "0.0"


def test_the_time_left_is_that_of_runs_like_the_finished_ones(recipe: Path) -> None:
    short, longer = (make_plan(comparison(recipe, overrides=[f"training.steps={steps}"])).runs for steps in (10, 30))
    left = TimeLeft()
    assert left.seconds(short) is None
    assert left.said([*short]) == ""
    left.finished(short[0], 20.0, 10)
    left.finished(short[1], 40.0, 10)
    same = [run for run in short[2:] if run.config.method.name == short[0].config.method.name]
    assert left.seconds(same) == 20.0  # another seed of the first
    assert left.seconds(longer[:1]) == 30 * 3.0  # 30 steps at the mean of 2 and 4 seconds a step
    assert left.said([*longer[:2]]) == "; about 3:00 left for 2 runs"
    assert left.said([*longer[:1]]) == "; about 1:30 left for 1 run"
    epochs = make_plan(comparison(recipe, overrides=["training.steps=null", "training.epochs=2"])).runs
    assert left.seconds(epochs[:1]) == 30.0


def test_the_time_left_stands_beside_the_next_run(recipe: Path, fake: FakeRun, tmp_path: Path) -> None:
    console = Console(width=120, file=io.StringIO())
    compare(comparison(recipe), out=tmp_path / "out", console=console)
    heads = [line for line in console.file.getvalue().splitlines() if line.startswith("[")]  # type: ignore[attr-defined]
    assert "left" not in heads[0]
    assert [line.rpartition(" left for ")[2] for line in heads[1:]] == [f"{n} runs" for n in range(5, 1, -1)] + [
        "1 run"
    ]
    compare(comparison(recipe), out=tmp_path / "out", console=console)
    again = [line for line in console.file.getvalue().splitlines() if "read back" in line]  # type: ignore[attr-defined]
    assert len(again) == 6
    assert not any("left" in line for line in again)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    """Whose figures are rendered."""
    fake = FakeRun()
    monkeypatch.setattr("cmapkd.compare.execute.run", fake)
    monkeypatch.setattr("gc.collect", lambda: 0)  # a tenth of a second a run, with nothing to collect here
    return fake


@pytest.fixture
def fake(drawn: FakeRun, monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    leave_figures_blank(monkeypatch)
    return drawn


def comparison(recipe: Path, **changes: Any) -> ComparisonConfig:
    return ComparisonConfig.from_mapping({"base": str(recipe), "seeds": [0, 1], "arms": METHODS} | changes)


def cell(result: Any, label: str, metric: str = "retrieval.mean_r@1", table: int = 0) -> Any:
    return next(row for row in result.tables[table].rows if row.label == label).cells[metric]


# ------------------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [
        (1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (6, 2.447), (7, 2.365), (8, 2.306), (9, 2.262),
        (10, 2.228), (11, 2.201), (12, 2.179), (13, 2.160), (14, 2.145), (15, 2.131), (16, 2.120), (17, 2.110),
        (18, 2.101), (19, 2.093), (20, 2.086), (21, 2.080), (22, 2.074), (23, 2.069), (24, 2.064), (25, 2.060),
        (26, 2.056), (27, 2.052), (28, 2.048), (29, 2.045), (30, 2.042), (120, 1.980),
    ],
)  # fmt: skip
def test_t_against_the_published_table(degrees: int, expected: float) -> None:
    """NIST/SEMATECH e-Handbook of Statistical Methods, table 1.3.6.7.2, column 0.975."""
    assert t_critical(degrees) == pytest.approx(expected, abs=5.1e-4)


def test_t_where_it_has_a_closed_form() -> None:
    assert t_critical(1, 0.5) == pytest.approx(1.0)  # Cauchy: tan(pi / 4)
    p = 0.9
    assert t_critical(2, p) == pytest.approx(p * (2 / (1 - p**2)) ** 0.5)  # P(|T| <= t) = t / sqrt(2 + t^2)
    assert t_critical(10_000) == pytest.approx(1.9602, abs=1e-4)
    for wrong in ((0, 0.95), (3, 1.0), (3, 0.0)):
        with pytest.raises(ValueError, match="at least one degree of freedom"):
            t_critical(*wrong)


def test_paired_difference_by_hand() -> None:
    """Differences 1, 3, 2: mean 2, sample deviation 1, half width 4.3027 / sqrt(3)."""
    found = paired_difference({0: 11.0, 1: 23.0, 2: 32.0}, {0: 10.0, 1: 20.0, 2: 30.0})
    assert found is not None
    assert (found.seeds, found.left_out, found.differences) == ((0, 1, 2), (), (1.0, 3.0, 2.0))
    assert (found.mean, found.deviation, found.wins) == (2.0, 1.0, 3)
    assert found.interval == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-4)


def test_what_is_unpaired_is_left_out_and_named() -> None:
    found = paired_difference({0: 1.0, 2: 5.0, 3: 9.0}, {0: 2.0, 1: 7.0, 2: 5.0}, lower_is_better=True)
    assert found is not None
    assert (found.seeds, found.left_out, found.differences, found.wins) == ((0, 2), (1, 3), (-1.0, 0.0), 1)
    alone = paired_difference({4: 2.0}, {4: 1.0, 5: 1.0})
    assert alone is not None
    assert (alone.mean, alone.deviation, alone.interval) == (1.0, None, None)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_summary_of_few_values() -> None:
    assert summarize([]) is None
    one, two = summarize([3.0]), summarize([1.0, 3.0])
    assert one is not None
    assert two is not None
    assert (one.count, one.mean, one.deviation) == (1, 3.0, None)
    assert (two.count, two.mean, two.deviation) == (2, 2.0, pytest.approx(2**0.5))


# ------------------------------------------------------------------------------------------------ which runs


def test_arms_times_axes_times_seeds(recipe: Path) -> None:
    plan = make_plan(comparison(recipe, axes={"training.steps": [3, 6]}))
    (table,) = plan.tables
    assert [row.label for row in table.rows] == [f"{method}, steps={steps}" for method in METHODS for steps in (3, 6)]
    assert len(plan.runs) == 3 * 2 * 2
    assert [run.config.seed for run in plan.runs] == [0] * 6 + [1] * 6  # every arm once before any arm twice
    assert {run.config.training.steps for run in plan.runs} == {3, 6}
    assert {run.config.baseline for run in plan.runs} == {"none"}
    assert plan.runs[0].name == f"contrastive-steps3-seed0-{plan.runs[0].digest}"
    assert len({run.digest for run in plan.runs}) == len(plan.runs)
    # each row is compared with the scratch row of its own number of steps
    assert table.reference_name == table.gap_name == "contrastive"
    assert table.reference == table.gap_from == (0, 1, 0, 1, 0, 1)


def test_axes_alone_and_what_a_reference_can_be(recipe: Path) -> None:
    axes = {"training.steps": [3, 6], "method": ["contrastive", "clip_kd"]}

    def reference(name: str) -> tuple[int | None, ...]:
        return make_plan(comparison(recipe, arms={}, axes=axes, reference=name)).tables[0].reference

    labels = [row.label for row in make_plan(comparison(recipe, arms={}, axes=axes)).tables[0].rows]
    assert labels == ["steps=3, contrastive", "steps=3, clip_kd", "steps=6, contrastive", "steps=6, clip_kd"]
    assert reference("clip_kd") == reference("method=clip_kd") == (1, 1, 3, 3)
    assert reference("6") == (2, 3, 2, 3)
    assert reference("steps=6, contrastive") == (2, 2, 2, 2)
    with pytest.raises(ConfigError, match=r"there is no 'clip_dk' \(did you mean 'clip_kd'\?\)"):
        reference("clip_dk")
    twice = {"arms": {"6": ["method=hinton"], "b": {}}, "axes": {"training.steps": [3, 6]}, "reference": "6"}
    with pytest.raises(ConfigError, match=r"'6' could be arm=6 or training\.steps=6"):
        make_plan(comparison(recipe, **twice))


def test_settings_of_arms_take_every_form(recipe: Path) -> None:
    same = [{"method": {"name": "clip_kd", "task_weight": 0.5}}, ["method.task_weight=0.5"], "method.task_weight=0.5"]
    plan = make_plan(comparison(recipe, arms={f"a{place}": form for place, form in enumerate([*same, None])}))
    assert len(plan.runs) == 2 * 2
    first, *_, last = plan.tables[0].rows
    assert (first.config.method.task_weight, last.config.method.task_weight) == (0.5, 1.0)  # type: ignore[attr-defined]
    dotted = make_plan(comparison(recipe, arms={"a": {"method.task_weight": 0.5}}))
    assert {run.digest for run in dotted.runs} <= {run.digest for run in plan.runs}


def test_a_shallow_axis_does_not_undo_a_deep_one(recipe: Path) -> None:
    axes = {"method.task_weight": [0.5, 2.0], "method": ["hinton", "clip_kd"]}
    rows = make_plan(comparison(recipe, arms={}, axes=axes)).tables[0].rows
    assert [(row.config.method.name, row.config.method.task_weight) for row in rows] == [  # type: ignore[attr-defined]
        (method, weight) for weight in (0.5, 2.0) for method in ("hinton", "clip_kd")
    ]


def test_a_method_without_teacher_is_one_run_whatever_the_teacher(recipe: Path) -> None:
    axes = {"teacher": [str(recipe.parent / "teacher"), "tiny:scenes-teacher"]}
    plan = make_plan(comparison(recipe, seeds=[0], axes=axes, arms={"scratch": ["method=contrastive"], "kd": {}}))
    assert len(plan.tables[0].rows) == 4
    assert len(plan.runs) == 3


def test_a_method_without_teacher_has_none_to_inherit_from(recipe: Path) -> None:
    inheriting = {"arms": {"scratch": ["method=contrastive", "student.inherit=teacher"], "kd": {}}, "seeds": [0]}
    with pytest.raises(ConfigError, match=r"scratch: method contrastive is compared without a teacher, .* inherit: /"):
        make_plan(comparison(recipe, **inheriting))
    inheriting["arms"]["scratch"][1] = "student.inherit=tiny:scenes-teacher"
    assert len(make_plan(comparison(recipe, **inheriting)).runs) == 2


def test_tables_share_runs_of_equal_configs(recipe: Path, fake: FakeRun, tmp_path: Path) -> None:
    tables = {
        "Methods": {"arms": ["contrastive", "clip_kd"]},
        "Weights": {"arms": {"full": {}, "no task": ["method.task_weight=0"]}, "reference": "full"},
    }
    result = compare(comparison(recipe, tables=tables), out=tmp_path / "c")
    assert len(fake.calls) == 3 * 2  # `full` is `clip_kd`
    assert cell(result, "clip_kd").values == cell(result, "full", table=1).values
    stored = json.loads((tmp_path / "c" / "results.json").read_text())
    assert len(stored["runs"]) == 6
    shared = next(run for run in stored["runs"] if run["row"] == "clip_kd")
    assert [(place["table"], place["row"]) for place in shared["rows"]] == [("Methods", "clip_kd"), ("Weights", "full")]
    text = (tmp_path / "c" / "table.md").read_text()
    assert "## Methods" in text
    assert "| full (reference) |" in text


# ------------------------------------------------------------------------------------------------ numbers


def test_numbers_of_a_comparison_by_hand(recipe: Path, fake: FakeRun, tmp_path: Path) -> None:
    result = compare(comparison(recipe, seeds=[0, 1, 2]), out=tmp_path / "c")
    hinton = cell(result, "hinton")
    assert hinton.values == pytest.approx({0: 35.02, 1: 37.02, 2: 39.02})
    assert (hinton.summary.mean, hinton.summary.deviation) == (pytest.approx(37.02), pytest.approx(2.0))
    assert (hinton.difference.mean, hinton.difference.wins) == (pytest.approx(5.0), 3)
    assert hinton.difference.interval is None  # 5 points in every seed: no spread, so no interval of width 0
    text = (tmp_path / "c" / "table.md").read_text()
    assert "+5.0 (no spread in 3 seeds), 3/3" in text
    assert "No spread: all seeds have the same difference" in text
    assert hinton.gap == pytest.approx({seed: 5 / (TEACHER_SCORE - 30.02 - 2 * seed) for seed in (0, 1, 2)})
    scratch = cell(result, "contrastive")
    assert scratch.difference is None
    assert scratch.gap == {0: 0.0, 1: 0.0, 2: 0.0}
    (table,) = result.tables
    assert table.metrics == ("retrieval.mean_r@1", "zero_shot.top1")
    assert [row.is_reference for row in table.rows] == [True, False, False]
    assert [row.cells["retrieval.mean_r@1"].summary.mean for row in table.teachers] == [TEACHER_SCORE]
    assert table.rows[0].costs["s/step"].mean == 2.0


def test_named_metrics_and_their_direction(recipe: Path, fake: FakeRun, tmp_path: Path) -> None:
    metrics = ["retrieval.i2t.median_rank", "retrieval.i2t.r@6"]
    shown = io.StringIO()
    result = compare(comparison(recipe, metrics=metrics), out=tmp_path / "c", console=Console(file=shown, width=200))
    remark = "The first finished run has no metric retrieval.i2t.r@6 (did you mean 'retrieval.i2t.r@5'?)."
    assert shown.getvalue().count(remark) == 1  # said once, and before the second run
    assert shown.getvalue().index(remark) < shown.getvalue().index("[2/")
    ranks = cell(result, "clip_kd", "retrieval.i2t.median_rank")
    assert (ranks.difference.mean, ranks.difference.wins) == (pytest.approx(-12.0), 2)
    assert ranks.gap[0] == pytest.approx(12 / 49.98)
    assert cell(result, "clip_kd", "retrieval.i2t.r@6").summary is None
    notes = result.tables[0].notes
    assert "No run has the metric retrieval.i2t.r@6 (did you mean 'retrieval.i2t.r@5'?)." in notes


def test_one_seed_has_no_interval_and_says_so(recipe: Path, fake: FakeRun, tmp_path: Path) -> None:
    result = compare(comparison(recipe, seeds=[7]), out=tmp_path / "c")
    assert cell(result, "clip_kd").difference.interval is None
    text = (tmp_path / "c" / "table.md").read_text()
    assert "One seed: no deviation and no interval" in text
    assert "+12.0, 1/1" in text


def test_rows_that_begin_differently_are_noted(recipe: Path, fake: FakeRun, tmp_path: Path) -> None:
    arms = {"a": ["method=contrastive"], "b": ["training.batch_size=8"], "c": {}}
    result = compare(comparison(recipe, arms=arms), out=tmp_path / "c")
    (note,) = [note for note in result.tables[0].notes if "same initialisation" in note]
    assert note.startswith("b and a differ in batch size:")


def test_outputs(recipe: Path, fake: FakeRun, tmp_path: Path) -> None:
    out = tmp_path / "c"
    result = compare(comparison(recipe, axes={"training.steps": [2, 4]}), out=out)
    stored = json.loads((out / "results.json").read_text())
    assert {run["status"] for run in stored["runs"]} == {"finished"}
    assert stored["runs"][0] | {"rows": None, "student": None} == {
        "run": result.plan.runs[0].name,
        "folder": f"runs/{result.plan.runs[0].name}",
        "row": "contrastive, steps=2",
        "arm": "contrastive",
        "axes": {"training.steps": "2"},
        "seed": 0,
        "status": "finished",
        "error": None,
        "method": "contrastive",
        "steps": 2,
        "batch_size": 16,
        "train_seconds": 4.0,
        "seconds_per_step": 2.0,
        "peak_memory_bytes": 1500 * 2**20,
        "extra_params": 70000,
        "best_step": None,
        "evaluated_on": "fake",
        "student": None,
        "teacher": None,
        "rows": None,
    }
    assert set(stored) == {"comparison", "runs", "tables", "environment"}
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert rows[0]["training.steps"] == "2"
    assert float(rows[0]["retrieval.mean_r@1"]) == pytest.approx(30.02)
    text = (out / "table.md").read_text().splitlines()
    assert text[0] == "## Exploratory, uncorrected: 2 seeds"
    assert text[2].startswith("| arm | mean R@1 | − contrastive [95 %], wins | zero-shot top1 |")
    assert "| clip_kd, steps=4 | 43.0 ± 1.4 | +12.0 (no spread in 2 seeds), 2/2 |" in "\n".join(text)
    assert len({line.count("|") for line in text if line.startswith("|")}) == 1
    assert text[2].endswith("| s/step | peak MiB | extra parameters |")
    assert any(line.endswith("| 1,500 | 70,000 |") for line in text)
    # the stored comparison is one that finds the same runs
    again = make_plan(load_comparison(out / "comparison.yaml"))
    assert [run.digest for run in again.runs] == [run.digest for run in result.plan.runs]
    console = Console(width=120, record=True, file=(out / "terminal.txt").open("w"))
    console.print(rich_table(result.tables[0]))
    console.file.close()
    shown = (out / "terminal.txt").read_text()
    for part in (
        "contrastive, steps=2 (reference)",
        "43.0 ± 1.4",
        "no spread in 2 seeds",
        "won 2/2",
        "gap closed",
        "s/step",
    ):
        assert part in shown


def test_plots(recipe: Path, drawn: FakeRun, tmp_path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is of the extra plots")
    result = compare(comparison(recipe), out=tmp_path / "c")
    names = {path.name for path in result.plots}
    stems = ("mean_r@1", "zero_shot_top1", "curve-mean_r@1")
    assert names == {f"{stem}.{suffix}" for stem in stems for suffix in ("png", "svg")}
    assert all(path.stat().st_size > 1000 for path in result.plots)


def test_without_matplotlib_everything_else_is_there(
    recipe: Path, fake: FakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "cmapkd.compare.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    result = compare(comparison(recipe), out=tmp_path / "c")
    assert result.plots == ()
    assert result.notice is not None
    assert "uv sync --inexact --extra plots" in result.notice
    assert {path.name for path in (tmp_path / "c").iterdir()} == {
        "comparison.yaml", "results.json", "results.csv", "table.md", "runs",
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ going on


def test_finished_runs_are_read_back_and_changed_ones_made_anew(recipe: Path, fake: FakeRun, tmp_path: Path) -> None:
    first = compare(comparison(recipe), out=tmp_path / "c")
    assert len(fake.calls) == 6
    more = compare(comparison(recipe, seeds=[0, 1, 2]), out=tmp_path / "c")
    assert fake.calls[6:] == [(method, 2, False) for method in METHODS]
    assert cell(more, "hinton").values.items() > cell(first, "hinton").values.items()
    compare(comparison(recipe, arms={"renamed": {"method": "hinton"}, "b": {}}), out=tmp_path / "c")
    assert len(fake.calls) == 9
    compare(comparison(recipe, seeds=[0], overrides=["optim.learning_rate=0.5"]), out=tmp_path / "c")
    assert len(fake.calls) == 12
    assert len(list((tmp_path / "c" / "runs").iterdir())) == 12


def test_a_teacher_is_measured_once(recipe: Path, fake: FakeRun, tmp_path: Path) -> None:
    settings = {"evaluation": {"templates": "simple"}}
    compare(comparison(recipe, seeds=[0], arms={"a": {}, "b": {"method": "hinton"}, "c": settings}), out=tmp_path / "c")
    own = scores(TEACHER_SCORE, params=100)
    assert fake.known_teachers[:2] == [None, own]
    assert fake.known_teachers[2] is None  # measured in another way


def test_an_interrupt_leaves_tables_and_the_same_call_goes_on(recipe: Path, fake: FakeRun, tmp_path: Path) -> None:
    def stop(config: RunConfig, out: Path) -> None:
        if config.method.name == "hinton" and config.seed == 0:
            raise Interrupted(1, out / "step-00000001")

    fake.before = stop
    with pytest.raises(Interrupted):
        compare(comparison(recipe), out=tmp_path / "c")
    stored = json.loads((tmp_path / "c" / "results.json").read_text())
    assert [run["status"] for run in stored["runs"]] == ["finished"] + 5 * ["missing"]
    assert "hinton: not finished with seeds 0, 1." in (tmp_path / "c" / "table.md").read_text()
    fake.before = lambda config, out: None
    compare(comparison(recipe), out=tmp_path / "c")
    assert fake.calls[2:] == [("hinton", 0, True), ("clip_kd", 0, False)] + [(method, 1, False) for method in METHODS]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (NonFiniteLossError("the loss is not finite at step 3"), "the loss is not finite at step 3"),
        (ValueError("does not fit"), "does not fit"),
        (RuntimeError("a defect"), "RuntimeError: a defect (trace in "),
    ],
)
def test_a_failing_arm_does_not_stop_the_others(
    recipe: Path, fake: FakeRun, tmp_path: Path, error: Exception, message: str
) -> None:
    def fail(config: RunConfig, out: Path) -> None:
        if config.method.name == "hinton" and config.seed == 1:
            raise error

    fake.before = fail
    result = compare(comparison(recipe, seeds=[0, 1, 2]), out=tmp_path / "c")
    ((name, told),) = result.failed.items()
    assert name.startswith("hinton-seed1-")
    assert told.startswith(message)
    assert len(list((tmp_path / "c" / "failures").iterdir())) == 1
    hinton = cell(result, "hinton")
    assert (hinton.summary.count, hinton.difference.seeds, hinton.difference.left_out) == (2, (0, 2), (1,))
    notes = "\n".join(result.tables[0].notes)
    assert f"hinton, seed 1 failed: {message}" in notes
    assert "hinton: seed 1 left out of the difference" in notes
    assert "| hinton (1 failed) |" in (tmp_path / "c" / "table.md").read_text()
    fake.before = lambda config, out: None
    again = compare(comparison(recipe, seeds=[0, 1, 2]), out=tmp_path / "c")
    assert fake.calls[9:] == [("hinton", 1, True)]
    assert not again.failed
    assert not list((tmp_path / "c" / "failures").iterdir())


def test_a_run_folder_that_was_edited_is_not_believed(recipe: Path, fake: FakeRun, tmp_path: Path) -> None:
    first = compare(comparison(recipe, seeds=[0]), out=tmp_path / "c")
    stored = tmp_path / "c" / "runs" / first.plan.runs[0].name / "config.yaml"
    stored.write_text(stored.read_text().replace("steps: 2", "steps: 3"))
    result = compare(comparison(recipe, seeds=[0]), out=tmp_path / "c")
    assert list(result.failed) == [first.plan.runs[0].name]
    assert "was changed after its run" in next(iter(result.failed.values()))


# ------------------------------------------------------------------------------------------------ the whole path


def test_a_real_comparison(recipe: Path, tmp_path: Path) -> None:
    values = comparison(
        recipe,
        arms={name: METHODS[name] for name in ("contrastive", "clip_kd")},
        evaluate={"other": "scenes@test?length=12&size=32"},
        metrics=["retrieval.mean_r@1", "other.retrieval.mean_r@1"],
    )
    result = compare(values, out=tmp_path / "c")
    assert not result.failed
    runs = {(run.config.method.name, run.config.seed): result.outcomes[run.digest].folder for run in result.plan.runs}
    assert len(runs) == 4
    lines = {key: json.loads((folder / "metrics.jsonl").read_text().splitlines()[0]) for key, folder in runs.items()}
    for seed in (0, 1):  # same initialisation and same first batch: the same contrastive loss before the first step
        assert lines["contrastive", seed]["terms/contrastive"] == lines["clip_kd", seed]["terms/contrastive"]
    assert lines["clip_kd", 0]["terms/contrastive"] != lines["clip_kd", 1]["terms/contrastive"]
    found = cell(result, "clip_kd", "other.retrieval.mean_r@1")
    assert set(found.values) == set(found.difference.seeds) == {0, 1}
    for path in ("retrieval.mean_r@1", "other.retrieval.mean_r@1"):  # the ranks that the runs kept give their scores
        two_way, difference = cell(result, "clip_kd", path).two_way, cell(result, "clip_kd", path).difference
        if two_way is None:  # not one hit of six samples differs
            assert difference.spreadless
        else:
            assert two_way.mean == pytest.approx(difference.mean)
    table = PictureTable(tmp_path / "c" / "pictures.csv")
    for run in result.plan.runs:
        for data, student in (("", "retrieval"), ("other", "other")):
            kept = [table.scores(run.name, data, measure)[1].mean for measure in ("i2t.r@1", "t2i.r@1")]
            scores = result.outcomes[run.digest].metrics["student"][student]
            scores = scores.get("retrieval", scores)
            assert kept == pytest.approx([scores["i2t"]["r@1"], scores["t2i"]["r@1"]], abs=0.02)
    (teacher,) = result.tables[0].teachers
    assert set(teacher.cells["other.retrieval.mean_r@1"].values) == {-1}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c" / "runs").rglob("*")}
    again = compare(values, out=tmp_path / "c")
    assert again.tables == result.tables
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "c" / "runs").rglob("*")} == before


def test_a_teacher_that_its_run_could_not_score_is_not_scored_on_further_data(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "build_teacher", lambda config: pytest.fail("it was built"))
    plan = make_plan(comparison(recipe, arms={"hinton": METHODS["hinton"]}, evaluate={"other": "scenes?length=2"}))
    outcomes = {run.digest: Outcome(tmp_path, "finished", {"teacher": None}) for run in plan.runs}
    assert execute._score_teachers(plan, outcomes, {"other": MemorySource()}, tmp_path / "teachers.json") == {}


# ------------------------------------------------------------------------------------------------ refusals, command


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"refrence": "a"}, r"refrence: unknown key \(did you mean 'reference'\?\)"),
        ({"tables": {"T": {"arm": {}}}}, r"tables\.T\.arm: unknown key \(did you mean 'arms'\?\)"),
        ({"tables": {"T": {"arms": ["hintn"]}}}, r"table 'T': there is no arm 'hintn' \(did you mean 'hinton'\?\)"),
        ({"arms": {}}, "there is nothing to compare"),
        ({"arms": {"a": 3}}, "arm 'a' must be a mapping of settings or a list of key=value, got 3"),
        ({"seeds": [1, 1]}, "each once; got 1, 1"),
        ({"seeds": []}, "seeds"),
        ({"axes": {"training.steps": 3}}, "must be a list of values or a mapping label: value, got 3"),
        ({"axes": {"training.steps": [3, 3]}}, "3 stands there twice"),
        ({"evaluate": {"retrieval": "scenes"}}, "'retrieval' cannot name a test set"),
    ],
)
def test_mistakes_in_a_comparison(change: dict[str, Any], message: str, recipe: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        comparison(recipe, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": {"a": ["optim.learning_rat=1"], "b": ["method=clip_dk"]}}, "2 problems in the arms"),
        ({"arms": {"a": ["optim.learning_rat=1"]}}, r"a: optim\.learning_rat: unknown key \(did you mean"),
        (
            {"arms": {name: ["optim.learning_rat=1"] for name in "abcde"}},
            r"1 problem in .*\n  a; b; c and 2 more rows: optim",
        ),
        ({"arms": {"a": ["seed=1"]}}, "arm 'a': a comparison sets seed itself: list the seeds in `seeds`"),
        ({"overrides": ["baseline=none"]}, "overrides: a comparison sets baseline itself"),
        ({"axes": {"training.stepz": [1]}}, r"training\.stepz: unknown key"),
        ({"base": "demoo"}, r"there is no recipe 'demoo' \(did you mean 'demo'\?\)"),
        ({"reference": "clip_dk"}, r"reference of this comparison: there is no 'clip_dk'"),
        ({"evaluate": {"ood": "scens"}}, "no kind of data 'scens'"),
    ],
)
def test_mistakes_show_before_the_first_run(
    change: dict[str, Any], message: str, recipe: Path, fake: FakeRun, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        compare(comparison(recipe, **change), out=tmp_path / "c")
    assert not fake.calls
    assert not (tmp_path / "c").exists()


def test_settings_of_all_arms_reach_those_that_name_a_method_or_a_student_anew(recipe: Path) -> None:
    arms = {"kd": {}, "hinton": {"method": "hinton"}, "own": {"method": "hinton", "method.task_weight": 3.0}}
    overrides = ["method.task_weight=2", "student.options.embed_dim=8"]
    plan = make_plan(
        comparison(recipe, arms=arms, overrides=overrides, axes={"student": {"a": "tiny:debug", "b": "tiny:small"}})
    )
    weights = {row.label: row.config.method.task_weight for row in plan.tables[0].rows}  # type: ignore[attr-defined]
    assert weights == {"kd, a": 2, "kd, b": 2, "hinton, a": 2, "hinton, b": 2, "own, a": 3, "own, b": 3}
    assert {row.config.student.options["embed_dim"] for row in plan.tables[0].rows} == {8}
    assert not list(plan.remarks())


def test_a_setting_that_an_arm_has_not_is_said_and_one_that_no_arm_has_is_refused(recipe: Path) -> None:
    arms = {"kd": {}, "scratch": {"method": "contrastive"}, "other": {"method": "hinton"}}
    plan = make_plan(comparison(recipe, arms=arms, overrides=["method.feature_weight=2"]))
    (remark,) = plan.remarks()
    assert remark == ("method.feature_weight=2 does not reach scratch and other: the method there has no such setting.")
    arms.pop("kd")
    with pytest.raises(ConfigError, match=r"method\.task_wieght=2 reaches no arm: .*did you mean 'task_weight'"):
        make_plan(comparison(recipe, arms=arms, overrides=["method.task_wieght=2"]))


def test_a_method_that_all_arms_are_given_drops_what_was_set_for_another_before(recipe: Path) -> None:
    plan = make_plan(comparison(recipe, arms={"a": {}}, overrides=["method.feature_weight=2", "method=contrastive"]))
    assert plan.tables[0].rows[0].config.method.name == "contrastive"


def test_several_processes_are_refused(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="a comparison is one process"):
        compare(comparison(recipe), out=tmp_path / "c")


def test_arms_and_axes_as_text() -> None:
    assert parse_arm("no gram: method.a=0 method.b='x y'") == ("no gram", ["method.a=0", "method.b=x y"])
    assert parse_arm("base:") == ("base", [])
    for wrong in ("method=hinton", ": a=1", "alone"):
        with pytest.raises(ConfigError, match="is not 'name: key=value"):
            parse_arm(wrong)
    assert parse_axis("optim.learning_rate=1e-3,0.01") == ("optim.learning_rate", {"1e-3": 0.001, "0.01": 0.01})
    assert parse_axis("optim.betas=[0.9,0.95],[0.9,0.98]") == (
        "optim.betas", {"[0.9,0.95]": [0.9, 0.95], "[0.9,0.98]": [0.9, 0.98]},
    )  # fmt: skip
    for wrong in ("training.steps", "training.steps=", "=1,2", "a=1,,2"):
        with pytest.raises(ConfigError, match="is not key=value,value"):
            parse_axis(wrong)
    with pytest.raises(ConfigError, match="1 stands there twice"):
        parse_axis("a=1,1")


def test_options_take_several_values() -> None:
    given = ["demo", "--seeds", "0", "1", "2", "a=1", "--arms", "x: m=1", "y:", "b=3", "--out", "5"]
    assert spread(given) == [
        "demo", "--seeds", "0", "--seeds", "1", "--seeds", "2", "a=1", "--arms", "x: m=1", "--arms", "y:", "b=3",
        "--out", "5",
    ]  # fmt: skip


def test_a_file_is_extended_by_the_command_line(recipe: Path) -> None:
    file = recipe.parent / "comparison.yaml"
    file.write_text("base: mine.yaml\nseeds: [0]\narms: {a: {method: hinton}}\noverrides: [training.steps=3]\n")
    found = load_comparison(file, overrides=["training.steps=4"], arms=["b:"], axes=["seed_=1"], seeds=[4, 5])
    assert found.base == str(recipe.resolve())
    assert (found.overrides, found.seeds) == (("training.steps=3", "training.steps=4"), (4, 5))
    assert set(found.arms) == {"a", "b"}
    assert set(found.axes) == {"seed_"}
    assert load_comparison(recipe, axes=["method=hinton,clip_kd"]).base == str(recipe)
    with pytest.raises(ConfigError, match=r"no comparison file or recipe 'demoo' \(did you mean 'demo'\?\)"):
        load_comparison("demoo")
    with pytest.raises(ConfigError, match="there is no packaged comparison 'nothing'"):
        load_comparison(packaged="nothing")
    file.write_text("base: ${oc.env:HOME}\narms: {a: {}}\n")
    with pytest.raises(ConfigError, match="configs are plain data"):
        load_comparison(file)


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


def test_arms_that_come_to_the_same_runs_are_remarked_on(cli: Any, recipe: Path, fake: FakeRun, tmp_path: Path) -> None:
    arms = ("--arms", "a:", "b: training.steps=2", "c: training.steps=4")
    words = (str(recipe), "training.steps=2", *arms, "--seeds", "0", "1")
    remark = "a and b are the same: their settings come to one config."
    assert remark in cli(*words, "--dry-run")[1]
    assert cli(*words, "--out", str(tmp_path / "c"))[1].startswith(remark)
    assert remark in (tmp_path / "c" / "table.md").read_text()


def test_the_command(cli: Any, recipe: Path, fake: FakeRun, tmp_path: Path) -> None:
    out = tmp_path / "c"
    words = (str(recipe), "training.steps=4", "--axis", "method=contrastive,hinton", "--seeds", "0", "1", "2")
    code, printed, errors = cli(*words, "--dry-run")
    assert (code, fake.calls) == (0, []), errors
    assert "2 rows x 3 seeds in 1 table: 6 different runs, 6 to do" in printed
    code, printed, errors = cli(*words, "--out", str(out))
    assert code == 0, errors
    assert len(fake.calls) == 6
    assert "[6/6] hinton-seed2-" in printed
    assert "contrastive (reference)" in printed
    files, page = printed.splitlines()[-2:]
    assert f"{out}: table.md, results.csv, results.json" in files
    assert page == f"report: {out / 'report.html'}"
    assert "6 different runs, 0 to do" in cli(*words, "--out", str(out), "--dry-run")[1]

    def fail(config: RunConfig, out: Path) -> None:
        raise ValueError("too small")

    fake.before = fail
    code, printed, _ = cli(*words, "optim.learning_rate=1", "--out", str(out))
    assert code == 1
    assert "6 of 6 runs failed; the same command tries them again" in printed

    def stop(config: RunConfig, out: Path) -> None:
        raise Interrupted(1, out / "step-00000001")

    fake.before = stop
    code, printed, _ = cli(*words, "optim.learning_rate=2", "--out", str(out))
    assert code == 130
    assert f"cmapkd compare {out / 'comparison.yaml'} --out {out}" in printed


def test_mistakes_of_the_command(cli: Any, recipe: Path) -> None:
    for words, message in (
        ((str(recipe), "--axis", "method=hinton"), "name the folder of the comparison: --out DIR"),
        (("--dry-run",), "name a comparison file or a recipe"),
        ((str(recipe), "--dry-run"), "there is nothing to compare"),
        (("a=1", "--ablation", "nothing", "--dry-run"), "there is no packaged comparison 'nothing'"),
    ):
        code, _, errors = cli(*words)
        assert code == 2
        assert message in errors

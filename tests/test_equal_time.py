"""Equal time: which steps fit, how seconds a step are measured, kept and given, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from cmapkd.cli import main
from cmapkd.compare import ComparisonConfig, compare, load_comparison, make_plan, prepare
from cmapkd.compare.equal_time import WINDOW, Seconds, key_of, measuring_config
from cmapkd.compare.seconds import BUSY, measure_all, read_seconds, seconds_a_step, waited_share, waiting_clock
from cmapkd.config import ConfigError
from cmapkd.results import RunResult
from cmapkd.run import RunConfig
from compare_support import leave_figures_blank, write_recipe

COST = {"contrastive": 0.1, "hinton": 0.15, "clip_kd": 0.3}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of forty small steps with a teacher on disk."""
    return write_recipe(tmp_path_factory.mktemp("timed_recipe"))


def comparison(recipe: Path, equal_time: dict[str, Any] | None = None, **changes: Any) -> ComparisonConfig:
    arms = {"scratch": {"method": "contrastive"}, "hinton": {"method": "hinton"}, "kd": {}}
    block = {"to": "kd"} | (equal_time or {})
    return ComparisonConfig.from_mapping(
        {"base": str(recipe), "seeds": [0, 1], "arms": arms, "equal_time": block} | changes
    )


class FakeRun:
    """Stands for `run`: its log says that a step takes what `COST` says, but for a slow beginning."""

    def __init__(self) -> None:
        self.calls: list[RunConfig] = []

    def __call__(self, config: RunConfig, *, out: Path, resume: bool = False, **_: Any) -> RunResult:
        self.calls.append(config)
        out.mkdir(parents=True, exist_ok=resume)
        (out / "config.yaml").write_text(yaml.safe_dump(config.plain(), sort_keys=False))
        steps, lines = config.training.steps or 0, []
        for step in range(WINDOW, steps + 1, WINDOW):
            seconds = COST[config.method.name] * (10 if step <= 10 else 1)
            lines.append({"step": step, "terms/a": 1.0, "pairs_per_second": config.training.batch_size / seconds})
        (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        scores = {"retrieval": {"mean_r@1": 1.0 + steps / 1000}, "params": 10}
        metrics: dict[str, Any] = {"teacher": None, "student": scores, "steps": steps}
        (out / "metrics.json").write_text(json.dumps(metrics))
        return RunResult(out, metrics)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    fake = FakeRun()
    monkeypatch.setattr("cmapkd.compare.execute.run", fake)
    monkeypatch.setattr("cmapkd.compare.seconds.run", fake)
    monkeypatch.setattr("cmapkd.compare.seconds.waiting_clock", lambda: None)
    monkeypatch.setattr("gc.collect", lambda: 0)
    leave_figures_blank(monkeypatch)
    return fake


# ------------------------------------------------------------------------------------------------ steps that fit


def test_every_arm_stands_at_equal_steps_and_at_equal_time(recipe: Path) -> None:
    seconds = {"kd": 0.3, "hinton": 0.2, "scratch": 0.07}
    plan = make_plan(comparison(recipe, {"seconds": seconds}, axes={"training.steps": [20, 40]}))
    (table,) = plan.tables
    steps = {row.label: row.config.training.steps for row in table.rows}
    assert steps == {
        "scratch, steps=20, equal steps": 20,
        "scratch, steps=20, equal time": 86,  # 20 x 0.3 / 0.07 = 85.7
        "scratch, steps=40, equal steps": 40,
        "scratch, steps=40, equal time": 171,
        "hinton, steps=20, equal steps": 20,
        "hinton, steps=20, equal time": 30,
        "hinton, steps=40, equal steps": 40,
        "hinton, steps=40, equal time": 60,
        "kd, steps=20, equal steps": 20,
        "kd, steps=20, equal time": 20,
        "kd, steps=40, equal steps": 40,
        "kd, steps=40, equal time": 40,
    }
    assert len(plan.runs) == (4 + 4 + 2) * 2  # the clock's own rows are one run
    # each row is compared with the row of its own budget
    labels = [row.label for row in table.rows]
    compared = {labels[place]: labels[other] for place, other in enumerate(table.reference) if other is not None}
    assert compared["kd, steps=20, equal time"] == "scratch, steps=20, equal time"
    (note,) = plan.remarks()
    assert "evaluations, checkpoints and the building of caches are not counted" in note
    assert "hinton, steps=40 0.2 s/step, 60 steps" in note
    assert "as given" in note


def test_a_reference_may_be_a_row_at_equal_time(recipe: Path) -> None:
    config = comparison(recipe, reference="kd, equal time")
    assert set(make_plan(config).tables[0].reference) == {5}


def test_a_schedule_ends_at_the_steps_that_fit(recipe: Path) -> None:
    plan = make_plan(comparison(recipe, {"seconds": {"kd": 0.3, "hinton": 0.2, "scratch": 0.1}}))
    row = next(row for row in plan.tables[0].rows if row.label == "hinton, equal time")
    for seed, run in row.runs.items():
        assert (run.config.seed, run.config.training.steps, run.config.optim.schedule) == (seed, 60, "cosine")
        assert run.name == f"hinton-equal_time-seed{seed}-{run.digest}"


# ------------------------------------------------------------------------------------------------ seconds a step


def test_seconds_a_step_by_hand() -> None:
    def line(step: int, seconds: float, *terms: str) -> dict[str, Any]:
        return {"step": step, "pairs_per_second": 8 / seconds} | {f"terms/{term}": 1.0 for term in terms}

    one = [line(5, 9.0, "a"), line(10, 1.0, "a"), line(15, 2.0, "a"), line(20, 4.0, "a")]
    assert seconds_a_step(one, warmup=5, batch_size=8) == pytest.approx(2.0)
    # two stages: a quarter of the run at 9 s, of which the warm-up leaves nothing over, three quarters at 2 s
    two = [line(5, 9.0, "hint"), *one[1:]]
    assert seconds_a_step(two, warmup=5, batch_size=8) == pytest.approx(0.25 * 9 + 0.75 * 2)


def test_what_a_measuring_run_is(recipe: Path) -> None:
    plan = make_plan(comparison(recipe))
    config = plan.tables[0].rows[-1].config
    short = measuring_config(config, steps=80)
    assert (short.training.steps, short.training.log_every, short.training.checkpoint_every) == (80, WINDOW, 80)
    assert (short.data.final, short.training.evaluate_every) == (None, None)
    assert RunConfig.from_mapping(short.plain()) == short
    settings = comparison(recipe).equal_time
    assert settings is not None
    other = config.model_copy(update={"optim": config.optim.model_copy(update={"learning_rate": 1.0}), "seed": 5})
    longer = other.model_copy(update={"training": other.training.model_copy(update={"steps": 3})})
    assert key_of(config, settings) == key_of(longer, settings)
    bigger = other.model_copy(update={"training": other.training.model_copy(update={"batch_size": 8})})
    assert key_of(config, settings) != key_of(bigger, settings)


def test_arms_are_measured_once_and_the_seconds_are_kept(recipe: Path, fake: FakeRun, tmp_path: Path) -> None:
    result = compare(comparison(recipe, axes={"training.steps": [20, 40]}), out=tmp_path / "c")
    short = [config for config in fake.calls if config.data.val is None]
    assert {config.method.name: config.training.steps for config in short} == dict.fromkeys(COST, 60 + 10)
    assert len(short) == 3  # not once for each number of steps
    rows = {row.label: row.config.training.steps for row in result.plan.tables[0].rows}
    assert rows["scratch, steps=40, equal time"] == 120
    assert rows["hinton, steps=20, equal time"] == 40
    text = (tmp_path / "c" / "table.md").read_text()
    assert "measured alone, after a warm-up" in text
    assert "hinton, steps=20 0.15 s/step, 40 steps" in text
    assert "BUSY" not in text
    kept = json.loads((tmp_path / "c" / "seconds.json").read_text())
    assert {entry["row"]: entry["seconds"] for entry in kept["measured"].values()} == pytest.approx(
        {"scratch, steps=20": 0.1, "hinton, steps=20": 0.15, "kd, steps=20": 0.3}
    )
    assert {entry["warmup_steps"] for entry in kept["measured"].values()} == {10}
    assert not (tmp_path / "c" / "seconds").exists()
    calls = len(fake.calls)
    again = compare(load_comparison(tmp_path / "c" / "comparison.yaml"), out=tmp_path / "c")
    assert len(fake.calls) == calls
    assert again.tables == result.tables


def test_seconds_of_another_folder(recipe: Path, fake: FakeRun, tmp_path: Path) -> None:
    there = compare(comparison(recipe), out=tmp_path / "c")
    file = str(tmp_path / "c" / "seconds.json")
    here = compare(comparison(recipe, {"seconds": file}), out=tmp_path / "d")
    assert [run.digest for run in here.plan.runs] == [run.digest for run in there.plan.runs]
    assert sum(config.data.val is None for config in fake.calls) == 3
    assert json.loads((tmp_path / "d" / "seconds.json").read_text())["measured"]
    assert load_comparison(tmp_path / "d" / "comparison.yaml").equal_time.seconds == str(  # type: ignore[union-attr]
        tmp_path / "d" / "seconds.json"
    )
    with pytest.raises(ConfigError, match=r"has no seconds a step of scratch; hinton; kd: they are of other settings"):
        compare(comparison(recipe, {"seconds": file, "measure_steps": 80}), out=tmp_path / "e")
    with pytest.raises(ConfigError, match=r"there is no .*nothing.json: name a comparison's seconds.json"):
        compare(comparison(recipe, {"seconds": str(tmp_path / "nothing.json")}), out=tmp_path / "e")
    (tmp_path / "bad.json").write_text('{"measured": {"a": {"row": "a", "seconds": 0}}}')
    with pytest.raises(ConfigError, match=r"bad\.json is no seconds\.json of a comparison"):
        compare(comparison(recipe, {"seconds": str(tmp_path / "bad.json")}), out=tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_a_busy_machine_is_measured_again_and_said_loudly(
    recipe: Path, fake: FakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks = iter([(0, 0), (100, 30), (0, 0), (100, 20), (0, 0), (100, 40)] + [(0, 0), (100, 1)] * 2)
    monkeypatch.setattr("cmapkd.compare.seconds.waiting_clock", lambda: next(clocks))
    result = compare(comparison(recipe), out=tmp_path / "c")
    kept = json.loads((tmp_path / "c" / "seconds.json").read_text())["measured"]
    assert {entry["row"]: (entry["busy"], round(entry["waited"], 3)) for entry in kept.values()} == {
        "scratch": (True, round(20 / 120, 3)),  # the calmest of three
        "hinton": (False, round(1 / 101, 3)),
        "kd": (False, round(1 / 101, 3)),
    }
    assert any(note.startswith("THE MACHINE WAS BUSY while scratch was measured") for note in result.tables[0].notes)


@pytest.mark.skipif(not Path("/proc/self/schedstat").is_file(), reason="the kernel keeps no statistics of waiting")
def test_a_process_that_shares_its_processor_waits() -> None:
    before_all = os.sched_getaffinity(0)
    core = min(before_all)
    os.sched_setaffinity(0, {core})
    noise = subprocess.Popen(
        [sys.executable, "-c", "print('here', flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
    )
    try:
        assert noise.stdout is not None
        noise.stdout.readline()
        before, end = waiting_clock(), time.perf_counter() + 1.0
        while time.perf_counter() < end:
            pass
        told = waited_share(before, waiting_clock())
    finally:
        noise.kill()
        noise.communicate()
        os.sched_setaffinity(0, before_all)
    assert told is not None
    assert told > 4 * BUSY


def test_waiting_by_hand(tmp_path: Path) -> None:
    assert waited_share((100, 10), (200, 110)) == 0.5
    assert waited_share((100, 10), (100, 10)) == 0.0
    assert waited_share(None, (1, 1)) is None
    clock = waiting_clock()
    assert clock is None or clock[0] > 0


# ------------------------------------------------------------------------------------------------ refusals, command


@pytest.mark.parametrize(
    ("equal_time", "changes", "message"),
    [
        ({"to": "kdd"}, {}, r"equal_time\.to: a table has no arm 'kdd' \(did you mean 'kd'\?\); its arms: scratch"),
        ({}, {"arms": {}, "axes": {"method": ["hinton", "clip_kd"]}}, "a table has no arm 'kd'; its arms: none"),
        ({}, {"overrides": ["training.steps=null", "training.epochs=1"]}, "scratch has none: give it training.steps"),
        ({"seconds": {"kd": 0.1}}, {}, "equal_time.seconds has none of arm 'scratch'"),
        ({"seconds": {"kd": 0.0}}, {}, "seconds a step are above 0; got kd: 0"),
        ({"measure_steps": 3}, {}, ">= 20"),
        ({"too": "kd"}, {}, r"equal_time\.too: unknown key \(did you mean 'to'\?\)"),
    ],
)
def test_mistakes(
    equal_time: dict[str, Any], changes: dict[str, Any], message: str, recipe: Path, fake: FakeRun, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        compare(comparison(recipe, equal_time, **changes), out=tmp_path / "c")
    assert not fake.calls
    assert not (tmp_path / "c").exists()


def test_dry_run(
    recipe: Path, fake: FakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(comparison(recipe).plain(), sort_keys=False))
    monkeypatch.setattr(sys, "argv", ["cmapkd", "compare", str(file), "--dry-run", "--out", str(tmp_path / "c")])
    with pytest.raises(SystemExit):
        main()
    assert "scratch; hinton; kd: to be measured; runs at equal time" in capsys.readouterr().out
    assert not fake.calls
    compare(load_comparison(file), out=tmp_path / "c")
    with pytest.raises(SystemExit):
        main()
    printed = capsys.readouterr().out
    assert "to be measured" not in printed
    assert printed.count("finished  hinton-equal_time-seed") == 2


def test_tune_only_measures_what_tuning_chose(recipe: Path, fake: FakeRun, tmp_path: Path) -> None:
    families = {"kd": {"space": {"method.task_weight": [0.5, 2.0]}}}
    tuning = {"trials": 2, "seeds": [9], "families": families}
    config = comparison(recipe, tuning=tuning, overrides=["data.test=scenes@test?length=20&size=32"])
    plan = prepare(config, out=tmp_path / "c")
    assert {path.name for path in (tmp_path / "c").iterdir()} == {
        "comparison.yaml", "runs", "tuning.csv", "tuning.json", "tuned.yaml", "seconds.json",
    }  # fmt: skip
    short = [config for config in fake.calls if config.data.val is None]
    assert len(short) == 3
    assert len(fake.calls) == 3 + 2
    assert {row.config.training.steps for row in plan.tables[0].rows} == {40, 80, 120}
    notes = "\n".join(plan.remarks())
    assert "kd: 2 trials of 40 steps; best:" in notes
    assert "kd 0.3 s/step, 40 steps" in notes


def test_a_real_measurement(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmapkd.compare.seconds.BUSY", 1.0)  # a busy machine would be measured three times
    arms = {"scratch": {"method": "contrastive"}, "kd": {}}
    config = comparison(recipe, {"measure_steps": 20, "warmup_steps": 5}, seeds=[0], arms=arms)
    plan = make_plan(config)
    assert config.equal_time is not None
    seconds = measure_all(plan, config.equal_time, tmp_path, None)
    found, missing = read_seconds(plan, config.equal_time, tmp_path)
    assert (found, missing) == (seconds, {})
    assert seconds.measured is not None
    for entry in seconds.measured.values():
        assert 0 < entry["seconds"] < 5
        assert (entry["steps"], entry["warmup_steps"]) == (20, 5)
    timed = make_plan(config, None, seconds)
    assert isinstance(seconds, Seconds)
    steps = {row.label: row.config.training.steps for row in timed.tables[0].rows}
    by_row = {entry["row"]: entry["seconds"] for entry in seconds.measured.values()}
    assert steps["scratch, equal time"] == round(40 * by_row["kd"] / by_row["scratch"])

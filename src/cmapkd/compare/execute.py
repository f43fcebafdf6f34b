"""`compare`: carries a plan out run by run, resumes what was begun, and leaves tables, data and plots."""

from __future__ import annotations

import gc
import json
import os
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from cmapkd.compare.clock import EqualTimeConfig
from cmapkd.compare.config import ComparisonConfig
from cmapkd.compare.equal_time import Seconds
from cmapkd.compare.left import TimeLeft
from cmapkd.compare.outcome import Outcome
from cmapkd.compare.pictures import ranks_name
from cmapkd.compare.plan import Plan, make_plan
from cmapkd.compare.resolve import Resolver
from cmapkd.compare.rows import PlannedRun, begun_with, config_digest
from cmapkd.compare.search import Trials, check_winners, search
from cmapkd.compare.seconds import FILE, measure_all, read_seconds, write_seconds
from cmapkd.compare.summary import summarize_tables, teacher_key, unknown_metrics
from cmapkd.compare.tables import TableSummary
from cmapkd.compare.trials import plan_trials
from cmapkd.compare.tuning import TuningConfig
from cmapkd.compare.winners import Tuned, read_tuned, write_tuned
from cmapkd.compare.write import write_json, write_outputs
from cmapkd.config import ConfigError, RunStopped, closest, printable, refuse_secrets, writing
from cmapkd.config.disk import write_text
from cmapkd.data.open import open_source
from cmapkd.data.types import Source
from cmapkd.models import Model, build_teacher, load_model
from cmapkd.results import RunResult, Scores, is_finished
from cmapkd.run import RunConfig, reference_of, run, scores_of
from cmapkd.training import Interrupted, NonFiniteLossError

EVALUATIONS = "evaluations.json"  # in a run folder: scores on the comparison's further test data


@dataclass(frozen=True, slots=True)
class ComparisonResult:
    """All runs by digest, and the tables made of them."""

    folder: Path
    plan: Plan
    outcomes: dict[str, Outcome]
    tables: tuple[TableSummary, ...]
    plots: tuple[Path, ...]
    notice: str | None  # why there are no plots

    @property
    def failed(self) -> dict[str, str]:
        """Name -> message of the runs that failed."""
        names = {run.digest: run.name for run in self.plan.runs}
        return {names[digest]: str(end.error) for digest, end in self.outcomes.items() if end.status == "failed"}


def compare(comparison: ComparisonConfig, *, out: str | Path, console: Console | None = None) -> ComparisonResult:
    """Tunes arms where the comparison says so, runs what is not yet finished, and leaves tables of all that is.

    Args:
        out: folder of the comparison. Finished runs in it are read back, begun ones go on, failed ones are tried
            again; a run is found by its whole config, so a changed one never takes another's place.
        console: where progress is shown; none for silence.
    Returns:
        The tables; `failed` names the runs that ended in an error, which does not stop the others.
    Raises:
        ConfigError: something in the comparison is wrong; nothing was run.
        Interrupted, KeyboardInterrupt: asked to stop. The run under way was saved, the outputs hold what is finished.
    """
    out = Path(out)
    sources = {name: open_source(spec, split="test") for name, spec in comparison.evaluate.items()}
    plan = prepare(comparison, out=out, console=console)
    if console is not None:
        for remark in plan.remarks():
            console.print(remark, markup=False, highlight=False)
    outcomes = {planned.digest: Outcome(plan.folder(planned, out)) for planned in plan.runs}
    left = TimeLeft()
    looked = False  # whether a finished run was looked through for the metrics that the tables name
    try:
        for number, planned in enumerate(plan.runs, 1):
            state = plan.state(planned, out)
            if console is not None:
                doing = {"finished": "read back", "begun": "going on", "new": "starting"}[state]
                todo = [each for each in plan.runs[number - 1 :] if plan.state(each, out) != "finished"]
                told = "" if state == "finished" else left.said(todo)
                head = f"[{number}/{len(plan.runs)}] {planned.name}: {doing}{told}"
                console.print(head, markup=False, highlight=False, soft_wrap=True)
            known, started = _known_teacher(planned, plan.runs, outcomes), time.monotonic()
            before = outcomes[planned.after.digest] if planned.after is not None else None
            folder = plan.folder(planned, out)
            outcome = _carry_out(planned, folder, comparison.evaluate, sources, console, known, before)
            outcomes[planned.digest] = outcome
            if outcome.status == "finished":
                trained = float(outcome.metrics.get("train_seconds") or 0.0)  # of all its sittings
                took = time.monotonic() - started if state == "new" else trained
                left.finished(planned, took, int(outcome.metrics.get("steps") or 0))
            if state != "finished":
                gc.collect()  # a trainer is full of circles: its memory would otherwise last into the next run
            if console is not None and outcome.error is not None:
                console.print(printable(f"failed: {outcome.error}"), markup=False, highlight=False, soft_wrap=True)
            if console is not None and outcome.status == "finished" and not looked:
                looked = True
                for remark in unknown_metrics(plan, outcome.metrics):
                    console.print(printable(remark), markup=False, highlight=False, soft_wrap=True)
        teachers = _score_teachers(plan, outcomes, sources, out / "teachers.json")
    except BaseException:
        _finish(plan, outcomes, {}, out)
        raise
    return _finish(plan, outcomes, teachers, out)


def prepare(comparison: ComparisonConfig, *, out: str | Path, console: Console | None = None) -> Plan:
    """Chooses the settings of tuned arms and measures seconds a step, where the comparison asks for them.

    Args:
        out: folder of the comparison, where tuned.yaml and seconds.json are left and read back.
    Returns:
        The runs of the comparison. It names files that it was given by their copies in `out`.
    Raises:
        ConfigError, RunStopped, Interrupted, KeyboardInterrupt: as `tune` and a run do.
    """
    out = Path(out)
    make_plan(comparison)
    tuned: Tuned | None = None
    if comparison.tuning is not None:
        comparison, tuned = _tuned(comparison, comparison.tuning, out, console)
    plan, seconds = make_plan(comparison, tuned), None
    if comparison.equal_time is not None:
        comparison, seconds = _timed(comparison, comparison.equal_time, plan, out, console)
    _make_folder(comparison, out)
    if tuned is not None:
        write_tuned(out / "tuned.yaml", tuned)
    return make_plan(comparison, tuned, seconds)


def _make_folder(comparison: ComparisonConfig, out: Path) -> None:
    """Makes the folder, with the comparison in it.

    Raises:
        ConfigError: a secret in the comparison, or one of several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "a comparison is one process that starts one run after the other. For runs of several processes, start "
            "each with torchrun -m cmapkd distill, its arm's settings, seed=K baseline=none and --out DIR/runs/NAME, "
            "by the names that compare --dry-run lists; compare then reads them back"
        )
    refuse_secrets(comparison.plain(), where="comparison")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(comparison.plain(), sort_keys=False, allow_unicode=True)
    write_text(out / "comparison.yaml", text)


# ------------------------------------------------------------------------------------------------ tuning


def _tuned(
    comparison: ComparisonConfig, tuning: TuningConfig, out: Path, console: Console | None
) -> tuple[ComparisonConfig, Tuned]:
    """The winners, given or found now; and the comparison, which names a given file by the copy in its folder."""
    if tuning.winners is None:
        found = tune(comparison, out=out, console=console)
        assert found is not None  # every family was tuned
        return comparison, found
    tuned = read_tuned(Path(tuning.winners), asked=tuning)
    check_winners(tuned, comparison)
    return comparison.model_copy(update={"tuning": tuning.model_copy(update={"winners": "tuned.yaml"})}), tuned


def _timed(
    comparison: ComparisonConfig, equal_time: EqualTimeConfig, plan: Plan, out: Path, console: Console | None
) -> tuple[ComparisonConfig, Seconds]:
    """The seconds a step, given or measured now; and the comparison, which names a given file by its copy."""
    if not isinstance(equal_time.seconds, str):
        _make_folder(comparison, out)
        return comparison, measure_all(plan, equal_time, out, console)
    seconds, _ = read_seconds(plan, equal_time, out)
    _make_folder(comparison, out)
    write_seconds(out, seconds.measured or {})
    return comparison.model_copy(update={"equal_time": equal_time.model_copy(update={"seconds": FILE})}), seconds


def tune(
    comparison: ComparisonConfig, *, out: str | Path, console: Console | None = None, families: Sequence[str] = ()
) -> Tuned | None:
    """Runs the trials of a comparison's tuning, reading back those that are finished, and chooses the winners.

    Args:
        out: folder of the comparison, where tuning.json, tuning.csv and, when every family has a winner, tuned.yaml
            are left.
        families: these alone; none: all.
    Returns:
        The winners; None while other families have none.
    Raises:
        ConfigError: something in the comparison is wrong; nothing was run.
        RunStopped: all trials of a family were lost.
        Interrupted, KeyboardInterrupt: asked to stop; the same call goes on.
    """
    out, tuning = Path(out), comparison.tuning
    if tuning is None or tuning.winners is not None:
        given = "nothing: add tuning to it" if tuning is None else f"nothing: its winners are given, {tuning.winners}"
        raise ConfigError(f"this comparison tunes {given}")
    for name in families:
        if name not in tuning.families:
            known = ", ".join(tuning.families)
            raise ConfigError(f"there is no family {name!r}{closest(name, tuning.families)}; known: {known}")
    make_plan(comparison)
    planned = plan_trials(comparison, Resolver.of(comparison))
    _make_folder(comparison, out)

    def carry_out(planned: PlannedRun, runs: Iterable[PlannedRun], outcomes: Mapping[str, Outcome]) -> Outcome:
        known = _known_teacher(planned, runs, outcomes)
        outcome = _carry_out(planned, Plan.folder(planned, out), {}, {}, console, known)
        gc.collect()
        return outcome

    return search(tuning, planned, Trials(out, console, carry_out), families)


# ------------------------------------------------------------------------------------------------ runs


def _finish(plan: Plan, outcomes: dict[str, Outcome], teachers: Mapping[str, Scores], out: Path) -> ComparisonResult:
    metrics = {digest: outcome.metrics for digest, outcome in outcomes.items() if outcome.status == "finished"}
    errors = {digest: outcome.error for digest, outcome in outcomes.items() if outcome.error is not None}
    folders = {digest: outcome.folder for digest, outcome in outcomes.items()}
    tables = summarize_tables(plan, metrics, errors, teachers, folders)
    plots, notice = write_outputs(plan, tables, metrics, errors, folders, out)
    return ComparisonResult(out, plan, outcomes, tables, plots, notice)


def _carry_out(
    planned: PlannedRun,
    folder: Path,
    evaluate_on: Mapping[str, str],
    sources: dict[str, Source],
    console: Console | None,
    teacher_scores: Scores | None,
    before: Outcome | None = None,
) -> Outcome:
    """One run, read back or trained; an error becomes an outcome.

    Args:
        before: of the run whose student it begins with.
    """
    trace = folder.parent.parent / "failures" / f"{folder.name}.txt"
    try:
        config = planned.config if before is None else _begun_with(planned, before)
        metrics = _finished(config, folder, console, teacher_scores)
        further = _further_scores(config, folder, evaluate_on, sources)
    except Interrupted:
        raise
    except Exception as error:  # of whatever kind: hours of other runs must not hang on one arm
        trace.parent.mkdir(parents=True, exist_ok=True)
        trace.write_text(traceback.format_exc(), encoding="utf-8")
        expected = isinstance(error, ValueError | RunStopped)
        message = str(error) if expected else f"{type(error).__name__}: {error} (trace in {trace})"
        return Outcome(folder, "failed", error=message, diverged=isinstance(error, NonFiniteLossError))
    trace.unlink(missing_ok=True)
    return Outcome(folder, "finished", metrics | {"student": metrics["student"] | further})


def _begun_with(planned: PlannedRun, before: Outcome) -> RunConfig:
    """The config of a later run of a chain.

    Raises:
        RunStopped: the run before it is not finished.
    """
    if before.status != "finished":
        raise RunStopped(f"it begins with the student of {before.folder.name}, which is not finished")
    return begun_with(planned, before.folder)


def _known_teacher(planned: PlannedRun, runs: Iterable[PlannedRun], outcomes: Mapping[str, Outcome]) -> Scores | None:
    """The scores of a run's teacher from a finished run that has the same one and the same final data."""
    key = teacher_key(planned.config)
    for other in runs:
        if key is not None and outcomes[other.digest].status == "finished" and teacher_key(other.config) == key:
            scores: Scores = outcomes[other.digest].metrics["teacher"]
            return scores
    return None


def _finished(
    config: RunConfig, folder: Path, console: Console | None, teacher_scores: Scores | None
) -> dict[str, Any]:
    """The metrics of a run: read if it is done, resumed if it was begun, trained otherwise."""
    stored = folder / "config.yaml"
    if not is_finished(folder):
        keep = None if "keep_checkpoints" in config.training.model_fields_set else 0
        return run(
            config, out=folder, resume=stored.is_file(), console=console, teacher_scores=teacher_scores, keep=keep
        ).metrics
    if not _same(yaml.safe_load(stored.read_text(encoding="utf-8")), config.plain(), folder.parent):
        raise ConfigError(f"{stored} was changed after its run: move {folder} away, so that the run is made anew")
    return RunResult.read(folder).metrics


def _same(stored: dict[str, Any], wanted: dict[str, Any], runs: Path) -> bool:
    """Whether a run's config is as it was; the folder of all runs, where a chain's students are, may have moved."""
    name = Path(wanted["student"]["name"])
    if name.parent.parent == runs and Path(str(stored["student"]["name"])).parts[-2:] == name.parts[-2:]:
        stored = {**stored, "student": wanted["student"]}
    return stored == wanted


def _further_scores(
    config: RunConfig, folder: Path, evaluate_on: Mapping[str, str], sources: dict[str, Source]
) -> dict[str, Scores]:
    """The student's scores on the further test data, kept in the run folder."""
    path = folder / EVALUATIONS
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    student: Model | None = None
    reference: Model | None = None
    for name, spec in evaluate_on.items():
        if known.get(name, {}).get("source") != spec:
            student = student or load_model(folder)
            ranks_file = folder / ranks_name(name, spec)
            reference = reference or reference_of(config)
            scores = _score(student, sources[name], config, ranks_file, reference)
            known[name] = {"source": spec, "scores": scores}
            write_json(path, known)
    return {name: known[name]["scores"] for name in evaluate_on}


def _score_teachers(
    plan: Plan, outcomes: dict[str, Outcome], sources: dict[str, Source], path: Path
) -> dict[str, Scores]:
    """Each teacher's scores on the further test data by `teacher_key`, each measured once and kept in `path`.

    A teacher that its own run could not score, as one that embeds for a student that writes, has none.
    """
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    scores: dict[str, Scores] = {}
    for planned in plan.runs:
        config, key = planned.config, teacher_key(planned.config)
        if key is None or key in scores or outcomes[planned.digest].status != "finished":
            continue
        if outcomes[planned.digest].metrics["teacher"] is None:
            continue
        assert config.teacher is not None
        scores[key] = {}
        teacher: Model | None = None
        for name, source in sources.items():
            place = f"{key}-{config_digest(plan.comparison.evaluate[name])}"
            if place not in known:
                teacher = teacher or build_teacher(config.teacher)
                what = {"teacher": config.teacher.model_dump(mode="json"), "source": plan.comparison.evaluate[name]}
                known[place] = what | {"scores": _score(teacher, source, config)}
                write_json(path, known)
            scores[key][name] = known[place]["scores"]
    return scores


def _score(
    model: Model,
    source: Source,
    config: RunConfig,
    ranks_file: Path | None = None,
    reference: Model | None = None,
) -> Scores:
    accelerator = None if config.training.on_cpu else torch.accelerator.current_accelerator()
    device = accelerator or torch.device("cpu")
    return scores_of(model, source, config, device=device, ranks_file=ranks_file, reference=reference)

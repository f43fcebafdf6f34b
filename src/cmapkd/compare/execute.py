"""`compare`: carries a plan out run by run, resumes what was begun, and leaves tables, data and plots."""

from __future__ import annotations

import gc
import json
import os
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from rich.console import Console

from cmapkd.compare.config import ComparisonConfig
from cmapkd.compare.pictures import ranks_name
from cmapkd.compare.plan import Plan, PlannedRun, config_digest, make_plan
from cmapkd.compare.summary import summarize_tables, teacher_key
from cmapkd.compare.tables import TableSummary
from cmapkd.compare.write import write_json, write_outputs
from cmapkd.config import ConfigError, RunStopped, printable, refuse_secrets, writing
from cmapkd.config.disk import write_text
from cmapkd.data.open import open_source
from cmapkd.data.types import Source
from cmapkd.evaluation.run import evaluate
from cmapkd.models import Model, build_model, load_model
from cmapkd.results import RunResult, Scores
from cmapkd.run import RunConfig, run
from cmapkd.training import Interrupted

EVALUATIONS = "evaluations.json"  # in a run folder: scores on the comparison's further test data


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one run ended."""

    folder: Path
    status: Literal["finished", "failed", "missing"] = "missing"
    metrics: dict[str, Any] = field(default_factory=dict)  # of metrics.json; the student's with further test data
    error: str | None = None


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


def compare(comparison: ComparisonConfig, *, out: Path, console: Console | None = None) -> ComparisonResult:
    """Runs what is not yet finished, and leaves in `out` the tables of everything that is.

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
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "a comparison is one process that starts one run after the other. For runs of several processes, start "
            "each with torchrun -m cmapkd distill, its arm's settings, seed=K baseline=none and --out DIR/runs/NAME, "
            "by the names that compare --dry-run lists; compare then reads them back"
        )
    plan = make_plan(comparison)
    if console is not None:
        for remark in plan.remarks():
            console.print(remark, markup=False, highlight=False)
    sources = {name: open_source(spec, split="test") for name, spec in comparison.evaluate.items()}
    refuse_secrets(comparison.plain(), where="comparison")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(comparison.plain(), sort_keys=False, allow_unicode=True)
    write_text(out / "comparison.yaml", text)
    outcomes = {planned.digest: Outcome(plan.folder(planned, out)) for planned in plan.runs}
    try:
        for number, planned in enumerate(plan.runs, 1):
            state = plan.state(planned, out)
            if console is not None:
                doing = {"finished": "read back", "begun": "going on", "new": "starting"}[state]
                head = f"[{number}/{len(plan.runs)}] {planned.name}: {doing}"
                console.print(head, markup=False, highlight=False, soft_wrap=True)
            known = _known_teacher(planned, plan, outcomes)
            outcome = _carry_out(planned, plan.folder(planned, out), comparison.evaluate, sources, console, known)
            outcomes[planned.digest] = outcome
            if state != "finished":
                gc.collect()  # a trainer is full of circles: its memory would otherwise last into the next run
            if console is not None and outcome.error is not None:
                console.print(printable(f"failed: {outcome.error}"), markup=False, highlight=False, soft_wrap=True)
        teachers = _score_teachers(plan, outcomes, sources, out / "teachers.json")
    except BaseException:
        _finish(plan, outcomes, {}, out)
        raise
    return _finish(plan, outcomes, teachers, out)


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
) -> Outcome:
    """One run, read back or trained; an error becomes an outcome."""
    trace = folder.parent.parent / "failures" / f"{folder.name}.txt"
    try:
        metrics = _finished(planned.config, folder, console, teacher_scores)
        further = _further_scores(planned.config, folder, evaluate_on, sources)
    except Interrupted:
        raise
    except Exception as error:  # of whatever kind: hours of other runs must not hang on one arm
        trace.parent.mkdir(exist_ok=True)
        trace.write_text(traceback.format_exc(), encoding="utf-8")
        expected = isinstance(error, ValueError | RunStopped)
        message = str(error) if expected else f"{type(error).__name__}: {error} (trace in {trace})"
        return Outcome(folder, "failed", error=message)
    trace.unlink(missing_ok=True)
    return Outcome(folder, "finished", metrics | {"student": metrics["student"] | further})


def _known_teacher(planned: PlannedRun, plan: Plan, outcomes: Mapping[str, Outcome]) -> Scores | None:
    """The scores of a run's teacher from a finished run that has the same one and the same final data."""
    key = teacher_key(planned.config)
    for other in plan.runs:
        if key is not None and outcomes[other.digest].status == "finished" and teacher_key(other.config) == key:
            scores: Scores = outcomes[other.digest].metrics["teacher"]
            return scores
    return None


def _finished(
    config: RunConfig, folder: Path, console: Console | None, teacher_scores: Scores | None
) -> dict[str, Any]:
    """The metrics of a run: read if it is done, resumed if it was begun, trained otherwise."""
    stored = folder / "config.yaml"
    if not (folder / "metrics.json").is_file():
        return run(config, out=folder, resume=stored.is_file(), console=console, teacher_scores=teacher_scores).metrics
    if yaml.safe_load(stored.read_text(encoding="utf-8")) != config.plain():
        raise ConfigError(f"{stored} was changed after its run: move {folder} away, so that the run is made anew")
    return RunResult.read(folder).metrics


def _further_scores(
    config: RunConfig, folder: Path, evaluate_on: Mapping[str, str], sources: dict[str, Source]
) -> dict[str, Scores]:
    """The student's scores on the further test data, kept in the run folder."""
    path = folder / EVALUATIONS
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    student: Model | None = None
    for name, spec in evaluate_on.items():
        if known.get(name, {}).get("source") != spec:
            student = student or load_model(folder)
            ranks_file = folder / ranks_name(name, spec)
            known[name] = {"source": spec, "scores": _score(student, sources[name], config, ranks_file)}
            write_json(path, known)
    return {name: known[name]["scores"] for name in evaluate_on}


def _score_teachers(
    plan: Plan, outcomes: dict[str, Outcome], sources: dict[str, Source], path: Path
) -> dict[str, Scores]:
    """Each teacher's scores on the further test data by `teacher_key`, each measured once and kept in `path`."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    scores: dict[str, Scores] = {}
    for planned in plan.runs:
        config, key = planned.config, teacher_key(planned.config)
        if key is None or key in scores or outcomes[planned.digest].status != "finished":
            continue
        assert config.teacher is not None
        scores[key] = {}
        teacher: Model | None = None
        for name, source in sources.items():
            place = f"{key}-{config_digest(plan.comparison.evaluate[name])}"
            if place not in known:
                teacher = teacher or build_model(config.teacher)
                what = {"teacher": config.teacher.model_dump(mode="json"), "source": plan.comparison.evaluate[name]}
                known[place] = what | {"scores": _score(teacher, source, config)}
                write_json(path, known)
            scores[key][name] = known[place]["scores"]
    return scores


def _score(model: Model, source: Source, config: RunConfig, ranks_file: Path | None = None) -> Scores:
    accelerator = None if config.training.on_cpu else torch.accelerator.current_accelerator()
    device = accelerator or torch.device("cpu")
    return evaluate(
        model.to(device),
        source,
        config.evaluation,
        device=device,
        on_bad_sample=config.data.on_bad_sample,
        ranks_file=ranks_file,
    )

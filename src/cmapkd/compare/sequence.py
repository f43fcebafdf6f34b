"""Tasks that are learned one after the other: what is kept of each, as Transfer, Average and Last."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from cmapkd.compare.metric import lookup, metric_label
from cmapkd.compare.plan import Plan
from cmapkd.compare.rows import Row
from cmapkd.compare.statistics import Summary, summarize
from cmapkd.config import in_markdown

MEASURES = ("Transfer", "Average", "Last")
Scores = Sequence[Sequence[float]]  # after each run, on each task


@dataclass(frozen=True, slots=True)
class SequenceRow:
    """One row's tasks.

    Attributes:
        scores: by seed, after each run on each task; of the seeds whose runs are all finished.
        measures: over these seeds, by name; a row of one run has `Last` alone.
        after_last: over these seeds, of each task after the last run.
    """

    label: str
    scores: dict[int, Scores]
    measures: dict[str, Summary]
    after_last: dict[str, Summary]


def measures_of(scores: Scores) -> dict[str, float]:
    """Transfer, Average and Last of tasks that were learned in the order of the columns.

    Transfer: of each task but the first the mean before it was learned, and the mean of these. Average: the mean over
    all runs and tasks. Last: the mean over tasks after the last run. In the units of the scores.

    Args:
        scores: a row for each run, a column for each task. Where there are fewer runs than tasks, Last alone is given.
    Source: Zheng et al. 2023, arXiv:2303.06628, section 4.
    """
    last = {"Last": fmean(scores[-1])}
    if len(scores) != len(scores[0]) or len(scores) < 2:
        return last
    before = [fmean(row[task] for row in scores[:task]) for task in range(1, len(scores))]
    return {"Transfer": fmean(before), "Average": fmean(fmean(row) for row in scores)} | last


def sequence_of(plan: Plan, metrics: Mapping[str, Mapping[str, Any]]) -> tuple[SequenceRow, ...]:
    """The rows of a plan's first table as chains of tasks; none where the comparison names no tasks.

    Args:
        metrics: by digest, content of metrics.json of each finished run, its student's with further test data.
    """
    comparison = plan.comparison
    rows = plan.tables[0].rows if comparison.tasks else ()
    return tuple(_row(row, comparison.tasks, comparison.task_metric, metrics) for row in rows)


def _row(row: Row, tasks: Sequence[str], metric: str, metrics: Mapping[str, Mapping[str, Any]]) -> SequenceRow:
    found: dict[int, Scores] = {}
    for seed in row.runs:
        students = [metrics.get(run.digest, {}).get("student", {}) for run in row.chain(seed)]
        values = [[lookup(student, f"{task}.{metric}") for task in tasks] for student in students]
        known = [[value for value in line if value is not None] for line in values]
        if all(len(line) == len(tasks) for line in known):
            found[seed] = known
    by_seed = [measures_of(scores) for scores in found.values()]
    measures = {name: summarize([each[name] for each in by_seed if name in each]) for name in MEASURES}
    last = {task: summarize([scores[-1][place] for scores in found.values()]) for place, task in enumerate(tasks)}
    return SequenceRow(
        row.label,
        found,
        {name: summary for name, summary in measures.items() if summary is not None},
        {name: summary for name, summary in last.items() if summary is not None},
    )


def sequence_markdown(rows: Sequence[SequenceRow], tasks: Sequence[str], metric: str) -> str:
    """A table of the measures and of each task after the last run: means and sample deviations over seeds."""
    label = metric_label(metric)
    heads = ["arm", *MEASURES, *(f"{task}, {label}, after the last run" for task in tasks)]
    lines = [
        f"Tasks one after the other ({', '.join(tasks)}; {label})",
        "",
        "| " + " | ".join(in_markdown(head) for head in heads) + " |",
        "| --- |" + " ---: |" * (len(heads) - 1),
    ]
    for row in rows:
        cells = [row.measures.get(name) for name in MEASURES] + [row.after_last.get(task) for task in tasks]
        lines.append("| " + " | ".join([in_markdown(row.label), *map(_shown, cells)]) + " |")
    return "\n".join(lines) + "\n"


def sequence_csv(rows: Sequence[SequenceRow], tasks: Sequence[str]) -> str:
    """One line for each score: arm, seed, number of the run, task, score."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["arm", "seed", "after_run", "task", "score"])
    for row in rows:
        for seed, scores in row.scores.items():
            for number, line in enumerate(scores, 1):
                writer.writerows(
                    [row.label, seed, number, task, score] for task, score in zip(tasks, line, strict=True)
                )
    return text.getvalue()


def plain_sequence(row: SequenceRow) -> dict[str, Any]:
    """As plain data, for results.json."""
    means = {name: {"mean": summary.mean, "deviation": summary.deviation} for name, summary in row.measures.items()}
    return {"row": row.label, "scores": {str(seed): scores for seed, scores in row.scores.items()}, "measures": means}


def _shown(summary: Summary | None) -> str:
    if summary is None:
        return ""
    return f"{summary.mean:.1f}" if summary.deviation is None else f"{summary.mean:.1f} ± {summary.deviation:.1f}"

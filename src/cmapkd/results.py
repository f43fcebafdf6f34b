"""What a run ends with: scores of teacher, student and baseline, the share of the gap closed, and a table of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from cmapkd.config import printable
from cmapkd.evaluation.table import shown_parameters

Scores = dict[str, Any]


@dataclass(frozen=True, slots=True)
class RunResult:
    """The content of a run folder's `metrics.json`, and where it is."""

    folder: Path
    metrics: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> RunResult:
        """Reads a finished run.

        Raises:
            ValueError: the folder holds no finished run.
        """
        path = folder / "metrics.json"
        if not path.is_file():
            raise ValueError(f"{folder} holds no finished run: it has no metrics.json")
        try:
            metrics = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} is damaged ({error}): remove it and resume the run, which measures again"
            ) from None
        models = (
            [metrics.get(role) for role in ("teacher", "student", "baseline")] if isinstance(metrics, dict) else [0]
        )
        if not all(each is None or (isinstance(each, dict) and isinstance(each.get("params"), int)) for each in models):
            raise ValueError(f"{path} holds no scores of teacher, student and baseline: cmapkd did not write it")
        if not isinstance(metrics.get("gap_closed"), int | float | None):
            raise ValueError(f"{path} has gap_closed {str(metrics['gap_closed'])[:40]!r}, which is no number")
        return cls(folder, metrics)

    @property
    def gap_closed(self) -> float | None:
        value: float | None = self.metrics.get("gap_closed")
        return value

    def table(self) -> Table:
        """Teacher, baseline and student side by side."""
        baseline = self.metrics.get("baseline_name", "baseline")
        rows = {"teacher": "teacher", "baseline": baseline, "student": self.metrics.get("method")}
        present = [(rows[role], self.metrics[role]) for role in rows if self.metrics.get(role)]
        table = score_table(present, title=f"Scores on {self.metrics.get('evaluated_on')}")
        if self.gap_closed is not None:
            share = 100 * self.gap_closed
            table.caption = Text(
                f"gap closed: {share:.0f} % of the way from {printable(str(baseline))} to teacher (R@1)"
            )
        return table


def gap_closed(teacher: Scores | None, student: Scores | None, baseline: Scores | None) -> float | None:
    """(student - baseline) / (teacher - baseline) on mean R@1: 0 is the baseline, 1 the teacher.

    None where a model is missing, has no retrieval score, or the baseline is no worse than the teacher, so that there
    is no gap to close.
    """
    scores = [
        model["retrieval"]["mean_r@1"] for model in (teacher, student, baseline) if model and model.get("retrieval")
    ]
    if len(scores) < 3 or scores[0] <= scores[2]:
        return None
    return float((scores[1] - scores[2]) / (scores[0] - scores[2]))


def score_table(rows: list[tuple[str, Scores]], *, title: str) -> Table:
    """One row for each model: recall both ways and its mean, zero-shot accuracy, parameters; percentages."""
    columns: dict[str, tuple[tuple[str, ...], ...]] = {  # the mean of the paths is shown
        "i2t R@1": (("retrieval", "i2t", "r@1"),),
        "t2i R@1": (("retrieval", "t2i", "r@1"),),
        "R@1": (("retrieval", "i2t", "r@1"), ("retrieval", "t2i", "r@1")),
        "R@5": (("retrieval", "i2t", "r@5"), ("retrieval", "t2i", "r@5")),
        "zero-shot": (("zero_shot", "top1"),),
    }
    values = {name: [_mean(scores, paths) for _, scores in rows] for name, paths in columns.items()}
    shown = {name: column for name, column in values.items() if any(value is not None for value in column)}
    table = Table(title=Text(printable(title)))
    for name in ("model", *shown, "parameters"):
        if name == "model":  # a long path is folded; no number gives way to it
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for place, (name, scores) in enumerate(rows):
        cells = ["-" if column[place] is None else f"{column[place]:.1f}" for column in shown.values()]
        table.add_row(Text(printable(str(name))), *cells, shown_parameters(scores))
    return table


def _mean(scores: Scores, paths: tuple[tuple[str, ...], ...]) -> float | None:
    values = [_dig(scores, path) for path in paths]
    return None if None in values else sum(values) / len(values)


def _dig(scores: Scores, path: tuple[str, ...]) -> Any:
    value: Any = scores
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, int | float) else None

"""What a run ends with: scores of teacher, student and baseline, the share of the gap closed, and a table of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from cmapkd.config import printable
from cmapkd.evaluation.headline import headlines, number_at, remark_on_retrieval, scored_set
from cmapkd.evaluation.table import shown_parameters
from cmapkd.evaluation.tasks import Headline

Scores = dict[str, Any]
_ROLES = ("teacher", "student", "baseline")


def is_finished(folder: Path) -> bool:
    """Whether a run was trained to its end and measured. `finalize` measures runs that were stopped, too."""
    path = folder / "metrics.json"
    if not path.is_file():
        return False
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        return not metrics.get("steps", 0) < metrics.get("total_steps", 0)
    except (ValueError, TypeError, AttributeError, RecursionError):  # damaged: whoever reads it says so
        return True


@dataclass(frozen=True, slots=True)
class RunResult:
    """The content of a run folder's `metrics.json`, and where it is."""

    folder: Path
    metrics: dict[str, Any]

    @classmethod
    def read(cls, folder: str | Path) -> RunResult:
        """Reads a finished run.

        Raises:
            ValueError: the folder holds no finished run.
        """
        folder = Path(folder)
        path = folder / "metrics.json"
        if not path.is_file():
            raise ValueError(f"{folder} holds no finished run: it has no metrics.json")
        try:
            metrics = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} is damaged ({error}): remove it and resume the run, which measures again"
            ) from None
        models = [metrics.get(role) for role in _ROLES] if isinstance(metrics, dict) else [0]
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
        baseline = str(self.metrics.get("baseline_name", "baseline"))
        rows = {"teacher": "teacher", "baseline": baseline, "student": str(self.metrics.get("method"))}
        present = [(rows[role], self.metrics[role]) for role in rows if self.metrics.get(role)]
        on = self.metrics.get("evaluated_on")
        title = f"Scores on {on}" if on is not None else "Parameters (no evaluation data were named)"
        table = score_table(present, title=title)
        lines = [*dict.fromkeys(said for _, scores in present if (said := scored_set(scores)) is not None)]
        steps, total = self.metrics.get("steps"), self.metrics.get("total_steps")
        if steps != total and total is not None:
            lines.append(f"{rows['student']}: after step {steps} of {total}")
        if self.gap_closed is not None:
            share, on = 100 * self.gap_closed, gap_measure(*(self.metrics.get(role) for role in _ROLES))
            lines.append(f"gap closed: {round(share)} % of the way from {baseline} to teacher ({on})")
        lines += dict.fromkeys(remark for _, scores in present if (remark := remark_on_retrieval(scores)) is not None)
        lines += [f"warning: {remark}" for remark in self.metrics.get("remarks", ())]
        if lines:
            table.caption = Text(printable("\n".join(lines)))
        return table


def gap_closed(teacher: Scores | None, student: Scores | None, baseline: Scores | None) -> float | None:
    """(student - baseline) / (teacher - baseline) on the first headline of all three: 0 is the baseline, 1 the teacher.

    The headline is mean R@1 where there is retrieval, then zero-shot top-1; of models that write the accuracy of
    answers, then CIDEr-D, then negative bits per byte; see `evaluation.headline`. None where a model is missing, they
    share no headline, or the baseline is no worse than the teacher, so that there is no gap.
    """
    shared = _shared_headline(teacher, student, baseline)
    if shared is None:
        return None
    top, own, start = shared[1]
    return None if top <= start else (own - start) / (top - start)


def gap_measure(*models: Scores | None) -> str:
    """The head of the headline that a gap between these models is closed on; empty where they share none."""
    shared = _shared_headline(*models)
    return "" if shared is None else shared[0].head


def _shared_headline(*models: Scores | None) -> tuple[Headline, tuple[float, ...]] | None:
    """The first headline that all models have, with the numbers."""
    first, *others = [headlines(scores) for scores in models]
    for task, (headline, number) in first.items():
        if all(task in other for other in others):
            return headline, (number, *(other[task][1] for other in others))
    return None


def score_table(rows: list[tuple[str, Scores]], *, title: str) -> Table:
    """One row for each model: recall both ways and its mean, what they are of, other headlines, parameters."""
    columns: dict[str, tuple[tuple[str, ...], ...]] = {  # the mean of the paths is shown
        "i2t R@1": (("retrieval", "i2t", "r@1"),),
        "t2i R@1": (("retrieval", "t2i", "r@1"),),
        "R@1": (("retrieval", "i2t", "r@1"), ("retrieval", "t2i", "r@1")),
        "R@5": (("retrieval", "i2t", "r@5"), ("retrieval", "t2i", "r@5")),
    }
    values = {name: [_mean(scores, paths) for _, scores in rows] for name, paths in columns.items()}
    cells = {name: [_shown(value) for value in column] for name, column in values.items()}
    cells["of"] = [_set(scores) for _, scores in rows]
    heads = [headlines(scores) for _, scores in rows]
    for task in dict.fromkeys(task for each in heads for task in each if task != "retrieval"):
        headline = next(each[task][0] for each in heads if task in each)
        cells[headline.head] = [_shown(each[task][1] if task in each else None, headline.digits) for each in heads]
    shown = {name: column for name, column in cells.items() if any(cell != "-" for cell in column)}
    table = Table(title=Text(printable(title)))
    for name in ("model", *shown, "parameters"):
        if name == "model":  # a long path is folded; no number gives way to it
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for place, (name, scores) in enumerate(rows):
        row = [column[place] for column in shown.values()]
        table.add_row(Text(printable(str(name))), *row, shown_parameters(scores))
    return table


def _shown(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:z.{digits}f}"


def _set(scores: Scores) -> str:
    """How many images and captions retrieval is of, in as little room as there is."""
    images, texts = (number_at(scores, ("retrieval", key)) for key in ("num_images", "num_texts"))
    return "-" if images is None or texts is None else f"{images:,.0f} x {texts:,.0f}"


def _mean(scores: Scores, paths: tuple[tuple[str, ...], ...]) -> float | None:
    values = [number_at(scores, path) for path in paths]
    return None if None in values else sum(value for value in values if value is not None) / len(values)

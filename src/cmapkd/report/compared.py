"""A comparison's tables on the page: arms with intervals, declared contrasts, paired differences, failures, notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cmapkd.compare.curves import read_validations
from cmapkd.compare.metric import lower_is_better, metric_digits, metric_label
from cmapkd.report.blocks import Block, Cell, Details, Figure, Figures, Paragraph, Remarks, Section, Table, Tone
from cmapkd.report.figures import COLOURS, Curve, Dot, dots, lines, shown
from cmapkd.report.plain import mapping, number, sequence, string, whole
from cmapkd.report.read import ComparisonFolder, short_name

_MOST_CURVES = 6  # rows of a curve's drawing
_EXPLORATORY = 3  # seeds, at most: a table of so few is for exploring


def comparison_sections(comparison: ComparisonFolder, number: int) -> list[Section]:
    """One section for each table, one for runs that failed."""
    prefix = f"comparison-{number}"
    tables = [mapping(each) for each in sequence(comparison.results, "tables")]
    sections = []
    for place, table in enumerate(tables):
        title = string(table, "heading") or string(table, "title") or comparison.name
        sections.append(Section(f"{prefix}-table-{place}", title, _table_blocks(comparison, table)))
    if failed := _failed(comparison):
        sections.append(Section(f"{prefix}-failed", f"{comparison.name}: runs that failed or are missing", failed))
    return sections


def _table_blocks(comparison: ComparisonFolder, table: Mapping[str, Any]) -> list[Block]:
    rows = [mapping(each) for each in sequence(table, "rows")]
    metrics = [text for each in sequence(table, "metrics") if (text := string({"m": each}, "m")) is not None]
    if not rows:
        return [Paragraph("This table has no rows.", "quiet")]
    blocks: list[Block] = [_scores(comparison, table, rows, metrics)]
    if contrasts := [mapping(each) for each in sequence(table, "contrasts")]:
        blocks.append(_contrasts(contrasts))
    figures = [figure for metric in metrics for figure in _drawn(table, rows, metric)]
    if figures:
        blocks.append(Figures(figures))
    if curves := _curves(comparison, rows):
        blocks.append(Details("Validation over steps", [Figures(curves)]))
    notes = [text for each in sequence(table, "notes") if (text := string({"n": each}, "n", longest=1_000))]
    if notes:
        blocks.append(Details("Notes on this table", [Remarks(notes)]))
    return blocks


def _scores(
    comparison: ComparisonFolder, table: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]
) -> Table:
    """Means with deviations, paired differences with their intervals, gap, budget and cost of each row."""
    reference = string(table, "reference")
    compared = {m: any(_difference(row, m) is not None for row in rows) for m in metrics}
    gap = bool(metrics) and any(number(row, "metrics", metrics[0], "gap_closed", "summary", "mean") for row in rows)
    plateau = any(sequence(row, "off_plateau") for row in rows)
    costs = list(dict.fromkeys(name for row in rows for name in mapping(row, "costs")))
    heads = ["arm", "seeds", "steps"]
    for metric in metrics:
        heads += [metric_label(metric)] + [f"− {reference}"] * compared[metric]
    heads += ["off plateau"] * plateau + ["gap closed"] * gap + costs
    cells = []
    for name, scores in mapping(table, "teachers").items():
        line = [Cell(_teacher(name), tone="quiet"), Cell("-"), Cell("-")]
        for metric in metrics:
            value = number(mapping(scores), metric)
            line += [Cell("-" if value is None else f"{value:.{metric_digits(metric)}f}", value)]
            line += [Cell("-")] * compared[metric]
        cells.append(line + [Cell("-")] * (plateau + gap + len(costs)))
    for row in rows:
        first = metrics[0] if metrics else ""
        count = whole(row, "metrics", first, "summary", "count") or 0
        failed = len(mapping(row, "errors"))
        label = f"{string(row, 'row') or '?'}" + " (reference)" * bool(row.get("is_reference"))
        line = [Cell(label, below=f"{failed} failed" * bool(failed), tone="bad" if failed else "")]
        line += [Cell(str(count), count), _steps(comparison, row)]
        for metric in metrics:
            line += [_mean(row, metric)] + ([_paired(row, metric)] if compared[metric] else [])
        off = sequence(row, "off_plateau")
        line += [Cell("/".join(map(str, off[:2])) or "-")] * plateau
        if gap:
            line.append(_gap(row, first))
        for name in costs:
            cost = number(row, "costs", name, "mean")
            line.append(Cell("-" if cost is None else shown(cost), cost))
        cells.append(line)
    note = "Means ± sample deviations over seeds. Below a paired difference stand its 95 % intervals and the seeds won."
    if any(string(row, "coordinates", "budget") for row in rows):
        note += " Rows at equal time have the steps that fit into the time of one arm."
    return Table(string(table, "title") or "Arms", heads, cells, note=note)


def _teacher(label: str) -> str:
    """`teacher NAME`, of a local path its last part."""
    role, space, name = label.partition(" ")
    return f"{role}{space}{short_name(name)}"


def _steps(comparison: ComparisonFolder, row: Mapping[str, Any]) -> Cell:
    names = {string({"n": each}, "n") for each in mapping(row, "runs").values()}
    records = [mapping(each) for each in sequence(comparison.results, "runs")]
    steps = {whole(each, "steps") for each in records if string(each, "run") in names} - {None}
    known = sorted(step for step in steps if step is not None)
    return (
        Cell("-")
        if not known
        else Cell(" to ".join(f"{step:,}" for step in dict.fromkeys((known[0], known[-1]))), known[0])
    )


def _mean(row: Mapping[str, Any], metric: str) -> Cell:
    mean, deviation, median = (
        number(row, "metrics", metric, "summary", key) for key in ("mean", "deviation", "median")
    )
    if mean is None:
        return Cell("-")
    digits = metric_digits(metric)
    below = "" if deviation is None else f"± {deviation:z.{digits}f}"
    if median is not None and mapping(row, "metrics", metric, "summary").get("bimodal") is True:
        return Cell(f"{mean:z.{digits}f}", mean, f"{below}, in two groups, median {median:z.{digits}f}", "bad")
    return Cell(f"{mean:z.{digits}f}", mean, below)


def _difference(row: Mapping[str, Any], metric: str) -> float | None:
    return number(row, "metrics", metric, "difference", "mean")


def _bounds(values: Any, *path: str) -> tuple[float, float] | None:
    bounds = [number({"bound": bound}, "bound") for bound in sequence(values, *path)]
    low, high = bounds if len(bounds) == 2 else (None, None)
    return None if low is None or high is None else (low, high)


def _paired(row: Mapping[str, Any], metric: str) -> Cell:
    mean = _difference(row, metric)
    if mean is None:
        return Cell("-")
    digits = metric_digits(metric)
    parts = [
        f"{words} {bounds[0]:+z.{digits}f} to {bounds[1]:+z.{digits}f}"
        for words, key in (("seeds", "difference"), ("and pictures", "two_way"))
        if (bounds := _bounds(row, "metrics", metric, key, "interval")) is not None
    ]
    wins, seeds = (
        whole(row, "metrics", metric, "difference", "wins"),
        sequence(row, "metrics", metric, "difference", "seeds"),
    )
    parts += [f"{wins}/{len(seeds)} won"] if wins is not None else []
    bounds = _bounds(row, "metrics", metric, "difference", "interval")
    tone: Tone = "" if bounds is None or bounds[0] <= 0 <= bounds[1] else tone_of(mean > 0, metric)
    return Cell(f"{mean:+z.{digits}f}", mean, "; ".join(parts), tone)


def _gap(row: Mapping[str, Any], metric: str) -> Cell:
    share = number(row, "metrics", metric, "gap_closed", "summary", "mean")
    remark = string(row, "metrics", metric, "gap_closed", "remark") or ""
    return Cell("-", below=remark) if share is None else Cell(f"{100 * share:z.0f} %", share, remark)


def _contrasts(contrasts: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for each in contrasts:
        verdict = string(each, "verdict") or "-"
        difference, bounds = number(each, "difference"), _bounds(each, "interval")
        digits = metric_digits(string(each, "metric") or "")
        interval = "" if bounds is None else f"{bounds[0]:+z.{digits}f} to {bounds[1]:+z.{digits}f}"
        smallest = number(each, "smallest")
        rows.append(
            [
                Cell(f"{string(each, 'arm')} − {string(each, 'against')}", below=string(each, "remark") or ""),
                Cell(verdict, below=string(each, "reason") or "", tone=_tone(verdict, string(each, "metric") or "")),
                Cell(metric_label(string(each, "metric") or "-")),
                Cell("-" if difference is None else f"{difference:+z.{digits}f}", difference, interval),
                Cell(string(each, "covers") or "-"),
                *(_p(number(each, key)) for key in ("p", "p_holm")),
                Cell("-" if smallest is None else f"± {smallest:g}", smallest),
                _p(number(each, "p_equal_holm")),
            ]
        )
    heads = [
        "contrast", "verdict", "metric", "difference, 95 %", "covers", "p", "p (Holm)", "smallest", "p equal (Holm)",
    ]  # fmt: skip
    note = "Verdicts at 5 % with Holm's correction over all contrasts of the file. equal: within ± smallest."
    return Table("Declared contrasts", heads, rows, words=3, note=note)


def _tone(verdict: str, metric: str) -> Tone:
    if verdict not in ("above", "below"):
        return "" if verdict == "equal" else "quiet"
    return tone_of(verdict == "above", metric)


def tone_of(larger: bool, metric: str) -> Tone:
    """Whether a larger number of a metric is good news: for a rank it is not."""
    return "bad" if larger == lower_is_better(metric) else "good"


def _p(value: float | None) -> Cell:
    if value is None:
        return Cell("-")
    return Cell("< 0.0001" if value < 1e-4 else f"{value:.4f}" if value < 0.1 else f"{value:.2f}", value)


def _drawn(table: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], metric: str) -> list[Figure]:
    """Arms with their seeds, and the paired differences with their intervals."""
    arms, differences = [], []
    for name, scores in mapping(table, "teachers").items():
        if (value := number(mapping(scores), metric)) is not None:
            arms.append(Dot(_teacher(name), value, None, (), 1))
    for row in rows:
        label, reference = string(row, "row") or "?", bool(row.get("is_reference"))
        mean = number(row, "metrics", metric, "summary", "mean")
        if mean is not None:
            values = [number({"v": each}, "v") for each in mapping(row, "metrics", metric, "values").values()]
            kept = tuple(value for value in values if value is not None)
            arms.append(Dot(label, mean, None, kept, 2 if reference else 0))
        if (difference := _difference(row, metric)) is not None:
            singles = [number({"v": e}, "v") for e in sequence(row, "metrics", metric, "difference", "differences")]
            kept = tuple(value for value in singles if value is not None)
            bounds = _bounds(row, "metrics", metric, "difference", "interval")
            differences.append(Dot(label, difference, bounds, kept, 0))
    label, figures = metric_label(metric), []
    if arms:
        figures.append(dots(f"{label}: means and seeds", arms, unit=label))
    if differences:
        reference_name = string(table, "reference") or "the reference"
        figures.append(
            dots(
                f"{label}: paired difference to {reference_name}",
                differences,
                unit="difference, 95 % over seeds",
                zero=True,
            )
        )
    return figures


def _curves(comparison: ComparisonFolder, rows: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Validations that the runs' folders still hold: the first seed of each row, by the logged number."""
    folders = {
        string(each, "run"): string(each, "folder", longest=4_096)
        for each in map(mapping, sequence(comparison.results, "runs"))
    }
    found: dict[str, list[Curve]] = {}
    for place, row in enumerate(rows[:_MOST_CURVES]):
        names = [string({"n": each}, "n") for each in mapping(row, "runs").values()]
        folder = next((inside for name in names if (inside := _inside(comparison.path, folders.get(name)))), None)
        for key, points in ({} if folder is None else _read(folder)).items():
            if key not in ("score", "num_images", "num_texts"):
                curve = Curve(string(row, "row") or "?", sorted(points.items()), place % COLOURS)
                found.setdefault(key, []).append(curve)
    return [lines(f"validation {key}".replace("r@", "R@"), curves, dotted=True) for key, curves in found.items()]


def _read(folder: Path) -> dict[str, dict[int, float]]:
    try:
        return read_validations(folder)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}  # a damaged log draws no curve


def _inside(root: Path, folder: str | None) -> Path | None:
    """The folder of a run, if it lies in the comparison's."""
    if folder is None:
        return None
    path = root / folder
    try:
        return path if path.resolve().is_relative_to(root.resolve()) and path.is_dir() else None
    except (OSError, ValueError):  # no name of a folder
        return None


def _failed(comparison: ComparisonFolder) -> list[Block]:
    rows = []
    for record in map(mapping, sequence(comparison.results, "runs")):
        status = string(record, "status")
        if status not in ("finished", None):
            message = string(record, "error", longest=1_000) or "it has not ended yet"
            rows.append(
                [Cell(string(record, "row") or "?"), Cell(string(record, "seed") or "-"), Cell(status), Cell(message)]
            )
    if not rows:
        return []
    return [Table("Not in any number above", ["arm", "seed", "status", "message"], rows, words=4)]

"""Plots of a comparison: dots and intervals for each metric, learning curves where validation was logged."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from cmapkd.compare.curves import read_validations
from cmapkd.compare.metric import metric_label
from cmapkd.compare.plan import Plan, PlannedTable
from cmapkd.compare.tables import TableSummary

REFERENCE = "#b3541e"
COLOURS = ("#1f6f5c", "#3a6ea5", "#8b5fbf", "#c48a12", "#5fa88f", "#7a7a7a", "#a83f6f", "#4a4e8f")
STYLES = ("-", "--", ":", "-.")  # of several references, and once the colours are used up


def draw_plots(plan: Plan, tables: tuple[TableSummary, ...], folders: Mapping[str, Path], out: Path) -> Iterator[Path]:
    """Draws each metric of each table, and each curve that runs logged, as PNG and SVG into `out`."""
    for planned, table in zip(plan.tables, tables, strict=True):
        prefix = f"{_slug(table.title)}-" if table.title else ""
        for path in table.metrics:
            if any(row.cells[path].values for row in table.rows):
                yield from _save(_dots(table, path), out, f"{prefix}{_slug(metric_label(path))}")
        for name, curves in _read_curves(planned, folders).items():
            yield from _save(_lines(planned, curves, name), out, f"{prefix}curve-{_slug(name)}")


def _dots(table: TableSummary, path: str) -> Figure:
    """Left every seed, mean and deviation of each arm; right the paired difference with its interval."""
    rows = list(reversed(table.rows))  # the first arm stands on top
    compared = any(row.cells[path].difference for row in rows)
    width = 3.6 + 0.075 * max(len(row.label) for row in rows)
    figure = Figure(figsize=(width + 3.2 * compared, 1.5 + 0.34 * len(rows)), layout="constrained")
    panels = figure.subplots(1, 2 if compared else 1, sharey=True, squeeze=False)[0]
    left = panels[0]
    for place, row in enumerate(rows):
        cell, colour = row.cells[path], _colour(row.is_reference, 0)
        if cell.summary is None:
            continue
        values = list(cell.values.values())
        left.plot(values, [place] * len(values), "o", color=colour, markersize=4, alpha=0.4, markeredgewidth=0)
        left.errorbar(
            cell.summary.mean, place, xerr=cell.summary.deviation, fmt="D", color=colour, markersize=6, capsize=3
        )
    for teacher in table.teachers:
        summary = teacher.cells[path].summary
        if summary is not None:
            left.axvline(summary.mean, color="#9aa5b1", linestyle="--", linewidth=1)
            left.annotate(
                "teacher", (summary.mean, 1), xycoords=("data", "axes fraction"), xytext=(0, 2),
                textcoords="offset points", ha="center", va="bottom", fontsize=7, color="#66707a",
            )  # fmt: skip
    left.set_yticks(range(len(rows)), [row.label + " (reference)" * row.is_reference for row in rows], fontsize=8)
    for tick, row in zip(left.get_yticklabels(), rows, strict=True):
        tick.set_color(_colour(row.is_reference, None))
    left.set_ylim(-0.6, len(rows) - 0.4)
    left.set_xlabel(f"{metric_label(path)}: seeds, mean ± deviation", fontsize=8)
    if compared:
        right = panels[1]
        right.axvline(0, color=REFERENCE, linewidth=1)
        for place, row in enumerate(rows):
            difference = row.cells[path].difference
            if difference is None:
                continue
            right.plot(
                difference.differences, [place] * len(difference.seeds), "o", color=COLOURS[0], markersize=4,
                alpha=0.4, markeredgewidth=0,
            )  # fmt: skip
            half = None if difference.interval is None else difference.interval[1] - difference.mean
            right.errorbar(difference.mean, place, xerr=half, fmt="D", color=COLOURS[0], markersize=6, capsize=3)
        right.set_xlabel(f"difference to {table.reference_name}, 95 % interval", fontsize=8)
    for panel in panels:
        _tidy(panel)
        panel.grid(axis="x", color="#e4e7ea", linewidth=0.6)
    if table.title:
        figure.suptitle(table.title, fontsize=10)
    return figure


def _lines(table: PlannedTable, curves: dict[int, list[dict[int, float]]], name: str) -> Figure:
    """Mean over seeds of each row, the seeds thin behind it."""
    longest = max(len(table.rows[place].label) for place in curves)
    figure = Figure(figsize=(5.6 + 0.08 * longest, 3.4), layout="constrained")
    panel = figure.subplots()
    colour_number = num_references = 0
    for place, runs in curves.items():
        reference = table.reference[place] == place
        colour = _colour(reference, colour_number)
        style = STYLES[(num_references if reference else colour_number // len(COLOURS)) % len(STYLES)]
        num_references, colour_number = num_references + reference, colour_number + (not reference)
        for run in runs if len(runs) > 1 else []:
            panel.plot(list(run), list(run.values()), color=colour, linewidth=0.7, alpha=0.3)
        shared = sorted(set.intersection(*(set(run) for run in runs)))
        means = [statistics.fmean(run[step] for run in runs) for step in shared]
        label = table.rows[place].label + " (reference)" * reference
        panel.plot(shared, means, style, color=colour, linewidth=1.8, marker="o", markersize=3, label=label)
    panel.set_xlabel("step", fontsize=8)
    panel.set_ylabel(f"validation {name.replace('r@', 'R@').replace('_', ' ')}", fontsize=8)
    panel.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    panel.grid(color="#e4e7ea", linewidth=0.6)
    _tidy(panel)
    if table.title:
        figure.suptitle(table.title, fontsize=10)
    return figure


def _read_curves(table: PlannedTable, folders: Mapping[str, Path]) -> dict[str, dict[int, list[dict[int, float]]]]:
    """Validation number -> place of the row -> step -> value of each run that logged it."""
    curves: dict[str, dict[int, list[dict[int, float]]]] = {}
    for place, row in enumerate(table.rows):
        for run in row.runs.values():
            for name, curve in read_validations(folders[run.digest]).items():
                if name != "score":  # one of the others again: what picks the best checkpoint
                    curves.setdefault(name, {}).setdefault(place, []).append(curve)
    return curves


def _save(figure: Figure, folder: Path, name: str) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"{name}.{suffix}", dpi=160)
        figure.set_layout_engine("none")  # its parts have their places now
        yield folder / f"{name}.{suffix}"


def _tidy(panel: Any) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)


def _colour(reference: bool, number: int | None) -> str:
    return REFERENCE if reference else "black" if number is None else COLOURS[number % len(COLOURS)]


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9@]+", "_", text).strip("_").lower()

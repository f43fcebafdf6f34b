"""The files and the terminal table of a comparison: JSON, CSV, Markdown, rich."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from cmapkd.compare.contrast_table import HEAD, contrast_notes, contrast_rows, contrasts_csv, plain_contrast
from cmapkd.compare.metric import lookup, metric_label
from cmapkd.compare.picture_table import pictures_csv
from cmapkd.compare.pictures import KeptRanks
from cmapkd.compare.plan import Plan
from cmapkd.compare.sequence import plain_sequence, sequence_csv, sequence_markdown, sequence_of
from cmapkd.compare.statistics import Estimate, PairedDifference, Summary, summarize
from cmapkd.compare.summary import COSTS, extra_parameters, seconds_per_step
from cmapkd.compare.tables import Cell, RowSummary, TableSummary
from cmapkd.config import in_markdown, install_advice, printable
from cmapkd.config.disk import write_text
from cmapkd.provenance import describe_environment


def write_outputs(
    plan: Plan,
    tables: tuple[TableSummary, ...],
    metrics: Mapping[str, dict[str, Any]],
    errors: Mapping[str, str],
    folders: Mapping[str, Path],
    out: Path,
) -> tuple[tuple[Path, ...], str | None]:
    """Writes results.json, results.csv, table.md and plots/ into `out`.

    Also contrasts.csv where contrasts are declared, pictures.csv where runs keep ranks of pictures, and tasks.csv where
    tasks are learned one after the other.

    Args:
        metrics, errors, folders: by digest, of the finished runs, the failed ones and all.
    Returns:
        The plots, and why there are none.
    """
    records, sequences = _records(plan, metrics, errors, folders, out), sequence_of(plan, metrics)
    results = {
        "comparison": plan.comparison.plain(),
        "runs": records,
        "tables": [_plain_table(table) for table in tables],
        **({"sequences": [plain_sequence(row) for row in sequences]} if sequences else {}),
        "environment": describe_environment(),
    }
    write_json(out / "results.json", results)
    shown = [path for table in tables for path in table.metrics]
    tested = [each.contrast.metric for table in tables for each in table.contrasts]
    paths = list(dict.fromkeys(filter(None, shown + tested)))
    sets = dict.fromkeys(path.partition("retrieval.")[0] + "retrieval" for path in paths if "retrieval." in path)
    paths += [f"{each}.{count}" for each in sets for count in ("num_images", "num_texts")]  # recall is of so many
    _write(out / "results.csv", _csv(records, paths))
    finished = [(run.name, run.digest) for run in plan.runs if run.digest in metrics]
    data = plan.comparison.evaluate
    if (pictures := pictures_csv(KeptRanks(folders, data), finished, paths, data)) is not None:
        _write(out / "pictures.csv", pictures)
    parts = [markdown(table) for table in tables]
    if sequences:
        parts.append(sequence_markdown(sequences, plan.comparison.tasks, plan.comparison.task_metric))
        _write(out / "tasks.csv", sequence_csv(sequences, plan.comparison.tasks))
    _write(out / "table.md", "\n".join(parts))
    if any(table.contrasts for table in tables):
        _write(out / "contrasts.csv", contrasts_csv([(table.title, table.contrasts) for table in tables]))
    try:
        from cmapkd.compare.plots import draw_plots
    except ImportError as error:
        return (), f"no plots ({error}): {install_advice('plots')}, and run again; the rest is complete"
    return tuple(draw_plots(plan, tables, folders, out / "plots")), None


def write_json(path: Path, values: Any) -> None:
    """Writes a JSON file whole: under another name first."""
    _write(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    write_text(path, text)


def _records(
    plan: Plan,
    metrics: Mapping[str, dict[str, Any]],
    errors: Mapping[str, str],
    folders: Mapping[str, Path],
    out: Path,
) -> list[dict[str, Any]]:
    """One record a run, with the first row that it stands in, and all of them."""
    places: dict[str, list[dict[str, Any]]] = {}
    for table in plan.tables:
        for row in table.rows:
            axes = {key: value for key, value in row.coordinates.items() if key != "arm"}
            for chain in map(row.chain, row.runs):
                for number, run in enumerate(chain, 1):
                    told = f" (run {number} of {len(chain)})" * (number < len(chain))  # the last one is the row's own
                    arm = row.coordinates.get("arm")
                    named = {"row": row.label + told, "arm": arm and arm + told}
                    places.setdefault(run.digest, []).append({"table": table.title, **named, "axes": axes})
    records = []
    for run in plan.runs:
        done = metrics.get(run.digest, {})
        first = places[run.digest][0]
        records.append(
            {
                "run": run.name,
                "folder": folders[run.digest].relative_to(out).as_posix(),
                **{key: first[key] for key in ("row", "arm", "axes")},
                "seed": run.config.seed,
                "status": "finished" if done else "failed" if run.digest in errors else "missing",
                "error": errors.get(run.digest),
                "method": run.config.method.name,
                "steps": done.get("steps"),
                "batch_size": done.get("batch_size"),
                "train_seconds": done.get("train_seconds"),
                "seconds_per_step": seconds_per_step(done),
                "peak_memory_bytes": done.get("peak_memory_bytes"),
                "extra_params": extra_parameters(done),
                "best_step": done.get("best_step"),
                "evaluated_on": done.get("evaluated_on"),
                "student": done.get("student"),
                "teacher": done.get("teacher"),
                "rows": places[run.digest],
            }
        )
    return records


def _csv(records: list[dict[str, Any]], metrics: list[str]) -> str:
    axes = list(dict.fromkeys(key for record in records for key in record["axes"]))
    axes = [key for key in axes if any(record["axes"].get(key) != record.get(key) for record in records)]
    names = [f"{key} (axis)" if records and key in records[0] else key for key in axes]
    plain = ("steps", "batch_size", "train_seconds", "seconds_per_step", "peak_memory_bytes", "extra_params")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "row", "arm", *names, "method", "seed", "status", *metrics, "params", *plain, "error"])
    for record in records:
        cells = (
            [record[key] for key in ("run", "row", "arm")]
            + [record["axes"].get(key) for key in axes]
            + [record[key] for key in ("method", "seed", "status")]
            + [lookup(record["student"], path) for path in metrics]
            + [(record["student"] or {}).get("params"), *(record[key] for key in plain), record["error"]]
        )
        writer.writerow(map(_rounded, cells))
    return text.getvalue()


def _rounded(value: Any) -> Any:
    """A number without the last bits of its arithmetic: 0.11, not 0.11000000000000001. Anything else as it is."""
    return round(value, 10) if isinstance(value, float) else value


def _plain_table(table: TableSummary) -> dict[str, Any]:
    return {
        "title": table.title,
        "heading": table.heading,
        "reference": table.reference_name,
        "gap_from": table.gap_name,
        "plateau": table.plateau,
        "metrics": list(table.metrics),
        "teachers": {
            row.label: {path: cell.summary.mean if cell.summary else None for path, cell in row.cells.items()}
            for row in table.teachers
        },
        "rows": [_plain_row(row) for row in table.rows],
        "contrasts": [plain_contrast(tested) for tested in table.contrasts],
        "notes": list(table.notes),
    }


def _plain_row(row: RowSummary) -> dict[str, Any]:
    assert row.row is not None
    return {
        "row": row.label,
        "coordinates": row.row.coordinates,
        "is_reference": row.is_reference,
        "runs": {seed: run.name for seed, run in row.row.runs.items()},
        "errors": row.errors,
        "off_plateau": row.off_plateau,
        "costs": {name: _plain(cost) for name, cost in row.costs.items()},
        "metrics": {
            path: {
                "values": cell.values,
                "summary": _plain(cell.summary),
                "difference": _plain_difference(cell.difference),
                "two_way": _plain_estimate(cell.two_way),
                "gap_closed": {
                    "values": cell.gap,
                    "summary": _plain(summarize(cell.gap.values())),
                    "remark": (cell.gap_start and cell.gap_start.note) or None,
                },
            }
            for path, cell in row.cells.items()
        },
    }


def _plain(value: Summary | None) -> dict[str, Any] | None:
    return None if value is None else asdict(value)


def _plain_difference(value: PairedDifference | None) -> dict[str, Any] | None:
    return None if value is None else asdict(value) | {"interval": value.interval}


def _plain_estimate(value: Estimate | None) -> dict[str, Any] | None:
    return None if value is None else asdict(value) | {"interval": value.interval}


# ------------------------------------------------------------------------------------------------ for reading


def markdown(table: TableSummary) -> str:
    """The table in Markdown, its notes below."""
    lines = [f"## {in_markdown(table.heading)}", ""] if table.heading else []
    lines += [*_markdown_table(*_columns(table)), ""]
    if table.contrasts:
        lines += [*_markdown_table(list(HEAD), _contrast_rows(table)), ""]
    return "\n".join([*lines, *(f"- {in_markdown(note)}" for note in _all_notes(table)), ""])


def _markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(map(in_markdown, head)) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return lines + ["| " + " | ".join(map(in_markdown, row)) + " |" for row in rows]


def _contrast_rows(table: TableSummary) -> list[list[str]]:
    digits = _digits(table)
    metrics = [tested.contrast.metric for tested in table.contrasts]
    return contrast_rows(table.contrasts, list(map(metric_label, metrics)), [digits.get(each, 2) for each in metrics])


def _all_notes(table: TableSummary) -> list[str]:
    return [*table.notes, *contrast_notes(table.contrasts)]


def rich_contrasts(table: TableSummary) -> Table:
    """The declared contrasts for a terminal, without the columns that a terminal is too narrow for."""
    shown = Table(title=Text("declared contrasts"))
    kept = [place for place, name in enumerate(HEAD) if name not in ("covers", "p", "smallest")]
    for place in kept:
        shown.add_column(HEAD[place], justify="left" if not place else "right", no_wrap=bool(place))
    for row in _contrast_rows(table):
        shown.add_row(*(Text(printable(row[place])) for place in kept))
    return shown


def rich_table(table: TableSummary) -> Table:
    """The table for a terminal: differences stand under their values."""
    shown = Table(
        title=Text(printable(table.heading)) if table.heading else None,
        show_lines=any(row.row and not row.is_reference for row in table.rows),
    )
    shown.add_column("arm")
    for path in table.metrics:
        shown.add_column(metric_label(path), justify="right", no_wrap=True)
    gap, plateau, costs = _has_gap(table), table.plateau is not None, _costs(table)[:1]  # a terminal is narrow
    for name in [*["off plateau"] * plateau, *["gap closed"] * gap, *costs]:
        shown.add_column(name, justify="right", no_wrap=True)
    for row in (*table.teachers, *table.rows):
        cells = [_marked(row)]
        for path, digits in _digits(table).items():
            cell = row.cells[path]
            lines = [_value(cell.summary, digits, median=row.median_shown(path))]
            cells.append("\n".join([*lines, *_difference(cell, digits, labelled=True)]))
        cells += [_off_plateau(row)] * plateau + ([_gap(row, table)] if gap else [])
        cells += [_cost(row, name) for name in costs]
        shown.add_row(*(Text(printable(cell)) for cell in cells))
    return shown


def _columns(table: TableSummary) -> tuple[list[str], list[list[str]]]:
    compared = {path: any(row.cells[path].difference for row in table.rows) for path in table.metrics}
    gap, plateau, costs = _has_gap(table), table.plateau is not None, _costs(table)
    head = ["arm"]
    for path in table.metrics:
        intervals = "[95 %]" + ", and pictures [95 %]" * any(row.cells[path].two_way for row in table.rows)
        head += [metric_label(path)] + [f"− {table.reference_name} {intervals}, wins"] * compared[path]
    head += ["off plateau"] * plateau
    head += ([f"gap closed from {table.gap_name} ({metric_label(table.metrics[0])})"] if gap else []) + costs
    rows = []
    for row in (*table.teachers, *table.rows):
        cells = [_marked(row)]
        for path, digits in _digits(table).items():
            cell = row.cells[path]
            cells.append(_value(cell.summary, digits, median=row.median_shown(path)))
            if compared[path]:
                cells.append(", ".join(_difference(cell, digits)))
        cells += [_off_plateau(row)] * plateau + ([_gap(row, table)] if gap else [])
        rows.append(cells + [_cost(row, name) for name in costs])
    return head, rows


def _marked(row: RowSummary) -> str:
    return row.label + " (reference)" * row.is_reference + f" ({len(row.errors)} failed)" * bool(row.errors)


def _digits(table: TableSummary) -> dict[str, int]:
    """Decimals of each metric: three figures or so."""
    digits = {}
    for path in table.metrics:
        largest = max((abs(value) for row in table.rows for value in row.cells[path].values.values()), default=0.0)
        digits[path] = 0 if largest >= 1000 else 1 if largest >= 10 else 2 if largest >= 1 else 4
    return digits


def _value(summary: Summary | None, digits: int, *, median: bool = False) -> str:
    if summary is None:
        return "-"
    deviation = "" if summary.deviation is None else f" ± {summary.deviation:z.{digits}f}"
    return f"{summary.mean:z.{digits}f}{deviation}" + (f" (median {summary.median:z.{digits}f})" if median else "")


def _difference(cell: Cell, digits: int, *, labelled: bool = False) -> list[str]:
    """The difference with its interval over seeds, that over seeds and pictures, and the seeds won.

    Args:
        labelled: each part says what it is, as no head of a column does.
    """
    difference = cell.difference
    if difference is None:
        return []
    shown, count = ["difference " * labelled + f"{difference.mean:+z.{digits}f}"], len(difference.seeds)
    if difference.interval is not None:
        interval = _interval(difference.interval, digits)
        shown = [*shown, f"seeds {interval}"] if labelled else [f"{shown[0]} {interval}"]
    elif difference.spreadless:
        none = f"no spread in {count} seeds"
        shown = [*shown, none] if labelled else [f"{shown[0]} ({none})"]
    if cell.two_way is not None:
        shown.append("and pictures " * labelled + _interval(cell.two_way.interval, digits))
    return [*shown, "won " * labelled + f"{difference.wins}/{count}"]


def _interval(interval: tuple[float, float], digits: int) -> str:
    low, high = interval
    return f"[{low:+z.{digits}f}, {high:+z.{digits}f}]"


def _off_plateau(row: RowSummary) -> str:
    return "" if row.off_plateau is None else "{}/{}".format(*row.off_plateau)


def _has_gap(table: TableSummary) -> bool:
    """Whether a gap is shown, or withheld."""
    return bool(table.metrics) and any(row.cells[table.metrics[0]].gap_start for row in table.rows)


def _gap(row: RowSummary, table: TableSummary) -> str:
    if row.row is None or row.starts_gap:
        return ""
    cell = row.cells[table.metrics[0]]
    if cell.gap_start is not None and cell.gap_start.withheld:
        return "withheld"
    summary = summarize(100 * share for share in cell.gap.values())
    return "" if summary is None else _value(summary, 0) + " %"


def _costs(table: TableSummary) -> list[str]:
    return [name for name in COSTS if any(name in row.costs for row in table.rows)]


def _cost(row: RowSummary, name: str) -> str:
    if name not in row.costs:
        return ""
    mean = row.costs[name].mean
    return f"{mean:,.0f}" if mean >= 100 else f"{mean:.3g}"


def shown_tables(tables: Iterable[TableSummary]) -> Iterable[Table | str]:
    """What is printed: each table, then its notes."""
    for table in tables:
        yield rich_table(table)
        if table.contrasts:
            yield rich_contrasts(table)
        yield printable("\n".join(_all_notes(table)))

"""Scores and verdicts of a finished comparison, in the two small files of docs/results that its page reads.

    uv run python benchmarks/keep_comparison.py runs/few_answers docs/results/generative_few_answers

Writes NAME.csv, a row for each finished run without what names a machine's folders, and NAME.json: the declaration, the
teachers' scores, and the contrasts that were declared, under "arm - against" and the metric.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LEFT_OUT = ("run", "row", "status", "error")
NUMBERS = ("difference", "low", "high", "error", "degrees", "p", "p_holm", "p_equal", "p_equal_holm", "smallest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the comparison")
    parser.add_argument("name", type=Path, help="of the two files, without an ending")
    arguments = parser.parse_args()
    runs = rows_of(arguments.folder / "results.csv")
    write_rows(arguments.name.with_suffix(".csv"), [run for run in runs if run["status"] == "finished"])
    told = json.loads((arguments.folder / "results.json").read_text(encoding="utf-8"))
    kept = {
        "comparison": told["comparison"] | {"base": without_folders(told["comparison"]["base"])},
        "teachers": teachers_of(told["tables"]),
        "contrasts": contrasts_of(arguments.folder / "contrasts.csv"),
        "environment": {key: value for key, value in told["environment"].items() if key != "command"},
    }
    text = json.dumps(kept, indent=1, ensure_ascii=False)
    arguments.name.with_suffix(".json").write_text(text + "\n", encoding="utf-8")


def teachers_of(tables: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """By role, the first word of `teacher tiny:base`; a role's second teacher, or second test, has its whole name."""
    found: dict[str, Any] = {}
    for told, scores in (each for table in tables for each in table["teachers"].items()):
        role, _, name = told.partition(" ")
        key = role if found.get(role, {}).get("name", name) == name else told
        found[key] = {"name": name, **scores}
    return found


def without_folders(base: str) -> str:
    """A recipe by its name, or a file by its name and its folder's: where the project lay is nobody's business."""
    path = Path(base)
    return f"{path.parent.name}/{path.name}" if path.is_absolute() else base


def rows_of(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def write_rows(path: Path, runs: list[dict[str, str]]) -> None:
    columns = [name for name in runs[0] if name not in LEFT_OUT]
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(runs)


def contrasts_of(path: Path) -> dict[str, dict[str, Any]]:
    """By the two arms and by metric, numbers as such."""
    kept: dict[str, dict[str, Any]] = {}
    for row in rows_of(path):
        found: dict[str, Any] = {key: value for key, value in row.items() if value and key not in ("arm", "against")}
        found |= {key: float(found[key]) for key in NUMBERS if key in found}
        kept.setdefault(f"{row['arm']} - {row['against']}", {})[row["metric"]] = found
    return kept


if __name__ == "__main__":
    main()

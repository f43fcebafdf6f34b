"""Every measured number of README and docs against the committed files: tables by their ties, sentences by claims.

    uv run python benchmarks/tables.py            # fails, and says where, if a number is not its file's
    uv run python benchmarks/tables.py --write    # puts the files' numbers into the tables

A **tie** is a comment directly above a table. Its columns say, in the words of benchmarks/measured.py, what each column
but the first holds; a row's first cell names its arm, or `rows` does:

    <!-- table: fitnet.csv
    rows: {KD: no hint}
    columns:
    - of(R1)
    - of(R1) - of(R1, arm="no hint")
    -->

Another tie is of declared contrasts, all of a file of benchmarks/keep_comparison.py, one a row and none left out: the
first cell says `a - b`, the second the metric, then come the difference with its interval, the smallest of interest and
the verdict.

    <!-- contrasts: biomedcoop.json -->

`rows` may give an arm, several filters, or a list with one template a column; null leaves cells to the author. Other
tables with digits are marked `<!-- facts -->` (settings, sizes, published numbers) or
`<!-- machine: FILE.json; reason -->` (times and sizes of one machine, to be read there). Where intervals cover fewer
than five seeds, the words above the table must say "exploratory, uncorrected".

A **claim** (docs/results/claims.yaml) is a stretch of a sentence with expressions in place of its numbers. Decimals,
per cents and points in prose belong to a claim, or to `facts` there: settings, sizes, versions, numbers that a test
holds or that others published.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from measured import ROOT, Asker, UnknownNumberError

CLAIMS = ROOT / "docs" / "results" / "claims.yaml"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RULE = re.compile(r"\|[ :|-]+\|$")
NOT_PROSE = re.compile(r"`[^`]*`|\]\([^)]*\)|https?://\S+|\[?(?:arXiv:)?\d{4}\.\d{4,5}\]?")
MEASURED = re.compile(r"(?<![\w.])\d[\d,]*\.\d+(?![\w.]*\d)|\d+ %|\d+ points")
CAUTION = "exploratory, uncorrected"
FEW_SEEDS = re.compile(r"\], \d/[1-4]$")


@dataclass
class Table:
    """Of one document: its tie or mark, and its rows of cells."""

    line: int  # of the header, from 1
    above: str  # the words since the heading, table or code before it
    mark: dict[str, Any]
    rows: list[list[str]]

    @property
    def has_numbers(self) -> bool:
        cells = (NOT_PROSE.sub("", cell) for row in self.rows for cell in row[1:])
        return any(any(letter.isdigit() for letter in cell) for cell in cells)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the files' numbers into the tables")
    write = parser.parse_args(arguments).write
    complaints = [complaint for path in DOCUMENTS for complaint in check_tables(path, write=write)]
    complaints += check_prose()
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


def check_tables(path: Path, *, write: bool = False) -> list[str]:
    """What is wrong with the tables of one document; with `write`, numbers are put right and only the rest is told."""
    lines = path.read_text(encoding="utf-8").split("\n")
    complaints = []
    for table in tables(lines):
        try:
            wrong = list(_compare(table))
        except (UnknownNumberError, yaml.YAMLError) as error:
            complaints.append(f"{_shown(path)}:{table.line}: {error}")
            continue
        for row, place, expected in wrong:
            if write and place:
                cells = table.rows[row]
                bold = "**" if cells[place].startswith("**") else ""
                cells[place] = f"{bold}{expected}{bold}"
                lines[table.line + 1 + row] = "| " + " | ".join(cells) + " |"
            else:
                cell = table.rows[row][place]
                complaints.append(f"{_shown(path)}:{table.line + 2 + row}: {cell!r} should be {expected!r}")
    if write:
        path.write_text("\n".join(lines), encoding="utf-8")
    return complaints


def tables(lines: Sequence[str]) -> Iterator[Table]:
    """The tables outside of code, each with the comment that stands directly above it."""
    code = False
    for number, line in enumerate(lines):
        code ^= line.startswith("```")
        if code or not RULE.match(line) or not number:
            continue
        rows = []
        for body in lines[number + 1 :]:
            if not body.startswith("|"):
                break
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", body)[1:-1]])
        yield Table(number, _words(lines[: number - 1]), _mark(lines[: number - 1]), rows)


def _words(above: Sequence[str]) -> str:
    """The prose that ends the lines above a table, back to a heading, another table or code."""
    text = re.sub(r"<!--.*?-->", "", "\n".join(above), flags=re.DOTALL)
    return " ".join(re.split(r"^(?:#.*|\|.*|```)$", text, flags=re.MULTILINE)[-1].split())


def _mark(above: Sequence[str]) -> dict[str, Any]:
    """The comment that ends the lines above a table, as YAML; empty if there is none."""
    if not above or not above[-1].endswith("-->"):
        return {}
    start = next(place for place in reversed(range(len(above))) if above[place].startswith("<!--"))
    text = "\n".join(above[start:]).removeprefix("<!--").removesuffix("-->")
    if text.strip() == "facts":
        return {"facts": True}
    found = yaml.safe_load(text.strip())
    return found if isinstance(found, dict) else {}


def _compare(table: Table) -> Iterator[tuple[int, int, str]]:
    """Row, column and expected text of every cell that is not its file's; column 0 for a table as a whole."""
    mark = table.mark
    if "table" in mark:
        for number, cells in enumerate(table.rows):
            for place, expected in _expected(mark, cells):
                if FEW_SEEDS.search(expected) and CAUTION not in table.above:
                    raise UnknownNumberError(
                        f"intervals over fewer than five seeds: the words above must say: {CAUTION}"
                    )
                if _plain(cells[place]) != _plain(expected):
                    yield number, place, expected
    elif "contrasts" in mark:
        yield from _compare_contrasts(mark["contrasts"], table.rows)
    elif "machine" in mark:
        file, _, reason = str(mark["machine"]).partition(";")
        Asker(file.strip()).number()
        if not reason.strip():
            raise UnknownNumberError("a table from a machine says why: <!-- machine: FILE.json; reason -->")
    elif "facts" not in mark and table.has_numbers:
        raise UnknownNumberError(
            "a table with numbers and no tie. Tie it to its file (benchmarks/tables.py says how), or mark it "
            "<!-- facts --> if nothing in it was measured"
        )


def _compare_contrasts(file: str, rows: Sequence[Sequence[str]]) -> Iterator[tuple[int, int, str]]:
    """As `_compare`, of a table of declared contrasts."""
    asker = Asker(file)
    declared = {(name, metric) for name, of_name in asker.number("contrasts").items() for metric in of_name}
    told = [(_plain(cells[0]), _plain(cells[1])) for cells in rows]
    if {*told} != declared or len(told) != len(declared):
        listed = "; ".join(f"{name}, {metric}" for name, metric in sorted(declared))
        raise UnknownNumberError(f"the table must hold each declared contrast of {file} once: {listed}")
    for number, (name, metric) in enumerate(told):
        found = asker.number("contrasts", name, metric)
        interval, smallest = asker.contrast(name, metric), f"± {found['smallest']:g}"
        verdict = "too few seeds" if "a verdict needs" in found.get("reason", "") else found["verdict"]
        digits = "+.3f" if found["smallest"] < 0.1 else "+.1f"
        expected = (format(interval, digits), smallest, verdict)
        for place, words in enumerate(expected, start=2):
            if _plain(rows[number][place]) != _plain(words):
                yield number, place, words


def _expected(mark: Mapping[str, Any], cells: Sequence[str]) -> Iterator[tuple[int, str]]:
    """The place and text of every cell of a row that a tie speaks of; empty cells are nobody's."""
    label = _plain(re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", cells[0]))
    row = mark.get("rows", {}).get(label, label)
    if row is None:
        return
    columns = row if isinstance(row, list) else mark["columns"]
    where = row if isinstance(row, dict) else {"arm": label if isinstance(row, list) else row}
    names = {**where, "row": where.get("arm", label)}
    asker = Asker(mark["table"], {**mark.get("where", {}), **where}, names)
    if len(columns) != len(cells) - 1:
        raise UnknownNumberError(f"row {label!r} has {len(cells) - 1} cells after the first, its tie {len(columns)}")
    for place, column in enumerate(columns, start=1):
        if column is not None and cells[place]:
            template = str(column)
            yield place, asker.fill(template if "{" in template else f"{{{template}}}")


def check_prose() -> list[str]:
    """Claims that the documents do not hold, and measured numbers of their prose that no claim carries."""
    entries = yaml.safe_load(CLAIMS.read_text(encoding="utf-8"))
    everywhere = entries.pop("everywhere", [])
    complaints = [f"{_shown(path)} is not in {CLAIMS.name}" for path in DOCUMENTS if _shown(path) not in entries]
    for document, entry in entries.items():
        text = prose((ROOT / document).read_text(encoding="utf-8"))
        complaints += [f"{document}: {complaint}" for complaint in _check_claims(text, entry or {}, everywhere)]
    return complaints


def _check_claims(text: str, entry: Mapping[str, Any], everywhere: Sequence[str]) -> Iterator[str]:
    carried = [_spans(fact, text) for fact in everywhere]
    for fact in entry.get("facts", []):
        carried.append(_spans(fact, text))
        if not carried[-1]:
            yield f"the fact {fact!r} of {CLAIMS.name} is not in it"
    for claim in entry.get("claims", []):
        try:
            expected = _claimed(claim, entry)
        except UnknownNumberError as error:
            yield str(error)
            continue
        carried.append(_spans(expected, text))
        if not carried[-1]:
            yield f"its files say {expected!r}, and the document has no such words"
    yield from (
        f"{stretch!r} has no claim" for stretch in _uncarried(text, [span for spans in carried for span in spans])
    )


def _spans(words: str, text: str) -> list[tuple[int, int]]:
    """Where words stand in a text, whatever their minus signs look like."""
    return [match.span() for match in re.finditer(re.escape(_minus(words)), _minus(text))]


def prose(text: str) -> str:
    """A document without code, comments and tables, its white space made one blank each."""
    text = re.sub(r"```.*?```|<!--.*?-->", " ", text, flags=re.DOTALL)
    return " ".join(" ".join(line for line in text.split("\n") if not line.startswith("|")).split())


def _uncarried(text: str, carried: Sequence[tuple[int, int]]) -> Iterator[str]:
    hidden = NOT_PROSE.sub(lambda match: "_" * len(match.group()), text)
    for match in MEASURED.finditer(hidden):
        if not any(start <= match.start() and match.end() <= end for start, end in carried):
            yield text[max(0, match.start() - 40) : match.end() + 20]


def _claimed(claim: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    names: dict[str, Any] = {}
    document = Asker(entry.get("from", ""), {}, names)
    for name, expression in entry.get("let", {}).items():
        names[name] = document.ask(expression)
    asker = Asker(claim.get("from", document.file), claim.get("where", {}), names)
    for name, expression in claim.get("let", {}).items():
        names[name] = asker.ask(expression)
    return asker.fill(claim["says"])


def _plain(cell: str) -> str:
    return _minus(cell.replace("**", "").replace("`", ""))


def _minus(text: str) -> str:
    return text.replace("−", "-")


def _shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


if __name__ == "__main__":
    sys.exit(main())

"""Numbers of committed results, asked for by short expressions, and written as the docs write them.

    of(R1, arm="cmapkd", student="5 x")            scores of one arm by seed: "36.6 ± 1.1"
    of(R1, training_steps=400)                     the same, by the column training.steps
    of(R1) - of(R1, arm="clip_kd")                 paired by seed: "+10.2 [9.6, 10.8], 5/5" (95 % t interval, wins)
    {(of(R1) - of(R1, arm="scratch")).low:.1f}     one number of them, within a template
    contrast("cmapkd - clip_kd", R1)               declared beforehand: "+10.2 [9.6, 10.8]" over seeds and pictures

Expressions are read as Python's syntax and carried out by hand: calls of the functions below, attributes of what they
give, + - * /, names and constants. Nothing else is allowed, so a document can run nothing.
"""

from __future__ import annotations

import ast
import csv
import json
import math
import operator
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from string import Formatter
from typing import Any

from cmapkd.compare.statistics import PairedDifference, paired_difference, summarize

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
TEACHER = "../../src/cmapkd/weights/scenes-teacher/scores.json"  # seen from RESULTS
WRITER = "../../src/cmapkd/weights/tiny-vlm-scenes-teacher/scores.json"
COLUMNS = {
    "R1": "retrieval.mean_r@1",
    "I2T_R10": "retrieval.i2t.r@10",
    "T2I_R10": "retrieval.t2i.r@10",
    "TOP1": "zero_shot.top1",
    "OOD_R1": "ood.retrieval.mean_r@1",
}
OPERATIONS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class UnknownNumberError(ValueError):
    """An expression that cannot be read, or that asks for what no file holds."""


def _signed(number: float, spec: str) -> str:
    text = format(number, spec)
    if not any(digit in text for digit in "123456789"):
        text = text.replace("-", "")
    return text.replace("-", "−")


def _cell(row: Mapping[str, Any], name: str) -> str:
    """Names of arguments have no dots: where no column has the name, the first underscore is one."""
    return str(row[name if name in row else name.replace("_", ".", 1)])


@dataclass(frozen=True)
class Scores:
    """One number a seed; written as mean ± sample deviation."""

    by_seed: Mapping[int, float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.by_seed.values())

    @property
    def median(self) -> float:
        return statistics.median(self.by_seed.values())

    @property
    def low(self) -> float:
        return min(self.by_seed.values())

    @property
    def high(self) -> float:
        return max(self.by_seed.values())

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.by_seed.values())

    @property
    def interval(self) -> Difference:
        """Of the mean, over seeds."""
        return self - Scores(dict.fromkeys(self.by_seed, 0.0))

    def __sub__(self, other: Scores) -> Difference:
        found = paired_difference(self.by_seed, other.by_seed)
        if found is None:
            raise UnknownNumberError("the two have no seed in common, so they have no paired difference")
        return Difference(found)

    def __mul__(self, factor: float) -> Scores:
        return Scores({seed: value * factor for seed, value in self.by_seed.items()})

    def __truediv__(self, divisor: float) -> Scores:
        return self * (1 / divisor)

    def __format__(self, spec: str) -> str:
        summary = summarize(self.by_seed.values())
        assert summary is not None
        text = _signed(summary.mean, spec or ".1f")
        return text if summary.deviation is None else f"{text} ± {format(summary.deviation, spec or '.1f')}"


@dataclass(frozen=True)
class Difference:
    """Of two arms, paired by seed; written as mean [95 % t interval], wins/seeds."""

    paired: PairedDifference

    @property
    def mean(self) -> float:
        return self.paired.mean

    @property
    def low(self) -> float:
        return self._interval[0]

    @property
    def high(self) -> float:
        return self._interval[1]

    @property
    def least(self) -> float:
        return min(self.paired.differences)

    @property
    def most(self) -> float:
        return max(self.paired.differences)

    @property
    def wins(self) -> int:
        return self.paired.wins

    @property
    def count(self) -> int:
        return len(self.paired.seeds)

    @property
    def _interval(self) -> tuple[float, float]:
        if self.paired.interval is None:
            raise UnknownNumberError("one seed, or seeds that agree, have no interval")
        return self.paired.interval

    def __format__(self, spec: str) -> str:
        spec = spec or "+.1f"
        text = _signed(self.mean, spec)
        if self.paired.spreadless:
            return f"{text} (no spread in {self.count} seeds), {self.wins}/{self.count}"
        if self.paired.interval is None:
            return text
        low, high = (_signed(bound, spec.lstrip("+")) for bound in self.paired.interval)
        return f"{text} [{low}, {high}], {self.wins}/{self.count}"


@dataclass(frozen=True)
class Listed:
    """Numbers in their order, such as those of all seeds: "2.9 / 0.7"."""

    numbers: tuple[float, ...]
    between: str = " / "

    def __format__(self, spec: str) -> str:
        return self.between.join(_signed(number, spec or ".1f") for number in self.numbers)


@dataclass(frozen=True)
class Spread:
    """A mean and a deviation that a file holds as such."""

    mean: float
    deviation: float | None

    def __format__(self, spec: str) -> str:
        text = _signed(self.mean, spec or ".1f")
        return text if self.deviation is None else f"{text} ± {format(self.deviation, spec or '.1f')}"


@dataclass(frozen=True)
class Bounds:
    """A difference with the interval that a file holds; written as mean [low, high]."""

    mean: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        spec = spec or "+.1f"
        low, high = (_signed(bound, spec.lstrip("+")) for bound in (self.low, self.high))
        return f"{_signed(self.mean, spec)} [{low}, {high}]"


@dataclass(frozen=True)
class Asker:
    """Carries out expressions on one file, within one row of a table, with names that were given.

    Attributes:
        file: of docs/results, unless an expression names another.
        where: what rows of a CSV must hold, unless an expression says otherwise; `arm` above all.
        names: further names, such as `row`.
    """

    file: str
    where: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, Any] = field(default_factory=dict)

    def fill(self, template: str) -> str:
        """A template with expressions in braces, each with a format if need be: `{of(R1).mean:.0f} %`."""
        parts = []
        for text, expression, spec, _ in Formatter().parse(template):
            parts.append(text)
            if expression is not None:
                parts.append(_written(self.ask(expression), spec or ""))
        return "".join(parts)

    def ask(self, expression: str) -> Any:
        try:
            return self._value(ast.parse(expression.strip(), mode="eval").body)
        except (SyntaxError, UnknownNumberError, ArithmeticError, KeyError, IndexError, TypeError) as error:
            raise UnknownNumberError(f"{expression!r} of {self.file}: {error}") from error

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                known = {"TEACHER": TEACHER, "WRITER": WRITER, **COLUMNS, **self.names}
                if name not in known:
                    raise UnknownNumberError(f"there is no {name!r}; known are {', '.join(known)}")
                return known[name]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self._value(operand)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATIONS:
                return OPERATIONS[type(op)](self._value(left), self._value(right))
            case ast.Attribute(value=value, attr=name) if not name.startswith("_"):
                return getattr(self._value(value), name)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if name in FUNCTIONS:
                given = {word.arg: self._value(word.value) for word in keywords if word.arg}
                return FUNCTIONS[name](self, *(self._value(each) for each in args), **given)
        raise UnknownNumberError(f"{ast.unparse(node)!r} is not allowed; there are {', '.join(FUNCTIONS)} and + - * /")

    def of(self, column: str, *, file: str | None = None, **where: Any) -> Scores:
        """A column by seed, of the rows that hold what `where` says; what it does not say is the table's row."""
        wanted = {**({} if file else self.where), **where}
        found: dict[int, float] = {}
        for row in _rows(file or self.file):
            if all(_cell(row, key) == str(value) for key, value in wanted.items()) and row[column] not in ("", None):
                if int(row["seed"]) in found:
                    raise UnknownNumberError(f"more than one row of seed {row['seed']} holds {wanted}: say which")
                found[int(row["seed"])] = float(row[column])
        if not found:
            raise UnknownNumberError(f"no row holds {wanted}")
        return Scores(found)

    def number(self, *path: str | int, file: str | None = None, otherwise: Any = None) -> Any:
        """What a JSON file holds at a path of keys and places; `otherwise`, if given, where it holds nothing."""
        value = _json(file or self.file)
        for key in path:
            if otherwise is not None and isinstance(value, dict) and key not in value:
                return otherwise
            value = value[key]
        return value

    def contrast(self, name: str, metric: str, *, file: str | None = None) -> Bounds:
        """A declared contrast, "arm - against", of a file that benchmarks/keep_comparison.py wrote."""
        found = self.number("contrasts", name, metric, file=file)
        return Bounds(found["difference"], found["low"], found["high"])

    def gap(self, scores: Scores, start: Scores, teacher: float) -> Scores:
        """(score - start) / (teacher - start) in per cent, of the seeds that both have."""
        seeds = scores.by_seed.keys() & start.by_seed.keys()
        return Scores(
            {seed: 100 * (scores.by_seed[seed] - (low := start.by_seed[seed])) / (teacher - low) for seed in seeds}
        )

    def along(self, short: Scores, long: Scores, share: float) -> Scores:
        """Between a short and a long run of each seed: short + share x (long - short)."""
        seeds = short.by_seed.keys() & long.by_seed.keys()
        return Scores({seed: (1 - share) * short.by_seed[seed] + share * long.by_seed[seed] for seed in seeds})


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "of": Asker.of,
    "number": Asker.number,
    "contrast": Asker.contrast,
    "gap": Asker.gap,
    "listed": lambda _, scores: Listed(tuple(scores.by_seed[seed] for seed in sorted(scores.by_seed))),
    "seeds": lambda _, numbers: Scores(dict(enumerate(numbers))),
    "all": lambda _, numbers: Listed(tuple(numbers), ", "),
    "gains": lambda _, curve: Listed(tuple(after - before for before, after in pairwise(curve.values()))[-3:], ", "),
    "before": lambda _, curve, value: max(int(place) for place, score in curve.items() if score < value),
    "after": lambda _, curve, value: min(int(place) for place, score in curve.items() if score >= value),
    "column": lambda _, rows, name, start=0: Scores(dict(enumerate(row[name] for row in rows[start:]))),
    "mean": lambda _, scores: scores.mean,
    "spread": lambda _, pair: Spread(*pair),
    "log": lambda _, number: math.log(number),
    "along": Asker.along,
}


def _written(value: Any, spec: str) -> str:
    if isinstance(value, float):
        return _signed(value, spec or ".1f")
    return format(value, spec)


def _rows(file: str) -> Iterable[Mapping[str, Any]]:
    return _json(file)["runs"] if file.endswith(".json") else _csv(file)


@cache
def _csv(file: str) -> list[dict[str, str]]:
    with _path(file).open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


@cache
def _json(file: str) -> Any:
    return json.loads(_path(file).read_text(encoding="utf-8"))


def _path(file: str) -> Path:
    path = RESULTS / file
    if not path.is_file():
        raise UnknownNumberError(f"docs/results has no {file}")
    return path

"""Drawings as SVG: pure functions of numbers. The one place that makes markup; every text in it is escaped here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from cmapkd.report.blocks import Cell, Figure, Table
from cmapkd.report.plain import shortened, visible

WIDTH = 340  # of every drawing, in its own units: text stays legible on a phone
COLOURS = 6
_POINTS = 400  # of a curve; longer ones keep the extremes of every bin
_LABEL = 24  # characters of a label
_ROW = 34  # of a dot plot: a line of text and the dots below it


@dataclass(frozen=True, slots=True)
class Dot:
    """A line of a dot plot."""

    label: str
    middle: float
    interval: tuple[float, float] | None = None
    values: tuple[float, ...] = ()
    colour: int = 0


@dataclass(frozen=True, slots=True)
class Curve:
    """Points of one colour and name; several curves may share both."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int = 0


@dataclass(frozen=True, slots=True)
class Mark:
    """A labelled point of a scatter plot."""

    label: str
    x: float
    y: float
    colour: int = 0


def dots(
    caption: str, rows: Sequence[Dot], *, unit: str, zero: bool = False, least: float = 0.0, wide: bool = False
) -> Figure:
    """Each row a dot with its interval, and its single values faint.

    Args:
        zero: whether a line stands at 0, for differences.
        least: what the axis spans at least, so that a difference of nothing does not fill it.
    """
    everything = [value for row in rows for value in (row.middle, *(row.interval or ()), *row.values)] + [0.0] * zero
    axis = _Axis.over(everything, 14, WIDTH - 14, least=least)
    height = _ROW * len(rows) + 40
    parts = [*_grid_x(axis, 4, height - 32)]
    if zero:
        parts.append(_line(axis(0), 4, axis(0), height - 32, "zero"))
    for place, row in enumerate(rows):
        y = 26 + _ROW * place
        parts.append(_text(4, y - 10, shortened(row.label, 2 * _LABEL), "label", full=row.label))
        parts += [_tag("circle", cx=axis(value), cy=y, r=3, class_=f"faint f{row.colour}") for value in row.values]
        if row.interval is not None:
            low, high = (axis(bound) for bound in row.interval)
            parts += [_line(low, y, high, y, f"bar s{row.colour}")]
            parts += [_line(end, y - 4, end, y + 4, f"bar s{row.colour}") for end in (low, high)]
        parts.append(_tag("circle", cx=axis(row.middle), cy=y, r=5, class_=f"f{row.colour}"))
    parts.append(_text(axis.middle, height - 4, unit, "unit", anchor="middle"))
    heads = ["", unit, "95 % interval", "single values"]
    table = Table(caption, heads, [_dot_row(row) for row in rows])
    said = "; ".join(f"{row.label}: {shown(row.middle)}{_interval(row.interval)}" for row in rows)
    return Figure(_svg(height, f"{caption}. {said}", parts), caption, table, wide=wide)


def gap_bar(caption: str, start: tuple[str, float], own: tuple[str, float], end: tuple[str, float]) -> Figure:
    """A bar from the baseline's number to the teacher's, filled as far as the student comes."""
    axis = _Axis.over([start[1], own[1], end[1]], 20, WIDTH - 20)
    left, right, here = axis(start[1]), axis(end[1]), axis(own[1])
    parts = [_tag("rect", x=left, y=34, width=max(0.0, right - left), height=14, class_="track")]
    parts.append(_tag("rect", x=min(left, here), y=34, width=abs(here - left), height=14, class_="f0"))
    for (label, value), y, colour in ((start, 70, 2), (own, 22, 0), (end, 70, 1)):
        x = axis(value)
        anchor = "start" if x < WIDTH / 3 else "end" if x > 2 * WIDTH / 3 else "middle"
        parts.append(_line(x, 28, x, 54, f"bar s{colour}"))
        parts.append(_text(x, y, f"{shortened(label, 16)} {shown(value)}", "label strong", anchor=anchor, full=label))
    rows = [[Cell(label), Cell(shown(value), value)] for label, value in (start, own, end)]
    said = ", ".join(f"{label} {shown(value)}" for label, value in (start, own, end))
    return Figure(_svg(80, f"{caption}. {said}", parts), caption, Table(caption, ["", "score"], rows))


def scatter(
    caption: str, marks: Sequence[Mark], *, x_unit: str, y_unit: str, least: float = 5.0, wide: bool = False
) -> Figure:
    """Labelled points over a logarithmic x axis; `x` is positive, and y has a range of `least` or more."""
    height = 240
    across = _Axis.over([mark.x for mark in marks], 46, WIDTH - 26, log=True)
    up = _Axis.over([mark.y for mark in marks], height - 46, 22, least=least)
    parts = [*_grid_x(across, 10, height - 40), *_grid_y(up, 40, WIDTH - 10)]
    taken: list[tuple[float, float]] = []
    for mark in marks:
        x, y = across(mark.x), up(mark.y)
        parts.append(_tag("circle", cx=x, cy=y, r=5, class_=f"f{mark.colour}"))
        beside = y + 4
        while any(abs(beside - other) < 12 and abs(x - near) < 110 for near, other in taken):
            beside += 12
        taken.append((x, beside))
        left = x > WIDTH * 0.55
        label = shortened(mark.label, _LABEL)
        at = x - 9 if left else x + 9
        parts.append(_text(at, beside, label, "label", anchor="end" if left else "start", full=mark.label))
    parts.append(_text(across.middle, height - 6, x_unit, "unit", anchor="middle"))
    parts.append(_text(4, 12, y_unit, "unit"))
    rows = [[Cell(mark.label), Cell(shown(mark.x), mark.x), Cell(shown(mark.y), mark.y)] for mark in marks]
    said = "; ".join(f"{mark.label}: {shown(mark.x)} {x_unit}, {shown(mark.y)} {y_unit}" for mark in marks)
    return Figure(
        _svg(height, f"{caption}. {said}", parts), caption, Table(caption, ["", x_unit, y_unit], rows), wide=wide
    )


def lines(caption: str, curves: Sequence[Curve], *, x_unit: str = "step", dotted: bool = False) -> Figure:
    """Curves over steps; long ones keep the extremes of each bin."""
    height = 170
    kept = [(curve, thinned(curve.points)) for curve in curves if curve.points]
    across = _Axis.over([x for _, points in kept for x, _ in points], 50, WIDTH - 14)
    up = _Axis.over([y for _, points in kept for _, y in points], height - 36, 14)
    parts = [*_grid_x(across, 8, height - 32), *_grid_y(up, 44, WIDTH - 8)]
    for curve, points in kept:
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
        parts.append(_tag("polyline", points=path, class_=f"curve s{curve.colour}"))
        if dotted or len(points) == 1:
            parts += [_tag("circle", cx=across(x), cy=up(y), r=3, class_=f"f{curve.colour}") for x, y in points]
    parts.append(_text(across.middle, height - 4, x_unit, "unit", anchor="middle"))
    heads = ["", f"first {x_unit}", "first", f"last {x_unit}", "last", "lowest", "highest"]
    rows = [_curve_row(curve) for curve, _ in kept]
    said = "; ".join(
        f"{curve.label}: from {shown(curve.points[0][1])} to {shown(curve.points[-1][1])}" for curve, _ in kept
    )
    legend = tuple(dict.fromkeys((curve.colour, curve.label) for curve, _ in kept))
    return Figure(_svg(height, f"{caption}. {said}", parts), caption, Table(caption, heads, rows), legend)


def stacked(caption: str, names: Sequence[str], steps: Sequence[float], shares: Sequence[Sequence[float]]) -> Figure:
    """Shares of one over steps, on top of each other.

    Args:
        shares: for each step one share of each name; they sum to 1.
    """
    height = 190
    across = _Axis.over(steps, 50, WIDTH - 14)
    up = _Axis(0.0, 1.0, height - 36, 14)
    parts: list[Markup] = []
    below = [0.0] * len(steps)
    for number in range(len(names)):
        above = [low + each[number] for low, each in zip(below, shares, strict=True)]
        there = [f"{across(x):.1f},{up(y):.1f}" for x, y in zip(steps, above, strict=True)]
        back = [f"{across(x):.1f},{up(y):.1f}" for x, y in reversed(list(zip(steps, below, strict=True)))]
        parts.append(_tag("polygon", points=" ".join(there + back), class_=f"area f{number % COLOURS}"))
        below = above
    parts += [*_grid_y(up, 44, WIDTH - 8), *_grid_x(across, 8, height - 32)]
    parts.append(_text(across.middle, height - 4, "step", "unit", anchor="middle"))
    last = shares[-1]
    rows = [[Cell(name), Cell(shown(share, 3), share)] for name, share in zip(names, last, strict=True)]
    said = ", ".join(f"{name} {share:.3f}" for name, share in zip(names, last, strict=True))
    legend = tuple((number % COLOURS, name) for number, name in enumerate(names))
    table = Table(caption, ["", "share at the last step"], rows)
    return Figure(_svg(height, f"{caption}. At the last step: {said}", parts), caption, table, legend)


def heat(caption: str, names: Sequence[str], counts: Sequence[Sequence[int]]) -> Figure:
    """A confusion matrix: rows the truth, columns the prediction, darkness the share of the row."""
    side = min(26.0, (WIDTH - 90) / max(1, len(names)))
    height = int(30 + side * len(names))
    parts = [_text(88 + side * len(names) / 2, 12, "predicted", "unit", anchor="middle")]
    for row, of_row in enumerate(counts):
        total = max(1, sum(of_row))
        y = 20 + side * row
        parts.append(_text(84, y + side * 0.7, shortened(names[row], 14), "label small", anchor="end", full=names[row]))
        for column, count in enumerate(of_row):
            title = f"{names[row]} taken for {names[column]}: {count} of {total}"
            box = _tag(
                "rect", _tag("title", title), x=88 + side * column, y=y, width=side - 1, height=side - 1,
                class_="right" if row == column else "wrong", fill_opacity=f"{max(0.04, count / total):.2f}",
            )  # fmt: skip
            parts.append(box)
    rows = [
        [Cell(name), *(Cell(str(count), count) for count in of_row)] for name, of_row in zip(names, counts, strict=True)
    ]
    right = sum(of_row[place] for place, of_row in enumerate(counts))
    said = f"{right} of {sum(map(sum, counts))} on the diagonal"
    return Figure(
        _svg(height, f"{caption}. {said}", parts), caption, Table(caption, ["truth", *names], rows), wide=True
    )


def reliability(
    caption: str, bins: Mapping[str, Sequence[tuple[float, float, int]]], colours: Mapping[str, int]
) -> Figure:
    """Accuracy against confidence, both 0 to 100 %, by model; the diagonal is a calibrated one.

    Args:
        colours: of each name.
        bins: name -> (mean confidence, accuracy, pictures) of each bin that has pictures.
    """
    height = 240
    across, up = _Axis(0.0, 100.0, 46, WIDTH - 16), _Axis(0.0, 100.0, height - 40, 14)
    parts = [*_grid_x(across, 10, height - 36), *_grid_y(up, 40, WIDTH - 10)]
    parts.append(_line(across(0), up(0), across(100), up(100), "zero"))
    rows, said = [], []
    for name, points in bins.items():
        number = colours.get(name, COLOURS - 1)
        most = max((count for *_, count in points), default=1)
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y, _ in points)
        parts.append(_tag("polyline", points=path, class_=f"curve s{number}"))
        for x, y, count in points:
            size = 2 + 5 * math.sqrt(count / most)
            parts.append(_tag("circle", cx=across(x), cy=up(y), r=f"{size:.1f}", class_=f"f{number}"))
            rows.append([Cell(name), *(Cell(shown(each), each) for each in (x, y)), Cell(str(count), count)])
        said.append(f"{name}: {len(points)} bins")
    parts.append(_text(across.middle, height - 6, "confidence, %", "unit", anchor="middle"))
    parts.append(_text(4, 10, "accuracy, %", "unit"))
    table = Table(caption, ["", "confidence, %", "accuracy, %", "pictures"], rows)
    legend = tuple((colours.get(name, COLOURS - 1), name) for name in bins)
    return Figure(_svg(height, f"{caption}. {'; '.join(said)}", parts), caption, table, legend)


def shown(value: float, figures: int = 4) -> str:
    """A number to be read: at most so many figures, thousands set apart."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{figures}g}" if abs(value) >= 1e-4 else f"{value:.1e}"


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most so many points: of every bin of a long curve its lowest and its highest, in their order."""
    if len(points) <= _POINTS:
        return list(points)
    size = -(-2 * len(points) // _POINTS)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return kept


# ------------------------------------------------------------------------------------------------ parts of drawings


@dataclass(frozen=True, slots=True)
class _Axis:
    """From numbers to places."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, *, log: bool = False, least: float = 0.0) -> _Axis:
        """An axis that holds all values, with a little room at both ends."""
        numbers = [math.log10(value) if log else value for value in values] or [0.0]
        low, high = min(numbers), max(numbers)
        more = max(0.0, least - (high - low)) / 2
        low, high = low - more, high + more
        room = 0.06 * (high - low) or max(0.5 if log else 0.05 * abs(high), 1e-9)
        return cls(low - room, high + room, start, end, log)

    def __call__(self, value: float) -> float:
        number = math.log10(value) if self.log else value
        span = self.high - self.low
        share = (number - self.low) / span if span else 0.5
        return round(self.start + share * (self.end - self.start), 1)

    @property
    def middle(self) -> float:
        return (self.start + self.end) / 2

    def ticks(self, count: int = 4) -> list[float]:
        """Round numbers within."""
        if self.log:
            exponents = range(math.floor(self.low) - 1, math.ceil(self.high) + 1)
            tried = [digit * 10.0**exponent for exponent in exponents for digit in (1, 2, 5)]
            return [value for value in tried if self.low <= math.log10(value) <= self.high][:6]
        rough = (self.high - self.low) / count
        if not (rough > 0 and math.isfinite(rough)):
            return []
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough * 0.999)
        first = math.ceil(self.low / step)
        return [step * (first + place) for place in range(count + 2) if step * (first + place) <= self.high]


def _grid_x(axis: _Axis, top: float, bottom: float) -> Iterable[Markup]:
    for value in axis.ticks():
        yield _line(axis(value), top, axis(value), bottom, "grid")
        yield _text(axis(value), bottom + 13, shown(value), "tick", anchor="middle")


def _grid_y(axis: _Axis, left: float, right: float) -> Iterable[Markup]:
    for value in axis.ticks():
        yield _line(left, axis(value), right, axis(value), "grid")
        yield _text(left - 4, axis(value) + 4, shown(value), "tick", anchor="end")


def _dot_row(row: Dot) -> list[Cell]:
    return [
        Cell(row.label),
        Cell(shown(row.middle), row.middle),
        Cell("-" if row.interval is None else _interval(row.interval).strip(" []")),
        Cell(", ".join(map(shown, row.values)) or "-"),
    ]


def _curve_row(curve: Curve) -> list[Cell]:
    values = [y for _, y in curve.points]
    numbers = (*curve.points[0], *curve.points[-1], min(values), max(values))
    return [Cell(curve.label), *(Cell(shown(each), each) for each in numbers)]


def _interval(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f" [{shown(bounds[0])} to {shown(bounds[1])}]"


def _svg(height: int, said: str, parts: Iterable[Markup]) -> Markup:
    return _tag("svg", *parts, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=shortened(said, 1_500))


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return _tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def _text(x: float, y: float, text: str, kind: str, *, anchor: str = "start", full: str = "") -> Markup:
    title = [_tag("title", full)] if full and full != text else []
    return _tag("text", *title, text, x=x, y=y, class_=kind, text_anchor=anchor)


_CAMEL = ("viewBox",)


def _tag(name: str, *children: Markup | str, **attributes: object) -> Markup:
    """An element whose texts and attributes are escaped. `class_` is `class`; `a_b` is `a-b`."""
    written = "".join(
        f' {key.strip("_") if key in _CAMEL else key.strip("_").replace("_", "-")}="{escape(visible(str(value)))}"'
        for key, value in attributes.items()
    )
    inside = "".join(str(child) if isinstance(child, Markup) else str(escape(visible(child))) for child in children)
    return Markup(f"<{name}{written}>{inside}</{name}>")  # every part of it is escaped above

"""The space that a family's tuning searches: lists and ranges of values, draws from it, and where its edges are."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import Field

from cmapkd.config import Config, closest

EDGE = 0.1  # share of a range at either end that counts as its edge
_DRAWS = 1000  # tries to find settings that are not yet there


class LogRange(Config):
    """Numbers of which the logarithm is uniform."""

    log: tuple[float, float] = Field(description="From, to; both above 0.")

    def at(self, share: float) -> float:
        low, high = self.log
        return _rounded(low * (high / low) ** share)

    def place(self, value: float) -> float:
        low, high = self.log
        return math.log(value / low) / math.log(high / low) if value > 0 else -math.inf


class UniformRange(Config):
    """Numbers that are all as likely."""

    uniform: tuple[float, float] = Field(description="From, to.")

    def at(self, share: float) -> float:
        low, high = self.uniform
        return _rounded(low + (high - low) * share)

    def place(self, value: float) -> float:
        low, high = self.uniform
        return (value - low) / (high - low)


Values = LogRange | UniformRange | tuple[Any, ...]
Space = dict[str, Values]

_OURS = {
    "seed": "tuning has seeds of its own",
    "baseline": "a comparison sets it",
    "training.steps": "`halving` says how long trials are",
    "training.epochs": "`halving` says how long trials are",
    "data.val": "the metric is of these data",
    "data.test": "trials are never measured on test data",
    "evaluation": "it decides what the metric means",
}


def read_space(value: Any) -> Any:
    """A space as it stands in a file, made of lists and ranges.

    Raises:
        ValueError: a key that tuning may not set, or values that are neither a list nor a range.
    """
    if not isinstance(value, dict):
        raise ValueError(f"a space is a mapping of keys to values, got {value!r}")
    return {str(key): _read_values(str(key), values) for key, values in value.items()}


def _read_values(key: str, values: Any) -> Any:
    for ours, why in _OURS.items():
        if key == ours or key.startswith(f"{ours}."):
            raise ValueError(f"{key} cannot be searched: {why}")
    if isinstance(values, LogRange | UniformRange):
        return values
    if isinstance(values, list | tuple):
        if len(values) < 2 or any(value in values[:place] for place, value in enumerate(values)):
            raise ValueError(f"{key} must list two values or more, each once; got {list(values)!r}")
        return tuple(values)
    if isinstance(values, dict) and len(values) == 1:
        ((kind, ends),) = values.items()
        if kind not in ("log", "uniform"):
            raise ValueError(f"{key}: there is no range {kind!r}{closest(str(kind), ('log', 'uniform'))}")
        numbers = isinstance(ends, list | tuple) and len(ends) == 2 and all(map(_is_number, ends))
        if not numbers or not ends[0] < ends[1] or (kind == "log" and ends[0] <= 0):
            above = " above 0" * (kind == "log")
            raise ValueError(f"{key}: {kind} takes two numbers{above}, the smaller first; got {ends!r}")
        return LogRange(log=tuple(ends)) if kind == "log" else UniformRange(uniform=tuple(ends))
    raise ValueError(f"{key} must be a list of values, {{log: [from, to]}} or {{uniform: [from, to]}}; got {values!r}")


def draw(space: Space, count: int, *, seed: str, known: Iterable[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """Settings drawn from `space`, every one other than the rest and than the known ones.

    A Latin hypercube: each range, and each list, is divided into `count` equal parts, and each part is drawn from
    once (McKay et al. 1979). Where two draws come to the same settings, the second is drawn anew, at random.

    Args:
        count: so many, or as many as a space of lists has.
        seed: equal seeds give equal draws, on every machine and with every version of Python.
    """
    source = random.Random(seed)  # of its methods, `random` alone is promised to stay as it is
    found: list[dict[str, Any]] = []
    seen = [dict(settings) for settings in known]
    for settings in itertools.chain(_hypercube(space, count, source), _at_random(space, source)):
        if len(found) == count:
            break
        if settings not in seen:
            found.append(settings)
            seen.append(settings)
    return found


def _hypercube(space: Space, count: int, source: random.Random) -> Iterator[dict[str, Any]]:
    columns = {}
    for key in space:
        order = sorted((source.random(), part) for part in range(count))
        columns[key] = [(part + source.random()) / count for _, part in order]
    for trial in range(count):
        yield {key: _value(values, columns[key][trial]) for key, values in space.items()}


def _at_random(space: Space, source: random.Random) -> Iterator[dict[str, Any]]:
    for _ in range(_DRAWS):
        yield {key: _value(values, source.random()) for key, values in space.items()}
    lists = [values for values in space.values() if isinstance(values, tuple)]
    if len(lists) == len(space):  # what chance has not met is counted out
        for combined in itertools.islice(itertools.product(*lists), _DRAWS):
            yield dict(zip(space, combined, strict=True))


def _value(values: Values, share: float) -> Any:
    return values[int(share * len(values))] if isinstance(values, tuple) else values.at(share)


def edges(space: Space, settings: Mapping[str, Any]) -> list[str]:
    """What lies at the edge of the space or beyond it, as `key VALUE (lowest searched: END)`.

    The edge of a list of numbers is its smallest and its largest one, that of a range the outer tenth of it. Other
    lists have none.
    """
    sides = {key: _side(values, settings[key]) for key, values in space.items()}
    return [f"{key} {settings[key]:g} ({side})" for key, side in sides.items() if side]


def _side(values: Values, value: Any) -> str:
    """`lowest searched: 1`, `highest searched: 64`, or nothing."""
    if not _is_number(value):
        return ""
    if isinstance(values, tuple):
        if not all(map(_is_number, values)):
            return ""
        low, high = min(values), max(values)
        below, above = value <= low, value >= high
    else:
        low, high = values.log if isinstance(values, LogRange) else values.uniform
        place = values.place(value)
        below, above = place < EDGE, place > 1 - EDGE
    return f"lowest searched: {low:g}" if below else f"highest searched: {high:g}" if above else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _rounded(value: float) -> float:
    """Three figures: what a reader can write down, and a config stays the same through a file."""
    return float(f"{value:.3g}")

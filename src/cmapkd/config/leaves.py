"""Nested plain data, leaf by leaf."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def leaves(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every value that is neither a mapping nor a list, with its dotted key; of a list's values, the list's own.

    Without recursion: data from outside may be nested deeper than Python's stack.
    """
    todo: list[tuple[str, Any]] = [("", values)]
    while todo:
        path, value = todo.pop()
        if isinstance(value, Mapping):
            todo += [(f"{path}.{key}" if path else str(key), each) for key, each in value.items()]
        elif isinstance(value, list | tuple):
            todo += [(path, each) for each in value]
        else:
            yield path, value

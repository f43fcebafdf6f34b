"""Plain data of unknown files, read without trust: what is not of the expected kind counts as absent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cmapkd.config.printing import without_controls

LONGEST = 280
"""Characters of a stranger's text that a page shows; the rest becomes an ellipsis."""

_NO_LETTERS = ("Co", "Cn")  # private and no characters
_LARGEST = 1e30  # a number beyond it measures nothing that a page shows, and its square overflows


def plain(value: Any) -> Any:
    """`value` with every number that is not finite, or absurdly large, replaced by None; keys are texts."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) <= _LARGEST:
        return None
    return value


def at(values: Any, *path: str) -> Any:
    """What stands at a path of nested mappings; None where nothing does."""
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def number(values: Any, *path: str) -> float | None:
    """The number at a path; None where there is none."""
    value = at(values, *path)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if abs(value) <= _LARGEST else None


def whole(values: Any, *path: str) -> int | None:
    value = number(values, *path)
    return None if value is None else round(value)


def mapping(values: Any, *path: str) -> dict[str, Any]:
    """The mapping at a path, with texts for keys; empty where there is none."""
    value = at(values, *path)
    return {str(key): each for key, each in value.items()} if isinstance(value, Mapping) else {}


def sequence(values: Any, *path: str) -> list[Any]:
    value = at(values, *path)
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else []


def string(values: Any, *path: str, longest: int = LONGEST) -> str | None:
    """The text at a path, shortened; numbers become texts, and None stands for everything else."""
    value = at(values, *path)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = f"{value:.12g}" if isinstance(value, float) else str(value)
    return shortened(value, longest) if isinstance(value, str) else None


def shortened(text: str, longest: int = LONGEST) -> str:
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"


def visible(text: str) -> str:
    """`text` with every character that hides, reverses or moves what follows replaced by U+FFFD."""
    return without_controls(text, lambda _: "\ufffd", more=_NO_LETTERS)

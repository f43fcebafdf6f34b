"""Plain data of unknown files, read without trust: what is not of the expected kind counts as absent."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

LONGEST = 280
"""Characters of a stranger's text that a page shows; the rest becomes an ellipsis."""

_KEPT = "\n\t"
_JOINERS = "\u200c\u200d"  # part of ordinary text in several scripts
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # controls, direction marks, surrogates, private and no characters


def at(values: Any, *path: str) -> Any:
    """What stands at a path of nested mappings; None where nothing does."""
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def number(values: Any, *path: str) -> float | None:
    """The finite number at a path; None where there is none."""
    value = at(values, *path)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if math.isfinite(result) else None


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
        value = (
            f"{value:.12g}" if isinstance(value, float) else repr(value) if abs(value) < 10**20 else "a large number"
        )
    return shortened(value, longest) if isinstance(value, str) else None


def shortened(text: str, longest: int = LONGEST) -> str:
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"


def visible(text: str) -> str:
    """`text` with every character that hides, reverses or moves what follows replaced by U+FFFD."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character
        if character in _KEPT or character in _JOINERS or unicodedata.category(character) not in _HIDDEN
        else "\ufffd"
        for character in text
    )

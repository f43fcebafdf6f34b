"""Text of strangers (ids, captions, names in files) made fit for a terminal and for Markdown."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Collection

_KEPT = "\n\t"
_CONTROLS = ("Cc", "Cf", "Cs", "Zl", "Zp")  # controls, formats such as right-to-left overrides, surrogates, line ends
_JOINERS = "\u200c\u200d"  # part of ordinary text in several scripts
_MARKDOWN = str.maketrans({"|": "&#124;", "<": "&lt;", ">": "&gt;", "&": "&amp;", "`": "&#96;"})


def printable(text: str) -> str:
    """`text` with everything that could move a cursor, colour, hide or reverse what follows written as an escape."""
    return without_controls(text, lambda hidden: hidden.encode("unicode_escape", "surrogatepass").decode("ascii"))


def without_controls(text: str, write: Callable[[str], str], *, more: Collection[str] = ()) -> str:
    """`text` with what `write` says in place of each character that acts on others instead of being seen.

    Args:
        more: further categories of Unicode to replace.
    """
    if text.isascii() and text.isprintable():
        return text
    hidden = (*_CONTROLS, *more)
    return "".join(
        character
        if character in _KEPT or character in _JOINERS or unicodedata.category(character) not in hidden
        else write(character)
        for character in text
    )


def in_markdown(text: str) -> str:
    """`text` as it is to be read in a Markdown table or line: no HTML, no links, no new cells or lines."""
    return " ".join(printable(text).split()).translate(_MARKDOWN).replace("](", "]\\(")


def counted(number: int, thing: str) -> str:
    """A number with what it counts, one or several: `1 sample`, `1,200 samples`, `2 classes`, `3 cache entries`.

    Args:
        thing: in the singular. Its plural is regular.
    """
    if number == 1:
        return f"1 {thing}"
    if thing.endswith(("s", "x", "ch", "sh")):
        return f"{number:,} {thing}es"
    if thing.endswith("y") and thing[-2] not in "aeiou":
        return f"{number:,} {thing[:-1]}ies"
    return f"{number:,} {thing}s"


def in_bytes(number: float) -> str:
    """A size in the unit that shows it: `329 kB`, `1.7 GB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:,.3g} {unit}"
    return counted(round(number), "byte")

"""How a table of somebody else is written: its encoding and its separator, guessed from its bytes."""

from __future__ import annotations

import codecs
import csv
from collections.abc import Sequence
from pathlib import Path

from cmapkd.config import ConfigError

SEPARATORS = {"tab": "\t", "comma": ",", "semicolon": ";", "pipe": "|"}
_MARKS = ((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
WESTERN = "cp1252"  # Windows' Latin-1, which has letters where Latin-1 has nothing
_FEW = 2  # lines that are no UTF-8: fewer are damage and not an encoding
_MOST = 0.9  # of the lines beyond ASCII
_LATIN_SHARE = 0.3  # of the letters: more of them beyond ASCII are another alphabet, read in the wrong encoding


def guess_encoding(path: Path) -> tuple[str, str | None]:
    """The encoding of a text file, and a sentence on the guess where it is neither UTF-8 nor marked.

    A file is UTF-8 unless nearly all of its lines beyond ASCII are not: text in another encoding is hardly ever UTF-8
    by chance. Such a file is taken for Windows-1252, which holds
    Latin-1, if its letters then look like those of a Western language.

    Raises:
        ConfigError: it is neither.
    """
    with path.open("rb") as file:
        start = file.read(4)
        for mark, name in _MARKS:
            if start.startswith(mark):
                return name, None
        file.seek(0)
        beyond = [line for line in file if not line.isascii()]
    wrong = [line for line in beyond if not _is_utf8(line)]
    if len(wrong) < _FEW or len(wrong) < _MOST * len(beyond):
        return "utf-8-sig", None
    if not _looks_western(wrong):
        raise ConfigError(
            f"{str(path)!r} is not UTF-8 ({len(wrong)} of {len(beyond)} lines with letters beyond ASCII are not): save "
            "it as UTF-8, or name its encoding with ?encoding=..., for example cp1251 or gb18030"
        )
    return WESTERN, (
        f"{path.name} is not UTF-8: read as Windows-1252 (Latin-1), a guess from {len(wrong)} lines. If letters are "
        "wrong, name another one with ?encoding=..."
    )


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _looks_western(lines: Sequence[bytes]) -> bool:
    try:
        text = b"".join(lines).decode(WESTERN)
    except UnicodeDecodeError:
        return False
    if any(ord(character) < 32 and character not in "\t\r\n" for character in text):
        return False
    letters = [character for character in text if character.isalpha()]
    beyond = sum(not character.isascii() for character in letters)
    return 0 < beyond <= _LATIN_SHARE * len(letters)


def check_encoding(name: str) -> str:
    """The name of an encoding of text.

    Raises:
        ConfigError: Python knows none of that name.
    """
    try:
        known = codecs.lookup(name)
        "".encode(known.name)  # base64 and its like are no encodings of text
    except (LookupError, ValueError):
        raise ConfigError(
            f"there is no encoding {name!r}: name one that Python knows, such as utf-8, cp1252, cp1251 or gb18030"
        ) from None
    return "utf-8-sig" if known.name == "utf-8" else known.name


def guess_separator(header: str, *, images: Sequence[str], says: Sequence[str]) -> tuple[str, str | None]:
    """What stands between the columns of a header line, and a sentence on the guess where it is unusual.

    The first separator that gives a column of `images` and one of `says`; if none does, a tab where there is one, else
    the one that gives most columns, a comma before others.
    """
    columns = {separator: _split(header, separator) for separator in SEPARATORS.values()}
    wanted = [{name.lower() for name in each} for each in (images, says)]
    fits = [each for each, names in columns.items() if all({*names} & those for those in wanted)]
    if fits:
        separator = fits[0]
    elif "\t" in header:
        separator = "\t"
    else:
        separator = max((",", ";", "|"), key=lambda each: len(columns[each]))
    if separator in "\t,":
        return separator, None
    name = next(name for name, each in SEPARATORS.items() if each == separator)
    return separator, f"columns are separated by {separator!r}, as the header's are; ?separator={name} says so for good"


def _split(header: str, separator: str) -> list[str]:
    try:
        return [name.strip().lower() for name in next(csv.reader([header], delimiter=separator), [])]
    except csv.Error:  # a field beyond csv's own limit
        return []

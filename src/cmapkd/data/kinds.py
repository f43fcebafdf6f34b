"""The kind of data that a source's name begins with, and the advice where there is none. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from cmapkd.config import ConfigError, closest

BY_SUFFIX = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
    ".tar": "webdataset",
    ".zip": "folder",
}


def kind_of(text: str) -> str:
    """What stands before the first colon, split or option: `csv` of `csv:train.csv?limit=10`."""
    return re.split(r"[:@?]", text.strip(), maxsplit=1)[0]


def refuse_unknown_kind(text: str, known: Iterable[str], *, kind: str | None = None) -> None:
    """Refuses a name whose kind nobody reads.

    Args:
        kind: as the name was taken apart; None: `kind_of` it.
    Raises:
        ConfigError: names the nearest kind, or the one that reads such a file.
    """
    kinds = list(known)
    kind = kind_of(text) if kind is None else kind
    if kind in kinds:
        return
    fitting = "folder" if Path(text).expanduser().is_dir() else BY_SUFFIX.get(Path(text.partition("?")[0]).suffix)
    near = closest(kind, kinds)  # of `cvs:train.csv`, which has a kind that is misspelt
    if fitting and not (near and text.startswith(f"{kind}:")):
        near = f" (did you mean '{fitting}:{text}'?)"
    raise ConfigError(f"data {text!r}: there is no kind of data {kind!r}{near}. Known: {', '.join(kinds)}.")

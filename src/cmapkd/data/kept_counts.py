"""The numbers of samples of remote shards that a run goes by, kept in its folder: they cannot change under it.

Counts that lie beside shards are claims, and somebody may correct or remove them while a run is stopped. Whether a set
is counted by them or by indexes also depends on what this machine has indexed. So a run notes what it began with, and
each resume opens the same sets with the same counts, on any machine.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmapkd.config import ConfigError
from cmapkd.config.disk import write_text

FILE_NAME = "shards.json"
_VERSION = 1
_MOST, _MOST_COUNT = 2**63 - 1, 2**32 - 1


@dataclass(frozen=True, slots=True)
class KeptSet:
    """One set of shards.

    Attributes:
        counts: Int[shards], see `Claims.counts`; none: the set is counted by its indexes, whatever lies beside it.
        stamps: Int[shards, 2], size and tag of each; none where there are no counts.
    """

    counts: NDArray[np.int64] | None = None
    stamps: NDArray[np.int64] | None = None

    def check(self, urls: Sequence[str], stamps: NDArray[np.int64], file: Path) -> None:
        """Refuses shards that were exchanged since they were counted.

        Raises:
            ConfigError: names the first of them.
        """
        if self.stamps is None:
            return
        if self.stamps.shape != stamps.shape:
            raise ConfigError(f"{file} is damaged: it has {len(self.stamps):,} of {len(stamps):,} shards. Restore it")
        other = np.flatnonzero((self.stamps != stamps).any(axis=1)).tolist()
        if other:
            (before, _), (now, _) = self.stamps[other[0]].tolist(), stamps[other[0]].tolist()
            held = f"{before:,} bytes, now {now:,}" if before != now else f"{now:,} bytes, with another tag"
            raise ConfigError(
                f"{len(other):,} of {len(urls):,} shards are other files than when this run began, first "
                f"{urls[other[0]]} ({held}): put the former back. If they hold the same samples, remove {file}, and "
                "names, sizes and counts alone are compared"
            )


@dataclass
class KeptCounts:
    """The sets of a run.

    Args:
        file: where they are kept.
    Attributes:
        sets: by `key`.
    Raises:
        ConfigError: the file is there, and cannot be read or is damaged.
    """

    file: Path
    sets: dict[str, KeptSet] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._written: str | None = None
        if not os.path.isfile(self.file):  # noqa: PTH113 - what is wrong with the folder is said where it is made
            return
        try:
            self._written = self.file.read_text(encoding="utf-8")
            self.sets = _parsed(self._written)
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, AttributeError) as error:
            raise ConfigError(
                f"{self.file} is damaged ({type(error).__name__}): restore it. If it is lost, remove it, and remote "
                "shards are counted anew"
            ) from None

    def write(self) -> None:
        """Writes the sets that were opened, if there are any of which the file does not know.

        Raises:
            DiskError: the disk refuses.
        """
        text = _written(self.sets)
        if self.sets and text != self._written:
            write_text(self.file, text)
            self._written = text


_current: ContextVar[KeptCounts | None] = ContextVar("kept counts", default=None)


@contextmanager
def keeping(file: Path) -> Iterator[KeptCounts]:
    """Until the end, remote sets are opened with the counts that the file has of them, and others are added to it.

    Raises:
        ConfigError: the file is damaged.
    """
    kept = KeptCounts(file)
    token = _current.set(kept)
    try:
        yield kept
    finally:
        _current.reset(token)


def kept_counts() -> KeptCounts | None:
    """Those of the run that opens its data now; None where none does."""
    return _current.get()


def key(urls: Sequence[str], counts: str | None) -> str:
    """Names a set of shards by where they are, and by what the source says should count them."""
    return hashlib.blake2b(
        "\0".join((counts or "", *urls)).encode("utf-8", "surrogatepass"), digest_size=16
    ).hexdigest()


def claimed_shards(source: object) -> int:
    """How many shards of a source, or of what it is made of, are counted by what lies beside them."""
    parts: tuple[object, ...] = getattr(source, "sources", ())
    inner = getattr(source, "source", None)
    if inner is not None:
        parts = (inner,)
    return int(getattr(source, "num_claimed", 0)) + sum(map(claimed_shards, parts))


def _written(sets: dict[str, KeptSet]) -> str:
    listed = {
        name: None
        if each.counts is None or each.stamps is None
        else {"counts": each.counts.tolist(), "stamps": each.stamps.tolist()}
        for name, each in sets.items()
    }
    return json.dumps({"version": _VERSION, "sets": listed}, separators=(",", ":")) + "\n"


def _parsed(text: str) -> dict[str, KeptSet]:
    """Raises ValueError and others: it is nothing that `_written` wrote."""
    values = json.loads(text)
    if values["version"] != _VERSION:
        raise ValueError
    return {str(name): KeptSet() if each is None else _set(each) for name, each in values["sets"].items()}


def _set(values: dict[str, Any]) -> KeptSet:
    counts, stamps = values["counts"], values["stamps"]
    every = [(number, _MOST) for stamp in stamps for number in stamp] + [(number, _MOST_COUNT) for number in counts]
    if len(counts) != len(stamps) or not all(type(number) is int and -1 <= number <= most for number, most in every):
        raise ValueError
    return KeptSet(np.array(counts, dtype=np.int64), np.array(stamps, dtype=np.int64).reshape(len(counts), 2))

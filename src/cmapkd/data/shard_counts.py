"""How many samples remote shards have, as files beside them claim: no shard need be fetched to plan a run over it.

`NAME_stats.json` stands beside each shard that img2dataset made. A table of a whole folder is open_clip's `sizes.json`,
or an index of wids. Nothing of them is believed: a count that no tar of that size could have is not taken, and others
are compared with the shard when it has been fetched; see `ShardSource`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmapkd.data.stores import Stamp, Store
from cmapkd.data.tar_walk import BLOCK

TABLES = ("sizes.json", "shardindex.json", "wids-meta.json")
"""Of a folder: the first is open_clip's, the others are names that indexes of wids have."""

STATS = "_stats.json"  # in the place of a shard's `.tar`
UNKNOWN = -1
_MOST_STATS = 4 * 2**20  # bytes; img2dataset lists the errors of its downloads there
_MOST_TABLE = 128 * 2**20  # 100 bytes a shard, of more than a million shards
_MOST_NAMED = 3  # files that are refused with a word each
_MOST_COUNT = 2**32 - 1


@dataclass(slots=True)
class Claims:
    """What is claimed of shards.

    Attributes:
        counts: Int[shards], the samples of each; `UNKNOWN` where nothing usable is said.
        refused: why something that is said is not taken.
    """

    counts: NDArray[np.int64]
    refused: list[str] = field(default_factory=list)

    def warnings(self) -> list[str]:
        """One sentence on all that was refused, if there is anything."""
        if not self.refused:
            return []
        more = f"; and {len(self.refused) - _MOST_NAMED:,} more" if len(self.refused) > _MOST_NAMED else ""
        return [f"counts beside shards are not taken: {'; '.join(self.refused[:_MOST_NAMED])}{more}"]


def read_claims(store: Store, urls: Sequence[str], stamps: Sequence[Stamp], name: str | None = None) -> Claims:
    """What lies beside the shards.

    Args:
        stamps: what each shard holds.
        name: of the only table that is read, or `stats`; none: all, a table before the stats.
    Raises:
        Unusable: the store does not answer. That is no reason to take a shard for one without a count: the next
            opening might know it, and batches be others.
    """
    claims = Claims(np.full(len(urls), UNKNOWN, dtype=np.int64))
    for table in () if name == "stats" else TABLES if name is None else (name,):
        _read_tables(claims, store, urls, stamps, table)
    if name in (None, "stats"):
        _read_stats(claims, store, urls, stamps)
    return claims


def _read_tables(claims: Claims, store: Store, urls: Sequence[str], stamps: Sequence[Stamp], table: str) -> None:
    """Takes what the tables of this name say, each of the shards in its folder."""
    missing = np.flatnonzero(claims.counts == UNKNOWN).tolist()
    folders = list(dict.fromkeys(_folder(urls[shard]) for shard in missing))
    read = store.small([folder + table for folder in folders], _MOST_TABLE, _table)
    said: dict[str, dict[str, _Said]] = {}
    for folder, found_there in zip(folders, read, strict=True):
        if isinstance(found_there, str):
            claims.refused.append(f"{folder}{table} {found_there}")
        elif found_there is not None:
            said[folder] = found_there
    for shard in missing:
        folder = _folder(urls[shard])
        found = said.get(folder, {}).get(urls[shard].removeprefix(folder))
        if found is not None:
            _take(claims, shard, found, stamps[shard][0], f"{folder}{table} says of {urls[shard].removeprefix(folder)}")


def _read_stats(claims: Claims, store: Store, urls: Sequence[str], stamps: Sequence[Stamp]) -> None:
    missing = [shard for shard in np.flatnonzero(claims.counts == UNKNOWN).tolist() if urls[shard].endswith(".tar")]
    names = [urls[shard].removesuffix(".tar") + STATS for shard in missing]
    for shard, name, said in zip(missing, names, store.small(names, _MOST_STATS, _stats), strict=True):
        if isinstance(said, str):
            claims.refused.append(f"{name} {said}")
        elif said is not None:
            _take(claims, shard, said, stamps[shard][0], f"{name} says")


@dataclass(frozen=True, slots=True)
class _Said:
    samples: Any
    bytes: Any = None


def _take(claims: Claims, shard: int, said: _Said, size: int, where: str) -> None:
    """Takes a count if a tar of this size can have it."""
    most = min(size // BLOCK, _MOST_COUNT)  # every sample has a header
    if type(said.samples) is not int or said.samples < 0:
        claims.refused.append(f"{where} {_shown(said.samples)} where a number of samples should stand")
    elif said.samples > most:
        claims.refused.append(f"{where} {_shown(said.samples)} samples, and its {size:,} bytes have no room for them")
    elif said.bytes is not None and said.bytes != size:
        claims.refused.append(f"{where} {_shown(said.bytes)} bytes, and it has {size:,}")
    else:
        claims.counts[shard] = said.samples


def _stats(data: bytes) -> _Said | str:
    """What the stats of a shard say of it, or what is wrong with them."""
    values = _object(data, _MOST_STATS)
    return values if isinstance(values, str) else _Said(values.get("successes"))


def _table(data: bytes) -> dict[str, _Said] | str:
    """By the names of files what a table of open_clip or wids says of them, or what is wrong with it."""
    values = _object(data, _MOST_TABLE)
    if isinstance(values, str):
        return values
    if "shardlist" not in values:
        return {name: _Said(count) for name, count in values.items()}
    if not isinstance(values["shardlist"], list):
        return "has a shardlist that is no list"
    found: dict[str, _Said] = {}
    for each in values["shardlist"]:
        if not isinstance(each, dict) or not isinstance(each.get("url"), str):
            return f"has a shard without a url: {_shown(each)}"
        name, said = each["url"].rpartition("/")[2], _Said(each.get("nsamples"), each.get("filesize"))
        if found.setdefault(name, said) != said:
            return f"says two things of {name}"
    return found


def _object(data: bytes, most: int) -> dict[str, Any] | str:
    """A JSON object of less than `most` bytes, or why it is none."""
    if len(data) >= most:
        return f"has {most:,} bytes or more"
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return "is no JSON"
    return values if isinstance(values, dict) else "is no JSON object"


def _folder(url: str) -> str:
    return url[: url.rfind("/") + 1]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."

"""Which rows of a cache were compared with their checksums, so that each is compared once, when it is first read.

A shard's record holds a checksum of the whole shard, and one of every group of rows (`CachePart.group_rows`, about
256 KiB). A row that is read costs its group. So shuffled reading does not wait for whole shards of 64 MiB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cmapkd.cache.config import Check
from cmapkd.cache.files import CacheError, digest_of_rows
from cmapkd.cache.parts import CachePart, RowFiles

Checksums = NDArray[np.uint64]


class Checks:
    """What was compared already, in memory that the data workers of a run share.

    Args:
        check: `first_use` compares what is read, when it is read; `open` compares everything now; `sizes` nothing.
        finished: of each part, which shards are finished.
    Raises:
        CacheError: with `open`, a bit differs.
    """

    def __init__(self, parts: Sequence[CachePart], finished: Sequence[NDArray[np.bool_]], check: Check) -> None:
        self.parts, self.check = parts, check
        self._done: list[torch.Tensor] = []
        self._expected: dict[tuple[int, int], Checksums | None] = {}
        if check == "first_use":
            sizes = [part.first_group(part.num_shards) for part in parts]
            self._done = [torch.zeros(size, dtype=torch.uint8).share_memory_() for size in sizes]
        elif check == "open":
            for part, done in zip(parts, finished, strict=True):
                for shard in np.flatnonzero(done).tolist():
                    check_shard(part, shard)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_expected": {}}

    def __call__(self, number: int, shard: int, rows: Sequence[int] | NDArray[np.int64]) -> None:
        """Compares the groups of these rows that nobody has compared yet.

        Args:
            number: of the part. rows: within the shard.
        Raises:
            CacheError: a bit differs.
        """
        if self.check != "first_use" or not len(rows):
            return
        part = self.parts[number]
        groups = np.unique(np.asarray(rows) // part.group_rows)
        start = part.first_group(shard)
        done = self._done[number].numpy()
        todo = groups[done[start + groups] == 0]
        if not len(todo):
            return
        expected = self._of_shard(number, shard)
        if expected is None:  # written before groups had checksums
            check_shard(part, shard)
            done[start : start + part.num_groups(shard)] = 1
            return
        with part.data(shard).open("rb") as file:
            for group in todo.tolist():
                file.seek(group * part.group_rows * part.row_bytes)
                if digest_of_rows(file.read(part.group_rows * part.row_bytes)) != expected[group]:
                    raise _damaged(part, shard)
                done[start + group] = 1

    def _of_shard(self, number: int, shard: int) -> Checksums | None:
        key = (number, shard)
        if key not in self._expected:
            part = self.parts[number]
            self._expected[key] = groups_of(part, part.read_record(shard), shard)
        return self._expected[key]


def groups_of(part: RowFiles, record: dict[str, Any], shard: int) -> Checksums | None:
    """The checksums of a shard's groups of rows; None where its record has none, or of groups of another size."""
    text = record.get("groups")
    if not isinstance(text, str) or record.get("group_rows") != part.group_rows:
        return None
    try:
        checksums = np.frombuffer(bytes.fromhex(text), np.dtype("<u8")).astype(np.uint64)
    except ValueError:
        return None
    return checksums if len(checksums) == part.num_groups(shard) else None


def check_shard(part: RowFiles, shard: int) -> None:
    """Compares a whole shard's bytes with its record.

    Raises:
        CacheError: a bit differs.
    """
    if part.checksum(shard) != part.read_record(shard)["checksum"]:
        raise _damaged(part, shard)


def _damaged(part: RowFiles, shard: int) -> CacheError:
    return CacheError(
        f"{part.data(shard)} is damaged (its checksum does not fit): cmapkd cache verify --remove-damaged "
        f"{part.folder.parent}, then build again"
    )

"""What is in a cache, and whether every bit of it is as it was written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cmapkd.cache.checks import check_shard
from cmapkd.cache.fidelity import summary
from cmapkd.cache.files import CacheError
from cmapkd.cache.folder import CacheFolder


def describe(cache: CacheFolder) -> dict[str, Any]:
    """Plain data: layout, bytes, rows, what is missing, and the fidelity measured when it was built."""
    rows = done = shards = missing = bad = 0
    damaged: list[str] = []
    fidelity: list[dict[str, Any]] = []
    for part in cache.files():
        rows += part.rows
        for shard in range(part.num_shards):
            shards += 1
            try:
                if not part.is_finished(shard):
                    missing += 1
                    continue
                record = part.read_record(shard)
            except CacheError as error:
                damaged.append(str(error))
                continue
            done, bad = done + record["rows"], bad + record["bad"]
            fidelity.append(record["fidelity"])
    return {
        "folder": str(cache.path),
        **cache.about,
        "layout": cache.layout.describe(),
        "bytes_per_row": cache.layout.row_bytes,
        "rows": rows,
        "rows_done": done,
        "rows_without_answer": bad,
        "bytes": done * cache.layout.row_bytes,
        "shards": shards,
        "shards_missing": missing,
        "damaged": damaged,
        **({} if cache.by_shard else {"samples": cache.length}),
        **({} if cache.logit_scale is None else {"logit_scale": cache.logit_scale}),
        "fidelity": summary(fidelity),
        "identity": dict(cache.identity),
    }


def verify(cache: CacheFolder, *, remove_damaged: bool = False) -> Iterator[tuple[str, str | None]]:
    """Reads every byte: yields each shard's name and what is wrong with it, or None.

    Args:
        remove_damaged: removes damaged shards, so that the next build makes them again.
    """
    for part in cache.files():
        for shard in range(part.num_shards):
            name = str(part.data(shard).relative_to(cache.path))
            try:
                if not part.is_finished(shard):
                    yield name, "not built yet"
                    continue
                check_shard(part, shard)
            except CacheError as error:
                if remove_damaged:
                    part.record(shard).unlink(missing_ok=True)
                    part.data(shard).unlink(missing_ok=True)
                yield name, str(error)
            else:
                yield name, None

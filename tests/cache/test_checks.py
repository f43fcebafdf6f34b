"""Checksums of groups of rows: a row costs its group, a group is compared once, and every changed bit is found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cache_support import LENGTH, built, cache_plan

from cmapkd.cache import checks as checks_module
from cmapkd.cache.checks import Checks, groups_of
from cmapkd.cache.files import CacheError, read_json, write_json
from cmapkd.cache.folder import CacheFolder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CacheFolder:
    """With groups of three rows."""
    row_bytes = cache_plan(tmp_path / "c").layout.row_bytes
    monkeypatch.setattr("cmapkd.cache.parts.GROUP_BYTES", 3 * row_bytes + 1)
    return built(tmp_path / "c")


def checks_of(cache: CacheFolder, **more: str) -> Checks:
    parts = cache.parts()
    return Checks(parts, [np.ones(part.num_shards, bool) for part in parts], more.get("check", "first_use"))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def test_every_changed_byte_is_found_in_its_group_and_in_no_other(cache: CacheFolder) -> None:
    part = cache.parts()[0]
    assert part.group_rows == 3
    first, last = part.extent(0)
    shard = part.data(0)
    for row in range(last - first):
        place = row * part.row_bytes + part.row_bytes // 2
        flip(shard, place)
        group = set(range(row // 3 * 3, min(row // 3 * 3 + 3, last - first)))
        with pytest.raises(CacheError, match=f"{shard.name} is damaged"):
            checks_of(cache)(0, 0, sorted(group)[-1:])
        others = [other for other in range(last - first) if other not in group]
        checks_of(cache)(0, 0, others)
        flip(shard, place)
    checks_of(cache)(0, 0, range(last - first))


def test_a_row_reads_its_group_once_and_no_more(cache: CacheFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    digest = checks_module.digest_of_rows
    monkeypatch.setattr(checks_module, "digest_of_rows", lambda data: read.append(len(data)) or digest(data))
    checks, row_bytes = checks_of(cache), cache.layout.row_bytes
    checks(0, 0, [1])
    checks(0, 0, [0, 2])
    assert read == [3 * row_bytes]
    checks(0, 0, [1, 3])  # the last group of the shard has one row
    assert read == [3 * row_bytes, row_bytes]


@pytest.mark.parametrize("check", ["open", "sizes"])
def test_nothing_is_read_again_where_all_or_nothing_is_compared(
    cache: CacheFolder, check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = checks_of(cache, check=check)
    monkeypatch.setattr(checks_module, "digest_of_rows", lambda data: pytest.fail("read"))
    checks(0, 0, [0, 3])


def test_shards_without_checksums_of_groups_are_compared_whole(cache: CacheFolder) -> None:
    part = cache.parts()[0]
    record = read_json(part.record(0))
    assert groups_of(part, record, 0) is not None
    for old in (
        {key: value for key, value in record.items() if key not in ("groups", "group_rows")},
        record | {"group_rows": 4},  # of a version with larger groups
        record | {"groups": record["groups"][:-16]},
        record | {"groups": "no hexadecimal"},
    ):
        part.record(0).unlink()
        write_json(part.record(0), old)
        assert groups_of(part, read_json(part.record(0)), 0) is None
        checks = checks_of(cache)
        checks(0, 0, [0])
        last = part.extent(0)[1] - part.extent(0)[0] - 1
        flip(part.data(0), last * part.row_bytes)
        with pytest.raises(CacheError, match="is damaged"):
            checks_of(cache)(0, 0, [0])  # far from the change, but the whole shard is compared
        checks(0, 0, [last])  # and only once
        flip(part.data(0), last * part.row_bytes)


def test_records_hold_one_checksum_for_each_group(cache: CacheFolder) -> None:
    rows = 0
    for part in cache.parts():
        for shard in range(part.num_shards):
            record = json.loads(part.record(shard).read_text())
            assert len(record["groups"]) == 16 * -(-record["rows"] // 3)
            rows += record["rows"]
    assert rows >= LENGTH

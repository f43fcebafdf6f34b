"""Wanted rows: ranges and single keys count and part as the sets of their keys do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cmapkd.cache.parts import KeyPart
from cmapkd.cache.shard_part import ALMOST_ALL, ShardPart
from cmapkd.cache.wanted import Wanted
from cmapkd.data.shard_contents import ShardContents

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)), max_size=6)
KEYS = st.lists(st.integers(0, 80), max_size=12)
COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=7).filter(any)


def both(ranges: Sequence[tuple[int, int]], keys: Sequence[int]) -> tuple[Wanted, set[int]]:
    spans = [(first, first + size) for first, size in ranges]
    expected = {*keys, *(key for first, last in spans for key in range(first, last))}
    return Wanted.of(spans, keys), expected


def set_of(wanted: Wanted) -> set[int]:
    keys = wanted.listed().tolist()
    assert keys == sorted({*keys})  # ascending, none twice
    assert len(keys) == len(wanted)
    return {*keys}


@given(RANGES, KEYS, st.integers(0, 20))
def test_it_is_the_set_of_its_keys(ranges: list[tuple[int, int]], keys: list[int], count: int) -> None:
    wanted, expected = both(ranges, keys)
    assert set_of(wanted) == expected
    assert wanted.end == max(expected, default=-1) + 1
    assert set_of(wanted.first(count)) == {*sorted(expected)[:count]}
    assert wanted.at(np.arange(len(wanted))).tolist() == sorted(expected)
    places = np.arange(90)
    assert wanted.before(places).tolist() == [sum(key < place for key in expected) for place in places.tolist()]
    assert (np.diff(wanted.ranges.reshape(-1)) > 0).all()  # in order, and none touches another


@settings(max_examples=200, deadline=None)
@given(COUNTS, RANGES, KEYS, st.integers(1, 3), st.integers(1, 6), st.sets(st.integers(0, 20)))
def test_shards_take_what_they_hold_whole_and_leave_the_rest(
    counts: list[int], ranges: list[tuple[int, int]], keys: list[int], views: int, piece_rows: int, there: set[int]
) -> None:
    wanted, expected = both(ranges, keys)
    contents = ShardContents(np.zeros(len(counts), "V16"), np.array(counts, np.int64))
    part = ShardPart(Path("nowhere"), 4, 8, contents, views, piece_rows)
    length, pieces, first = sum(counts), [], 0
    for count in counts:
        pieces += [range(first + at, first + min(at + piece_rows, count)) for at in range(0, count, piece_rows)]
        first += count
    extents = [
        range(view * length + piece.start, view * length + piece.stop) for view in range(views) for piece in pieces
    ]
    assert [part.extent(shard) for shard in range(part.num_shards)] == [(each.start, each.stop) for each in extents]
    finished = np.array([number in there for number in range(part.num_shards)], bool)
    shards, left = part.take(wanted, finished)
    whole = [
        n for n, each in enumerate(extents) if len({*each} & expected) >= (1 if n in there else ALMOST_ALL * len(each))
    ]
    assert shards == whole
    assert set_of(left) == expected - {key for shard in whole for key in extents[shard]}
    assert part.count(wanted, whole) == len({key for shard in whole for key in extents[shard]} & expected)
    for key in range(views * length + 5):
        shard = next((n for n, each in enumerate(extents) if key in each), None)
        assert part.find(key) == (None if shard is None else (shard, key - extents[shard].start))
    groups = [part.first_group(shard) for shard in range(part.num_shards + 1)]
    assert np.diff(groups).tolist() == [part.num_groups(shard) for shard in range(part.num_shards)]


@given(RANGES, KEYS, st.integers(0, 40), st.integers(1, 30), st.integers(1, 7))
def test_a_range_of_keys_takes_what_is_in_it(
    ranges: list[tuple[int, int]], keys: list[int], start: int, rows: int, shard_rows: int
) -> None:
    wanted, expected = both(ranges, keys)
    part = KeyPart(Path("nowhere"), 4, 8, rows, shard_rows, start)
    shards, left = part.take(wanted, np.ones(part.num_shards, bool))
    inside = {key for key in expected if start <= key < start + rows}
    assert shards == sorted({(key - start) // shard_rows for key in inside})
    assert set_of(left) == expected - inside
    assert part.count(wanted, shards[:1]) == sum((key - start) // shard_rows in shards[:1] for key in inside)

"""Which views of which samples a run will read: known before it starts, because a batch is a function of the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from cmapkd.cache.shard_part import ALMOST_ALL
from cmapkd.cache.wanted import Keys, Wanted
from cmapkd.data.plans import PlanSampler
from cmapkd.data.streams import Stream
from cmapkd.data.views import ViewSpec

MOST_LISTED = 2**24
"""Samples of an epoch that are listed one by one. Where more are read in windows, the shards of the windows count."""


def keys_of_run(
    length: int,
    *,
    batch_size: int,
    seed: int,
    steps: int,
    views: ViewSpec,
    streams: Sequence[Stream] = (),
    only: Callable[[int], str | None] | None = None,
) -> Wanted:
    """Keys (view x length + index) of what `steps` steps read; see `PlanSampler` for the arguments.

    A view that nearly all samples of a stream are shown in is taken whole. The samples that replace unreadable ones are
    not foreseen; where not everything is stored, the live teacher answers for them.
    """
    sampler = PlanSampler(length, batch_size=batch_size, seed=seed, start=0, stop=steps, streams=streams, only=only)
    ranges: set[tuple[int, int]] = set()
    listed: dict[tuple[int, int], Keys] = {}  # by where the view begins, and the number of the stream
    for number, epoch, first, last in sampler.reads(steps):
        stream, start = sampler.streams[number], views.view_number(epoch) * length
        whole = (start + stream.first, start + stream.first + stream.length)
        if whole in ranges:
            continue
        if last - first >= ALMOST_ALL * stream.length:
            ranges.add(whole)
        elif last - first > MOST_LISTED and stream.order is not None:
            ends = np.append(0, np.cumsum(stream.order.counts)) + start + stream.first
            shards = np.flatnonzero(stream.order.touched(epoch, first, last)).tolist()
            ranges |= {(int(ends[shard]), int(ends[shard + 1])) for shard in shards}
        else:
            before = listed.get((start, number), np.empty(0, np.int64))
            together = np.union1d(before, start + sampler.samples(number, epoch, first, last))
            listed[start, number] = together
            if len(together) >= ALMOST_ALL * stream.length:
                ranges.add(whole)
    return Wanted.of(ranges, np.concatenate([*listed.values()]) if listed else ())


def all_keys(length: int, num_views: int) -> Wanted:
    """Every sample in views 0 to `num_views` - 1."""
    return Wanted.of([(0, num_views * length)])

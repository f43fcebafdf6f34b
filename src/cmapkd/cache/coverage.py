"""Which views of which samples a run will read: known before it starts, because a batch is a function of the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from cmapkd.cache.parts import Keys
from cmapkd.data.plans import PlanSampler
from cmapkd.data.streams import Stream
from cmapkd.data.views import ViewSpec

ALMOST_ALL = 0.9  # of a view's samples: then the others are stored too, and any other seed finds its own


def keys_of_run(
    length: int,
    *,
    batch_size: int,
    seed: int,
    steps: int,
    views: ViewSpec,
    streams: Sequence[Stream] = (),
    only: Callable[[int], str | None] | None = None,
) -> Keys:
    """Keys (view x length + index), ascending, of what `steps` steps read; see `PlanSampler` for the arguments.

    A view that nearly all samples of a stream are shown in is taken whole. The samples that replace unreadable ones are
    not foreseen; where not everything is stored, the live teacher answers for them.
    """
    sampler = PlanSampler(length, batch_size=batch_size, seed=seed, start=0, stop=steps, streams=streams, only=only)
    read: dict[tuple[int, int], Keys] = {}  # by view and the stream's first sample
    for stream, epoch, indices in sampler.reads(steps):
        view = views.view_number(epoch)
        before = read.get((view, stream.first), np.empty(0, np.int64))
        if len(before) == stream.length:
            continue
        together = np.union1d(before, indices)
        if len(together) >= ALMOST_ALL * stream.length:
            together = np.arange(stream.first, stream.first + stream.length, dtype=np.int64)
        read[view, stream.first] = together
    return np.concatenate([view * length + read[view, first] for view, first in sorted(read)])


def all_keys(length: int, num_views: int) -> Keys:
    """Every sample in views 0 to `num_views` - 1."""
    return np.arange(num_views * length, dtype=np.int64)

"""Which views of which samples a run will read: known before it starts, because a batch is a function of the step."""

from __future__ import annotations

import numpy as np

from cmapkd.cache.parts import Keys
from cmapkd.data.batches import PlanSampler
from cmapkd.data.views import ViewSpec

ALMOST_ALL = 0.9  # of a view's samples: then the others are stored too, and any other seed finds its own


def keys_of_run(length: int, *, batch_size: int, seed: int, steps: int, views: ViewSpec) -> Keys:
    """Keys (view x length + index), ascending, of what `steps` steps read.

    A view that nearly all samples are shown in is taken whole. The samples that replace unreadable ones are not
    foreseen; where not everything is stored, the live teacher answers for them.
    """
    sampler = PlanSampler(length, batch_size=batch_size, seed=seed, start=0, stop=steps)
    read: dict[int, Keys] = {}
    for epoch in range(-(-steps // sampler.steps_per_epoch)):
        view = views.view_number(epoch)
        batches = min(sampler.steps_per_epoch, steps - epoch * sampler.steps_per_epoch)
        if len(read.get(view, ())) == length:
            continue
        indices = np.union1d(read.get(view, np.empty(0, np.int64)), sampler.order(epoch, 0, batches))
        read[view] = np.arange(length, dtype=np.int64) if len(indices) >= ALMOST_ALL * length else indices
    return np.concatenate([view * length + read[view] for view in sorted(read)])


def all_keys(length: int, num_views: int) -> Keys:
    """Every sample in views 0 to `num_views` - 1."""
    return np.arange(num_views * length, dtype=np.int64)

"""Remote shards, fetched before the steps that read them."""

from __future__ import annotations

import os
import threading
from typing import Any, Self

import numpy as np

from cmapkd.config import ConfigError, counted, in_bytes
from cmapkd.data.plans import PlanSampler
from cmapkd.data.shards import ShardSource
from cmapkd.data.streams import JoinedSource

_REST = 1.0  # seconds between two looks, where nothing is to be fetched or the disk does not take it


class FetchAhead:
    """Keeps the copies of the shards that this process reads next, in a thread.

    Which they are is a function of the step, so nothing is kept of it. What is not here in time is fetched by whoever
    reads it. All processes of a machine have equal parts of the room for copies, and so have all streams.

    Raises:
        ConfigError: the room is less than what is read at a time.
    """

    def __init__(self, source: object, sampler: PlanSampler) -> None:
        self.sampler, self._step = sampler, sampler.start
        parts = source.sources if isinstance(source, JoinedSource) else (source,)
        self._shards = {number: found for number, part in enumerate(parts) if (found := _remote(part)) is not None}
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        sharing = max(1, local) * max(1, len(self._shards))
        self.room = {number: shards.room // sharing for number, shards in self._shards.items()}
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._check()

    def _check(self) -> None:
        """Refuses room that the shards of the present windows fill, so that each would be fetched many times."""
        for number, shards in self._shards.items():
            order, sizes = self.sampler.streams[number].order, shards.shard_bytes()
            if order is None:
                if (all_of_them := int(sizes.sum())) > self.room[number]:
                    raise ConfigError(
                        f"{shards.name} has {in_bytes(all_of_them)}, its copies may take {in_bytes(self.room[number])} "
                        "for each process, and data.order=global reads everywhere: set data.order=window, or give room "
                        "with ?disk= (GiB)"
                    )
                continue
            at = order.lane // 2 // order.rows * order.rows * order.lanes
            held = order.shards(0, at, at + order.rows * order.lanes, self.sampler.own_lanes(order))
            if (needed := int(sizes[held].sum())) > self.room[number]:
                fits = max(1, order.window * self.room[number] // needed)
                raise ConfigError(
                    f"{counted(len(held), 'shard')} of {shards.name} are read at a time by this process, "
                    f"{in_bytes(needed)}, and their copies may take {in_bytes(self.room[number])}: give room with "
                    f"?disk= (GiB), or set data.window={fits} or fewer data.lanes"
                )

    def wanted(self, number: int, step: int) -> list[int]:
        """The shards of a stream from a step on, as far as there is room, those that are read first in front."""
        order, at = self.sampler.streams[number].order, self.sampler.place(number, step)
        if order is None or at is None:
            return []
        epoch, first = at
        lanes, end = self.sampler.own_lanes(order), order.lane * order.lanes
        ahead = first + order.size * order.lanes
        held = [order.shards(epoch, first, min(ahead, end), lanes)]
        if ahead > end:  # the next epoch begins
            held.append(order.shards(epoch + 1, 0, min(ahead - end, end), lanes))
        shards = np.array(list(dict.fromkeys(np.concatenate(held).tolist())), dtype=np.int64)
        fitting = np.cumsum(self._shards[number].shard_bytes()[shards]) <= self.room[number]
        return [int(shard) for shard in shards[fitting]]

    def advance(self, step: int) -> None:
        """Tells that the batch of a step has been made. The first one starts the thread: by then workers have begun."""
        self._step = step
        if self._thread is None and any(self.sampler.streams[number].order is not None for number in self._shards):
            self._thread = threading.Thread(target=self._work, name="fetch-ahead", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while not self._ended.is_set():
            try:
                busy = [shards.hold(self.wanted(number, self._step)) for number, shards in self._shards.items()]
            except OSError:  # of the disk; whoever reads the shard is told
                busy = []
            if not any(busy):
                self._ended.wait(_REST)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the thread, after the shard that it is fetching; nobody waits for that."""
        self._ended.set()


def _remote(source: Any) -> ShardSource | None:
    """The remote shards that a source is, or is a part of."""
    while not isinstance(source, ShardSource):
        source = getattr(source, "source", None)
        if source is None:
            return None
    return source if source.remote else None

"""In which order a run reads its samples: mixed as a whole, or in windows of shards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cmapkd.config import ConfigError
from cmapkd.data.streams import MAIN_STREAM, JoinedSource, Stream, stream_sizes, streams_of
from cmapkd.data.window_order import WindowOrder, shard_counts

MOST_LANES = 64  # where none are set; a power of two
LARGE = 20_000_000  # samples, from which on `auto` reads in windows


@dataclass(frozen=True, slots=True)
class Ordering:
    """The settings of the order; see `DataConfig`. `auto` reads in windows what is not on this machine, or large.

    Attributes:
        lanes: none: the largest power of two that divides every part of a batch, at most `MOST_LANES`.
        window: shards.
    """

    kind: Literal["auto", "global", "window"] = "auto"
    lanes: int | None = None
    window: int = 16

    def streams(self, source: object, *, length: int, batch_size: int, seed: int) -> tuple[Stream, ...]:
        """The streams of a source, each with its order.

        Args:
            length: of the source, in samples.
        Raises:
            ConfigError: windows are asked for, and no stream has shards, or the lanes do not divide the batch.
        """
        streams = streams_of(source) or (Stream(MAIN_STREAM, 0, length),)
        if self.kind == "global":
            return streams
        parts: tuple[object, ...] = source.sources if isinstance(source, JoinedSource) else (source,)
        counts = [shard_counts(part) for part in parts]
        if self.kind == "window" and all(each is None for each in counts):
            raise ConfigError(
                f"data.order is window, and {getattr(source, 'name', 'the source')} has no shards: pack the samples "
                "into tars and name them with webdataset:, or set data.order=global"
            )
        if not any(self._in_windows(part, each) for part, each in zip(parts, counts, strict=True)):
            return streams
        sizes = (batch_size, *(stream_sizes(batch_size, streams) if len(streams) > 1 else ()))
        lanes = self._lanes(sizes)
        return tuple(
            replace(
                stream,
                order=WindowOrder(
                    each,
                    lanes=lanes,
                    rows=batch_size // lanes,
                    window=self.window,
                    seed=seed,
                    name=(stream.name,) if number else (),
                ),
            )
            if each is not None and self._in_windows(part, each, lanes)
            else stream
            for number, (stream, part, each) in enumerate(zip(streams, parts, counts, strict=True))
        )

    def _in_windows(self, source: object, counts: NDArray[np.int64] | None, lanes: int = 1) -> bool:
        if counts is None or self.kind == "window":
            return counts is not None
        return (int(counts.sum()) > LARGE or is_remote(source)) and int(np.count_nonzero(counts)) > lanes

    def _lanes(self, sizes: Sequence[int]) -> int:
        """How many lanes batches have, of whose parts these are the sizes."""
        lanes = self.lanes or math.gcd(*sizes, MOST_LANES)
        if any(size % lanes for size in sizes):
            raise ConfigError(
                f"data.lanes is {lanes}, and a batch has {' and '.join(map(str, dict.fromkeys(sizes)))} samples, of "
                f"which every lane brings as many: take a divisor of {math.gcd(*sizes)}"
            )
        return lanes


def is_remote(source: object) -> bool:
    """Whether a source, or what it is a part of, lies on another machine."""
    while (inner := getattr(source, "source", None)) is not None:
        source = inner
    return bool(getattr(source, "remote", False))


def describe(streams: Sequence[Stream]) -> str:
    """The orders of all streams in a few words."""
    told = [(stream.name, "global" if stream.order is None else stream.order.describe()) for stream in streams]
    return told[0][1] if len(told) == 1 else ", ".join(f"{name} {order}" for name, order in told)

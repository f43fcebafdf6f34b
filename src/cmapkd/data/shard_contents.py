"""What each shard of a source holds, by a digest: what is kept of a shard then serves every set that it is in."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

DIGEST = np.dtype("V16")


@dataclass(frozen=True)
class ShardContents:
    """The shards of a source, in the order of its samples.

    Attributes:
        digests: 16 bytes for each shard. Equal digests hold the same samples under the same ids.
        counts: how many samples each has in the source; some may be 0.
        folder: where they lie.
    """

    digests: NDArray[np.void]
    counts: NDArray[np.int64]
    folder: str = ""

    def part(self, start: int, stop: int) -> ShardContents:
        """Of the samples `start` to before `stop`: a shard that is cut there has another digest."""
        ends = np.append(0, np.cumsum(self.counts))
        cut = np.clip(ends, start, stop)
        counts: NDArray[np.int64] = np.diff(cut)
        digests = self.digests.copy()
        for shard in np.flatnonzero((counts > 0) & (counts < self.counts)).tolist():
            first = int(cut[shard] - ends[shard])
            named = f" {first} to {first + int(counts[shard])}".encode()
            digests[shard] = np.void(blake2b(self.digests[shard].tobytes() + named, digest_size=16).digest())
        return ShardContents(digests, counts, self.folder)


def shard_contents(source: object) -> ShardContents | None:
    """The shards of a source and what they hold; None where it has none, or where more than its shards decides."""
    contents = getattr(source, "shard_contents", None)
    found: ShardContents | None = None if contents is None else contents()
    return found

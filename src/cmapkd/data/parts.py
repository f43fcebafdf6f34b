"""A part of a source, as a source."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from cmapkd.config import ConfigError, counted
from cmapkd.data.shard_contents import ShardContents, shard_contents
from cmapkd.data.templates import class_prompts
from cmapkd.data.types import Sample, Source
from cmapkd.data.unseen import unseen
from cmapkd.data.window_order import shard_counts


class PartOfSource:
    """The samples of a source from `start` to before `stop`, with the ids that they have there.

    Raises:
        ConfigError: there are no such samples.
    """

    def __init__(self, source: Source, start: int, stop: int) -> None:
        if not 0 <= start < stop <= len(source):
            raise ConfigError(
                f"{source.name} has {counted(len(source), 'sample')}, of which {start} to {stop - 1} are asked for: "
                "lower data.held_out, or read more data"
            )
        self.source, self.start, self.stop = source, start, stop
        self.name = source.name
        self.templates: tuple[str, ...] = tuple(getattr(source, "templates", ()))

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`.

        Raises:
            BadSampleError: it cannot be read.
        """
        return self.source[self._place(index)]

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of the sample at `index`; its image is not read.

        Raises:
            BadSampleError: what is said of the image cannot be read.
        """
        return self.source.captions(self._place(index))

    def unseen(self, index: int) -> Sample:
        """The sample at `index` without its picture, where the source reads it so.

        Raises:
            BadSampleError: it cannot be read.
        """
        return unseen(self.source, self._place(index))

    def _place(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"this part of {self.name} has {counted(len(self), 'sample')}, there is no sample {index}")
        return self.start + index

    def shard_counts(self) -> NDArray[np.int64] | None:
        """How many samples of the part each shard of the source has; None where it has no shards."""
        counts = shard_counts(self.source)
        if counts is None:
            return None
        ends = np.clip(np.append(0, np.cumsum(counts)), self.start, self.stop)
        counted_here: NDArray[np.int64] = np.diff(ends)
        return counted_here

    def shard_contents(self) -> ShardContents | None:
        """What the part holds of each shard of the source; None where the source cannot say."""
        contents = shard_contents(self.source)
        return None if contents is None else contents.part(self.start, self.stop)

    @property
    def class_names(self) -> Sequence[str] | None:
        return self.source.class_names

    @property
    def class_prompts(self) -> Sequence[Sequence[str]]:
        """Texts of each class by itself, by label; empty where the source has none."""
        return class_prompts(self.source)

    def fingerprint(self) -> str:
        """Of the whole source and of where the part lies."""
        return blake2b(f"{self.source.fingerprint()}\0{self.start}\0{self.stop}".encode(), digest_size=16).hexdigest()

"""Decoded samples kept in memory, so that small data is read once and not in every epoch."""

from __future__ import annotations

import sys

from cmapkd.data.types import Sample, Source

MIB = 2**20


class SampleMemory:
    """Samples of `source` by position, kept until the first one that does not fit into `limit` MiB.

    Nothing kept is ever dropped: an epoch reads every sample once, in a new order, so that whatever is kept serves one
    reading of each epoch, while a memory that replaced the oldest would drop most samples just before their turn.
    Unreadable samples are not kept.
    """

    def __init__(self, source: Source, limit: int) -> None:
        self.source = source
        self.room = limit * MIB
        self._kept: dict[int, Sample] = {}

    def __getitem__(self, index: int) -> Sample:
        kept = self._kept.get(index)
        if kept is not None:
            return kept
        sample = self.source[index]
        if self.room > 0:
            size = size_of(sample)
            if size <= self.room:
                self._kept[index] = sample
                self.room -= size
            else:
                self.room = 0  # full: measuring a sample can make all that it has, which nobody may read
        return sample


def size_of(sample: Sample) -> int:
    """About the bytes that a sample takes in memory: its pixels, its texts and the objects around them."""
    width, height = sample.image.size
    texts = [*sample.captions, *(text for pool in sample.texts.values() for text in pool)]
    answers = [text for asked in sample.questions for text in (asked.question, *asked.answers)]
    return (
        4 * width * height  # Pillow keeps four bytes for a pixel of three colours
        + sum(map(sys.getsizeof, [*texts, *answers]))
        + 200 * (len(sample.boxes) + len(sample.questions))
        + 1000
    )

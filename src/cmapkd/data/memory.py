"""Decoded samples kept in memory, so that small data is read once and not in every epoch."""

from __future__ import annotations

import sys

from cmapkd.data.types import Sample, Source

MIB = 2**20


class SampleMemory:
    """Samples of `source` by position, the first ones that fit into `limit` MiB kept.

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
        # pixels first: measuring the rest can make all texts and answers of a sample, which nobody may read
        if pixel_bytes(sample) <= self.room and (size := size_of(sample)) <= self.room:
            self.room -= size
            self._kept[index] = sample
        return sample


def pixel_bytes(sample: Sample) -> int:
    """Bytes of a sample's picture alone: Pillow keeps four for a pixel of three colours."""
    width, height = sample.image.size
    return 4 * width * height


def size_of(sample: Sample) -> int:
    """About the bytes that a sample takes in memory: its pixels, its texts and the objects around them."""
    texts = [*sample.captions, *(text for pool in sample.texts.values() for text in pool)]
    turns = [turn.text for turn in sample.turns]
    answers = [text for asked in sample.questions for text in (asked.question, *asked.answers)]
    return (
        pixel_bytes(sample)
        + sum(map(sys.getsizeof, [*texts, *answers, *turns]))
        + 200 * (len(sample.boxes) + len(sample.questions) + len(sample.turns))
        + 1000
    )

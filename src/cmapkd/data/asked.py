"""The samples of a source that a run can ask about, as a source: those with a question in the share that is kept."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray

from cmapkd.config import ConfigError
from cmapkd.data.prompting import Prompting
from cmapkd.data.types import BadSampleError, Sample, Source
from cmapkd.data.unseen import unseen
from cmapkd.data.window_order import shard_counts

MOST_READ = 1_000_000  # samples whose questions are read when a run begins


class AskedSource:
    """The samples that have a kept question, in their order. What is said of each sample is read once at the start.

    Unreadable samples stay: a run counts them as it does elsewhere.

    Args:
        stream: what stands before the ids where streams are joined, as `JoinedSource` writes it; none: nothing.
    Raises:
        ConfigError: too many samples to read, or none has a kept question.
    """

    def __init__(self, source: Source, prompting: Prompting, *, stream: str | None = None) -> None:
        if len(source) > MOST_READ:
            raise ConfigError(
                f"data.prompts.share reads the questions of all samples first, and {source.name} has {len(source):,}: "
                f"name at most {MOST_READ:,}, with ?limit={MOST_READ}"
            )
        self.source, self.prompting, self.stream = source, prompting, stream
        self.name = source.name
        self.templates: tuple[str, ...] = tuple(getattr(source, "templates", ()))
        self._places = torch.tensor([place for place in range(len(source)) if self._has(place)], dtype=torch.int64)
        if not len(self._places):
            raise ConfigError(
                f"none of the {len(source)} samples of {source.name} has a question among the share of "
                f"{prompting.share:g} that is kept: raise data.prompts.share"
            )

    def _has(self, place: int) -> bool:
        try:
            sample = unseen(self.source, place)
        except BadSampleError:
            return True
        return self.prompting.has(sample if self.stream is None else sample.renamed(f"{self.stream}/{sample.id}"))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`, with all its questions.

        Raises:
            BadSampleError: it cannot be read.
        """
        return self.source[self._place(index)]

    def unseen(self, index: int) -> Sample:
        """The sample at `index` without its picture, where the source reads it so.

        Raises:
            BadSampleError: it cannot be read.
        """
        return unseen(self.source, self._place(index))

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of the sample at `index`; its image is not read.

        Raises:
            BadSampleError: what is said of the image cannot be read.
        """
        return self.source.captions(self._place(index))

    def _place(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} samples that are asked about, there is no sample {index}")
        return int(self._places[index])

    def shard_counts(self) -> NDArray[np.int64] | None:
        """How many of these samples each shard of the source has; None where it has no shards."""
        counts = shard_counts(self.source)
        if counts is None:
            return None
        shards = np.searchsorted(np.cumsum(counts), self._places.numpy(), "right")
        return np.bincount(shards, minlength=len(counts))

    @property
    def class_names(self) -> Sequence[str] | None:
        return self.source.class_names

    def fingerprint(self) -> str:
        """Of the whole source, and of which questions are kept."""
        said = f"{self.source.fingerprint()}\0{self.prompting.kind}\0{self.prompting.share!r}\0{self.stream}"
        return blake2b(said.encode(), digest_size=16).hexdigest()


def asked(source: Source, prompting: Prompting | None, *, stream: str | None = None) -> Source:
    """The source itself, or where a share of its questions is kept and no others are asked, the samples with one."""
    if prompting is None or prompting.share == 1 or prompting.unanswered == "student":
        return source
    return AskedSource(source, prompting, stream=stream)

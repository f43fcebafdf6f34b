"""Some samples of a source, as a source: those that a file lists, a few of each class, or all without their labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmapkd.config import ConfigError, counted
from cmapkd.data.places import existing_file
from cmapkd.data.random import key_of
from cmapkd.data.templates import class_prompts
from cmapkd.data.types import BadSampleError, Sample, Source
from cmapkd.data.unseen import unseen
from cmapkd.data.window_order import shard_counts

MOST_READ = 1_000_000  # samples whose labels or ids are read when a source is opened
PICKS = ("ids", "shots", "draw", "labels")
"""Options of every source, which choose among its samples."""


@dataclass(frozen=True, slots=True)
class Pick:
    """What is read of a source's samples.

    Attributes:
        ids: a file with an id on each line; None: all samples.
        shots: samples of each class, by `draw`; None: all. Samples without a label are left out then.
        draw: which ones: a number of the user's.
        hidden: whether the samples come without their labels.
    """

    ids: Path | None = None
    shots: int | None = None
    draw: int = 0
    hidden: bool = False

    def like(self, other: Pick) -> bool:
        """Whether both pick alike; which ids a file lists, a fingerprint tells."""
        same = (self.shots, self.draw, self.hidden) == (other.shots, other.draw, other.hidden)
        return same and (self.ids is None) == (other.ids is None)


class PickedSource:
    """The samples of a source at some places, with the ids that they have there.

    Args:
        places: Int[samples], ascending.
        name: of what was picked; none: the source's own.
    """

    def __init__(self, source: Source, places: Tensor, name: str | None = None) -> None:
        self.source, self._places = source, places
        self.name = name or source.name
        self.templates: tuple[str, ...] = tuple(getattr(source, "templates", ()))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`.

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

    @property
    def id(self) -> Callable[[int], str]:
        """Names samples without reading them; an attribute only where the source has it."""
        inner: Any = self.source
        known: Callable[[int], str] = inner.id
        return lambda index: known(self._place(index))

    def _place(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {counted(len(self), 'sample')} here, there is no sample {index}")
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

    @property
    def class_prompts(self) -> Sequence[Sequence[str]]:
        """Texts of each class by itself, by label; empty where the source has none."""
        return class_prompts(self.source)

    def fingerprint(self) -> str:
        """Of the whole source, and of the places."""
        digest = blake2b(f"{self.source.fingerprint()}\0".encode(), digest_size=16)
        digest.update(self._places.numpy().tobytes())
        return digest.hexdigest()


class Unlabelled(PickedSource):
    """All samples of a source without their labels; the classes keep their names."""

    def __init__(self, source: Source) -> None:
        super().__init__(source, torch.arange(len(source)), f"{source.name}?labels=hidden")

    def __getitem__(self, index: int) -> Sample:
        return super().__getitem__(index).without_label()

    def unseen(self, index: int) -> Sample:
        return super().unseen(index).without_label()

    def fingerprint(self) -> str:
        return blake2b(f"{self.source.fingerprint()}\0hidden".encode(), digest_size=16).hexdigest()


def picked(source: Source, pick: Pick) -> Source:
    """The samples of a source that are picked: first by ids, then so many of each class; the source itself for all.

    Raises:
        ConfigError: the file is missing or empty, it lists ids that the source does not have, no sample has a label, or
            there are too many samples to look at.
    """
    if pick.ids is not None:
        source = _listed(source, pick.ids)
    if pick.shots is not None:
        source = _few_of_each(source, pick.shots, pick.draw)
    return Unlabelled(source) if pick.hidden else source


def read_ids(path: Path) -> tuple[str, ...]:
    """The ids of a file, one on each line; blank lines do not count.

    Raises:
        ConfigError: there is no such file, it is no text, it lists nothing, or one id twice.
    """
    try:
        lines = existing_file(str(path), "ids").read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"ids: {path} is not UTF-8 text: {error}") from None
    ids = tuple(line for line in lines if line.strip())
    if not ids:
        raise ConfigError(f"ids: {path} lists no sample: write an id on each line")
    twice, times = Counter(ids).most_common(1)[0]
    if times > 1:
        raise ConfigError(f"ids: {path} lists {twice!r} twice: a sample is read once an epoch")
    return ids


def sample_id(source: Source, index: int) -> str:
    """The id of the sample at `index`, whether it is good or not; its picture is not read where the source can."""
    own = getattr(source, "id", None)
    if own is not None:
        return str(own(index))
    try:
        return unseen(source, index).id
    except BadSampleError as error:
        return error.sample_id


def _listed(source: Source, path: Path) -> Source:
    wanted = set(read_ids(path))
    _check_size(source, "ids")
    places = [place for place in range(len(source)) if sample_id(source, place) in wanted]
    if len(places) < len(wanted):
        found = {sample_id(source, place) for place in places}
        missing = sorted(wanted - found)
        raise ConfigError(
            f"ids: {len(missing)} of the {counted(len(wanted), 'id')} of {path} are of no sample of {source.name}, the "
            f"first {missing[0]!r} (its own first is {sample_id(source, 0)!r}): name the source that they are of"
        )
    return PickedSource(source, torch.tensor(places), f"{source.name}?ids={path.name}")


def _few_of_each(source: Source, shots: int, draw: int) -> Source:
    """Samples with the smallest numbers of their class; an id and `draw` decide on the number."""
    _check_size(source, "shots")
    by_class: dict[int, list[tuple[int, int]]] = {}
    for place in range(len(source)):
        try:
            sample = unseen(source, place)
        except BadSampleError:
            continue
        if sample.label is not None:
            by_class.setdefault(sample.label, []).append((key_of("shots", draw, sample.id), place))
    if not by_class:
        raise ConfigError(f"shots: none of the {counted(len(source), 'sample')} of {source.name} has a label")
    places = sorted(place for numbered in by_class.values() for _, place in sorted(numbered)[:shots])
    return PickedSource(source, torch.tensor(places), f"{source.name}?shots={shots}&draw={draw}")


def _check_size(source: Source, option: str) -> None:
    if len(source) > MOST_READ:
        raise ConfigError(
            f"{option} reads what is said of every sample first, and {source.name} has {len(source):,}: name at most "
            f"{MOST_READ:,}, with limit={MOST_READ}"
        )

"""Sources whose entries were found when they were opened, and whose ids are kept in memory."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from cmapkd.config import ConfigError
from cmapkd.data.stored import SampleFilter, StoredSource, Texts
from cmapkd.data.types import BadSampleError


class ListedSource(StoredSource):
    """A source over entries found when it was opened, whose ids are kept in memory.

    Entries without caption are left out where captions are required, and counted in `num_without_caption`: they are
    not bad, they say nothing. Of entries with the same id only the first is good.

    Args:
        ids: of all entries.
        captioned: for each entry whether it has a caption; None: all of them may.
        bad: reasons of entries known to be unusable.
    """

    def __init__(
        self,
        name: str,
        ids: Iterable[str],
        *,
        keep: SampleFilter,
        captioned: NDArray[np.bool_] | None = None,
        bad: Mapping[int, str] | None = None,
        class_names: Sequence[str] | None = None,
        warnings: Iterable[str] = (),
    ) -> None:
        super().__init__(name, keep=keep, class_names=class_names, warnings=warnings)
        self._ids = ids if isinstance(ids, Texts) else Texts(ids)
        known_bad = dict(bad or {})
        kept = np.ones(len(self._ids), dtype=np.bool_)
        if self._leaves_out_silent and captioned is not None:
            kept = captioned.copy()
            kept[list(known_bad)] = True  # it may have had a caption: count it as bad, not as silent
        of_part = self._of_part(self._ids, len(kept))
        self.num_without_caption = int((of_part & ~kept).sum())
        kept &= of_part
        self._entries = torch.from_numpy(np.flatnonzero(kept)[: keep.limit].astype(np.int64))
        if not len(self._entries):
            raise ConfigError(self._why_empty(len(self._ids), part_is_empty=not of_part.any()))
        self._bad = {**known_bad, **self._duplicates()}

    def __len__(self) -> int:
        """Number of samples, readable or not."""
        return len(self._entries)

    def id(self, index: int) -> str:
        """The id of the sample at `index`, whether it is good or not."""
        return self._ids[self._entry(index)]

    def _entry(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise self._outside(index)
        return int(self._entries[index])

    def _find(self, index: int) -> tuple[int, str]:
        entry = self._entry(index)
        if entry in self._bad:
            raise BadSampleError(self._ids[entry], self._bad[entry])
        return entry, self._ids[entry]

    def _duplicates(self) -> dict[int, str]:
        """Later entries of an id that came before, found by hash first: 12 million ids need no set of strings."""
        hashes = np.fromiter(map(hash, self._ids.encoded(self._entries)), dtype=np.int64, count=len(self._entries))
        _, which, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        first: dict[str, int] = {}
        duplicates = {}
        for position in np.flatnonzero(counts[which] > 1).tolist():
            entry = int(self._entries[position])
            before = first.setdefault(self._ids[entry], position)
            if before != position:
                duplicates[entry] = f"duplicate id: the sample at position {before} has it already"
        return duplicates

    def fingerprint(self) -> str:
        """32 hexadecimal digits over the ids in order, class names, and what `_contents` covers; not over paths."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (type(self).__name__, *(self._class_names or ()), *self._keep.templates, *self._contents()):
            digest.update(b"%d:" % len(part.encode()) + part.encode())
        for text in self._ids.encoded(self._entries):
            digest.update(b"%d:" % len(text) + text)
        return digest.hexdigest()

    @abstractmethod
    def _contents(self) -> Iterable[str]:
        """Texts that change when the data does and not when it is copied."""

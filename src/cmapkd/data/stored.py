"""What all sources on disk share: ids, which samples are kept, duplicates, and the way from position to `Sample`."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cmapkd.config import ConfigError, counted
from cmapkd.data.images import decode_image
from cmapkd.data.random import uniforms
from cmapkd.data.records import Record, Unreachable, Unusable
from cmapkd.data.templates import fill
from cmapkd.data.types import BadSampleError, Sample
from cmapkd.data.unseen import NO_PICTURE

_AT_ONCE = 65_536  # texts whose places are looked up together


class Texts(Sequence[str]):
    """Many short texts in one block of bytes: a tenth of a list's objects, and not copied when a process forks.

    Block and ends are tensors, which a worker process that does not fork gets as shared memory, not as a copy.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        block = bytearray()
        ends = array("q", [0])
        for text in texts:
            block += text.encode("utf-8", "surrogatepass")
            ends.append(len(block))
        self._block = torch.frombuffer(block or bytearray(1), dtype=torch.uint8)
        self._ends = torch.frombuffer(ends, dtype=torch.int64)
        self._views: tuple[memoryview, memoryview] | None = None

    def __getstate__(self) -> dict[str, Any]:
        self._views = None  # sending the tensors to another process moves them to shared memory
        return self.__dict__

    def _look(self) -> tuple[memoryview, memoryview]:
        """Block and ends, for quick access."""
        if self._views is None:
            self._views = self._block.numpy().data, self._ends.numpy().data
        return self._views

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        block, ends = self._look()
        return bytes(block[ends[index] : ends[index + 1]]).decode("utf-8", "surrogatepass")

    def encoded(self, places: Tensor) -> Iterator[bytes]:
        """The texts at `places`, Int[number], as UTF-8, for passes over many of them."""
        block, _ = self._look()
        for part in places.split(_AT_ONCE):
            for start, end in zip(self._ends[part].tolist(), self._ends[part + 1].tolist(), strict=True):
                yield bytes(block[start:end])


@dataclass(frozen=True, slots=True)
class SampleFilter:
    """Which samples of a source are read: only those with captions, and no more than the first `limit` of them.

    With `templates`, a sample without captions of its own says these sentences of its class name. With `part`, only
    samples whose id falls between the two numbers are read: an id alone decides on a number from 0 to 1.
    """

    require_captions: bool = False
    limit: int | None = None
    templates: tuple[str, ...] = ()
    part: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit must be at least 1 sample, got {self.limit}")


def unread(error: OSError) -> str:
    """Why a file could not be read, as the reason of a bad sample."""
    name = f" ({Path(os.fsdecode(error.filename)).name})" if isinstance(error.filename, str | bytes) else ""
    return f"file cannot be read: {error.strerror or error}{name}"


class StoredSource(ABC):
    """A `Source` on disk. A subclass reads the record and the encoded image of a sample; the rest is done here.

    Args:
        name: as the user wrote it; `part` is added to it, because two parts are other samples.
        warnings: what the user should know of, such as a truncated shard.
    Raises:
        ConfigError: captions are to be made of class names, and there are none.
    """

    templates: tuple[str, ...] = ()
    num_without_caption: int

    def __init__(
        self, name: str, *, keep: SampleFilter, class_names: Sequence[str] | None = None, warnings: Iterable[str] = ()
    ) -> None:
        self.name = name if keep.part is None else f"{name}?part={keep.part[0]:g}-{keep.part[1]:g}"
        self.warnings = tuple(warnings)
        self._class_names = None if class_names is None else tuple(class_names)
        self._keep = keep
        if keep.templates:
            if class_names is None:
                raise ConfigError(
                    f"{name} has no class names to make captions of: leave the option captions out, or name the "
                    "classes with ?classes=FILE"
                )
            self.templates = keep.templates  # zero-shot then asks with the same words

    @property
    def _leaves_out_silent(self) -> bool:
        return self._keep.require_captions and not self._keep.templates

    def _why_empty(self, total: int, *, part_is_empty: bool) -> str:
        if not total:
            notes = "".join(f" {warning}." for warning in self.warnings[:3])
            return f"{self.name} holds no samples.{notes} See docs/data.md for the layouts that are read."
        if self._keep.part is not None and part_is_empty:
            low, high = self._keep.part
            return f"the part {low:g} to {high:g} of the {total} samples of {self.name} is empty"
        return f"none of the {total} samples of {self.name} has a caption, and this use needs captions: " + (
            "make them of its class names with ?captions=a photo of a {}., or give data with captions."
            if self._class_names
            else "use it for classification or question answering, or give data with captions."
        )

    def _of_part(self, ids: Iterable[str], count: int) -> NDArray[np.bool_]:
        """Which of the samples with these ids belong to the part that is kept."""
        if self._keep.part is None:
            return np.ones(count, dtype=np.bool_)
        low, high = self._keep.part
        over = round(high - 1, 12)  # where a part that goes over 1 ends: exactly where 0-0.2 does for 0.4-1.2
        places = (uniforms(1, "part", sample_id)[0] for sample_id in ids)
        return np.fromiter((low <= place < high or place < over for place in places), dtype=np.bool_, count=count)

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples, readable or not."""

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`, its image decoded.

        Raises:
            BadSampleError: it cannot be read; the reason names what is wrong with it.
        """
        entry, sample_id = self._find(index)
        try:
            record = self._record(entry)
            data = None if record.text_only else self._image(entry)
        except Unusable as error:
            raise BadSampleError(sample_id, str(error), isinstance(error, Unreachable)) from None
        except OSError as error:
            raise BadSampleError(sample_id, unread(error)) from None
        return self._sample(sample_id, record, NO_PICTURE if data is None else decode_image(data, sample_id))

    def _said(self, record: Record, sample_id: str) -> tuple[str, ...]:
        """The captions of a record: its own, or those that are made of its class name."""
        names = self._class_names
        if record.captions or not self._keep.templates or names is None:
            return record.captions or ()
        if record.label is None or not 0 <= record.label < len(names):
            if self._keep.require_captions:
                raise BadSampleError(sample_id, "it has neither a caption nor a class to make one of")
            return ()
        return tuple(fill(template, names[record.label]) for template in self._keep.templates)

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of the sample at `index`; its image is not read.

        Raises:
            BadSampleError: as for the sample itself, except for what is wrong with the image.
        """
        return self.unseen(index).captions

    def unseen(self, index: int) -> Sample:
        """The sample at `index` with a dot in the place of its image, which is not read.

        Raises:
            BadSampleError: as for the sample itself, except for what is wrong with the image.
        """
        entry, sample_id = self._find(index)
        try:
            return self._sample(sample_id, self._record(entry), NO_PICTURE)
        except Unusable as error:
            raise BadSampleError(sample_id, str(error), isinstance(error, Unreachable)) from None
        except OSError as error:
            raise BadSampleError(sample_id, unread(error)) from None

    def _sample(self, sample_id: str, record: Record, image: Image.Image) -> Sample:
        captions = self._said(record, sample_id)
        questions, boxes, texts, turns = record.questions, record.boxes, record.texts, record.turns
        no_turns = record.no_turns
        return Sample(sample_id, image, captions, record.label, questions, boxes, texts, turns, no_turns)

    @property
    def class_names(self) -> Sequence[str] | None:
        """Names of the labels, by number; None where samples carry no label or it has no name."""
        return self._class_names

    def _outside(self, index: int) -> IndexError:
        return IndexError(f"{self.name} has {counted(len(self), 'sample')}, there is no sample {index}")

    @abstractmethod
    def id(self, index: int) -> str:
        """The id of the sample at `index`, whether it is good or not."""

    @abstractmethod
    def fingerprint(self) -> str:
        """32 hexadecimal digits that change with the data, and not when they are copied."""

    @abstractmethod
    def _find(self, index: int) -> tuple[Any, str]:
        """The entry of a sample, whatever the subclass reads it by, and its id.

        Raises:
            BadSampleError: it is known to be unusable. IndexError: there is no such sample.
        """

    @abstractmethod
    def _record(self, entry: Any) -> Record:
        """What is said of an entry. Raises Unusable or OSError."""

    @abstractmethod
    def _image(self, entry: Any) -> bytes:
        """An entry's encoded image. Raises Unusable or OSError."""

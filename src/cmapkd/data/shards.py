"""WebDataset tars as a map-style source: indexed once, then read in place by random access."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from cmapkd.config import ConfigError
from cmapkd.data.places import find_files, short_names
from cmapkd.data.reading import IMAGE_EXTENSIONS, RangeReader, check_size
from cmapkd.data.records import MAX_TEXT_BYTES, Record, Unusable
from cmapkd.data.stored import SampleFilter, StoredSource, Texts
from cmapkd.data.tar_index import SYNTHETIC, TEXT_EXTENSIONS, index_tar, read_record


class ShardSource(StoredSource):
    """The samples of tar shards, in the order of the shards and then of their first member.

    Args:
        pattern: a tar, a folder of tars, a glob, or braces as in `{000000..000012}`.
        classes: names of the labels by number, so that labels may also be given by name.
        texts: keys of a sample's JSON that hold further pools of text.
    Raises:
        ConfigError: nothing matches, no shard is a plain tar, there are no samples, or dots in the names of all members
            keep their images from being found.
    """

    def __init__(
        self,
        pattern: str,
        *,
        keep: SampleFilter | None = None,
        classes: Sequence[str] | None = None,
        texts: Sequence[str] = (),
    ) -> None:
        paths = find_files(pattern, suffix=".tar", what="webdataset:")
        self._paths, self._pools = [str(path) for path in paths], tuple(texts)
        self._labels = None if classes is None else {name: number for number, name in enumerate(classes)}
        shards, fields, offsets, sizes, ends = array("q"), array("q"), array("q"), array("q"), array("q", [0])
        names: dict[str, int] = {}  # of fields, such as jpg and json
        ids: list[str] = []
        captioned: list[bool] = []
        bad: dict[int, str] = {}
        warnings: list[str] = []
        self._stamps: list[tuple[int, int]] = []
        self._digests: list[str] = []
        dotted: list[tuple[str, str]] = []  # (key, field) of samples whose image is behind a second dot
        for number, (path, short) in enumerate(zip(paths, short_names(paths), strict=True)):
            try:
                index = index_tar(path)
            except (Unusable, OSError) as error:
                if len(paths) == 1:
                    raise ConfigError(f"webdataset:{pattern} cannot be read: {error}") from None
                warnings.append(f"{path.name} is left out: {error}")
                self._stamps.append((0, 0))
                continue
            self._stamps.append(index.stamp)
            warnings += index.warnings
            digest = hashlib.blake2b(f"{short}\0{index.stamp[0]}".encode(), digest_size=16)
            for entry in index.entries:
                if entry.bad:
                    bad[len(ids)] = entry.bad
                ids.append(entry.id or f"{short}/{entry.key}")
                captioned.append(entry.captioned is not False)
                shards.append(number)
                if (hidden := _hidden_image(entry.members)) is not None:
                    dotted.append((entry.key, hidden))
                for name, (offset, size) in entry.members.items():
                    fields.append(names.setdefault(name, len(names)))
                    offsets.append(offset)
                    sizes.append(size)
                ends.append(len(fields))
                digest.update(f"{entry.key}\0{entry.members}".encode("utf-8", "surrogatepass"))
            self._digests.append(digest.hexdigest())
        self._shards, self._fields, self._offsets, self._sizes, self._ends = (
            torch.tensor(column, dtype=torch.int64) for column in (shards, fields, offsets, sizes, ends)
        )
        if dotted:
            said = _dots(dotted, len(ids))
            if len(dotted) == len(ids):
                raise ConfigError(f"webdataset:{pattern}: {said}")
            warnings.append(said)
        self._names = list(names)
        self._reader = RangeReader()
        super().__init__(
            f"webdataset:{pattern}",
            Texts(ids),
            keep=keep or SampleFilter(),
            captioned=np.array(captioned, dtype=np.bool_),
            bad=bad,
            class_names=classes,
            warnings=warnings,
        )

    def _members(self, entry: int) -> dict[str, tuple[int, int]]:
        span = slice(*self._ends[entry : entry + 2].tolist())
        places = zip(self._offsets[span].tolist(), self._sizes[span].tolist(), strict=True)
        return {self._names[field]: place for field, place in zip(self._fields[span].tolist(), places, strict=True)}

    def _read(self, entry: int, place: tuple[int, int]) -> bytes:
        shard = int(self._shards[entry])
        return self._reader.read(self._paths[shard], *place, stamp=self._stamps[shard])

    def _record(self, entry: int) -> Record:
        members = self._members(entry)
        pictures = int(any(name in members for name in IMAGE_EXTENSIONS))
        texts = {}
        for name in ("json", *TEXT_EXTENSIONS, "cls", SYNTHETIC):
            if name in members:
                if members[name][1] > MAX_TEXT_BYTES:
                    raise Unusable(f"{name} is too large: {members[name][1]} bytes, limit {MAX_TEXT_BYTES}")
                texts[name] = self._read(entry, members[name])
        return read_record(texts, self._labels, self._pools, pictures=pictures)[0]

    def _image(self, entry: int) -> bytes:
        members = self._members(entry)
        place = next((members[name] for name in IMAGE_EXTENSIONS if name in members), None)
        if place is None:
            raise Unusable(f"no image: its members are {', '.join(members)}")
        check_size(place[1])
        return self._read(entry, place)

    def _contents(self) -> Iterable[str]:
        """Of every shard its name, its size and its index: keys, fields, offsets and sizes."""
        return self._digests


def _hidden_image(members: Iterable[str]) -> str | None:
    """The field of a sample without image whose last part is an image's extension; None where there is none.

    webdataset ends the key at the first dot, so that the image `S_02.wav.jpg` is the field `wav.jpg` of `S_02`.
    """
    fields = [*members]
    if any(name in IMAGE_EXTENSIONS for name in fields):
        return None
    return next((name for name in fields if "." in name and name.rpartition(".")[2] in IMAGE_EXTENSIONS), None)


def _dots(dotted: Sequence[tuple[str, str]], total: int) -> str:
    key, field = dotted[0]
    stem, _, extension = field.rpartition(".")
    return (
        f"{len(dotted)} of {total} samples have no image, because the key of a sample ends at the first dot of a name: "
        f"'{key}.{field}' is the field {field!r} of {key!r}. Name the files with one dot, such as "
        f"'{key}_{stem.replace('.', '_')}.{extension}'"
    )

"""From the entries of `tar_index` to the columns of an index, and back where a sample's texts must be read."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np

from cmapkd.data.tar_index import Entry, build_index, look_into
from cmapkd.data.tar_walk import Members


def whole_way(path: Path, stamp: tuple[int, int]) -> Members:
    """The members of any tar, as `tarfile` reads it.

    Raises:
        Unusable: it is no uncompressed tar. OSError: it cannot be read.
    """
    index = build_index(path, stamp)
    fields: dict[str, int] = {}
    rows = [
        (sample, fields.setdefault(name, len(fields)), _bounded(offset), _bounded(size))
        for sample, entry in enumerate(index.entries)
        for name, (offset, size) in entry.members.items()
    ]
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    members = Members([entry.key for entry in index.entries], list(fields), *table.T)
    members.warnings = index.warnings
    for sample, entry in enumerate(index.entries):
        _take(members, sample, entry)
        if entry.bad:
            members.bad[sample] = entry.bad
    return members


def _bounded(number: int) -> int:
    """A damaged header may have a size beyond all files. Its sample is bad."""
    return min(number, 2**62)


def read_texts(members: Members, file: BinaryIO) -> None:
    """Completes what a walk left unclear: ids and captions of samples whose texts need more than a look."""
    for sample in members.unclear:
        first, last = np.searchsorted(members.sample, (sample, sample + 1)).tolist()
        columns = (members.field[first:last], members.offset[first:last], members.size[first:last])
        rows = zip(*(column.tolist() for column in columns), strict=True)
        entry = Entry(members.keys[sample], {members.fields[field]: (offset, size) for field, offset, size in rows})
        look_into(entry, file)
        _take(members, sample, entry)


def _take(members: Members, sample: int, entry: Entry) -> None:
    if entry.id is not None:
        members.ids[sample] = entry.id
    if entry.captioned is False:
        members.silent.append(sample)

"""What is known of all shards of a set, as a file: how many samples each holds, and what is rare."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmapkd.data.shard_index import Damaged

ROW = np.dtype([("samples", "<u4"), ("captioned", "<u4"), ("digest", "V16")])
_TABLE = struct.Struct("<8s16sQQ")  # magic, digest, shards, bytes of JSON
_MAGIC = b"cmapkdst"


@dataclass(slots=True)
class Table:
    """What is known of all shards without a look into their indexes.

    Attributes:
        rows: of each shard its samples, those that may have a caption, and its digest; no samples where it is left out.
            A shard whose samples are a claim has a digest of zeros.
        warnings: in the order of the shards.
        repeated: groups of (shard, sample) that have one id, each in order.
        hidden: samples without image because of dots in their names; key and field of the first of them.
    """

    rows: NDArray[Any]
    warnings: list[str]
    repeated: list[list[tuple[int, int]]]
    hidden: tuple[int, str, str]

    def packed(self) -> bytes:
        values = {"warnings": self.warnings, "repeated": self.repeated, "hidden": self.hidden}
        body = json.dumps(values, separators=(",", ":")).encode("ascii")
        content = body + self.rows.tobytes()
        digest = hashlib.blake2b(content, digest_size=16).digest()
        return _TABLE.pack(_MAGIC, digest, len(self.rows), len(body)) + content

    @classmethod
    def unpacked(cls, data: bytes, shards: int) -> Table:
        """Raises Damaged: it is not whole, or of another number of shards."""
        if len(data) < _TABLE.size:
            raise Damaged
        magic, digest, count, length = _TABLE.unpack_from(data)
        content = data[_TABLE.size :]
        whole = hashlib.blake2b(content, digest_size=16).digest() == digest
        if magic != _MAGIC or count != shards or not whole or len(content) != length + shards * ROW.itemsize:
            raise Damaged
        values = json.loads(content[:length])
        repeated = [[(shard, sample) for shard, sample in group] for group in values["repeated"]]
        rows = np.frombuffer(content, dtype=ROW, offset=length)
        return cls(rows, values["warnings"], repeated, tuple(values["hidden"]))

    @property
    def unindexed(self) -> NDArray[np.bool_]:
        """Of each shard whether no index has been looked into: it is left out, or its samples are a claim."""
        digests = np.ascontiguousarray(self.rows["digest"]).view(np.uint8).reshape(-1, 16)
        return np.logical_not(digests.any(axis=1))

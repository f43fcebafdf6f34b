"""A cache's folder: whose answers it holds, in which layout, and its parts."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from cmapkd.cache.files import (
    CacheError,
    check_values,
    digest_of,
    explained,
    read_json,
    temporary_folder,
    write_json,
)
from cmapkd.cache.identity import BY_SHARD
from cmapkd.cache.layout import RowLayout
from cmapkd.cache.parts import KEYS_FILE, PART_FILE, CachePart, KeyPart, RowFiles
from cmapkd.cache.rows import Layout
from cmapkd.cache.shard_part import FoundFiles, ShardPart, rows_of_shard
from cmapkd.cache.token_layout import TOKENS, TokenLayout
from cmapkd.cache.wanted import Keys
from cmapkd.config.disk import flush
from cmapkd.data.shard_contents import ShardContents

CACHE_FILE = "cache.json"
_PART = re.compile(r"part-(\d+)")


@dataclass(frozen=True)
class ShardsOfRun:
    """A set of data shards as a run reads it, or builds rows for it.

    Attributes:
        views: numbers of views that are looked for.
        data: fingerprint of the set: rows that are not kept by shards belong to it alone.
        batch_size: rows that the teacher answers at once.
    """

    contents: ShardContents
    views: int
    data: str
    batch_size: int


@dataclass(frozen=True)
class CacheFolder:
    """A cache on disk: whose answers it holds, in which layout, and its parts."""

    path: Path
    identity: Mapping[str, Any]
    layout: Layout
    about: Mapping[str, Any]  # names of teacher and data, for people
    logit_scale: float | None  # none: of a teacher that writes
    logit_bias: float | None
    length: int  # samples of the source: keys are view * length + index; 0 in the file of a cache by data shards
    of_run: ShardsOfRun | None = None  # of a cache by data shards: the set that is read or built

    @classmethod
    def create(cls, path: Path, **values: Any) -> Self:
        """Writes `cache.json`.

        Raises:
            CacheError: the folder cannot be written.
        """
        cache = cls(path, **values)
        with explained(path):
            path.mkdir(parents=True, exist_ok=True)
        plain = {key: value for key, value in vars(cache).items() if key not in ("path", "of_run")}
        write_json(path / CACHE_FILE, {**plain, "layout": cache.layout.plain()})
        return cache

    @classmethod
    def open(cls, path: Path) -> Self:
        """Reads `cache.json`.

        Raises:
            CacheError: there is no cache, or it is damaged.
        """
        if path.exists() and not cls.exists(path):
            what = "holds no cache.json" if path.is_dir() else "is a file"
            raise CacheError(f"{path} {what}, so it is no cache: name the folder that cmapkd cache build printed")
        values = read_json(path / CACHE_FILE)
        check_values(
            path / CACHE_FILE,
            values,
            identity=dict,
            layout=dict,
            about=dict,
            logit_scale=float | None,
            logit_bias=float | None,
            length=int,
        )
        try:
            return cls(path, **{**values, "layout": _layout_of(values["layout"])})
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CacheError(
                f"{path / CACHE_FILE} was written by another version of cmapkd, or is damaged ({error}): remove the "
                "folder and build again"
            ) from None

    @staticmethod
    def exists(path: Path) -> bool:
        return (path / CACHE_FILE).exists()

    @property
    def by_shard(self) -> bool:
        """Whether rows are kept by the shards of the data."""
        return self.identity.get("data") == BY_SHARD

    def of(self, shards: ShardsOfRun) -> CacheFolder:
        """The same, where it is by data shards, for one set of them."""
        return replace(self, of_run=shards, length=int(shards.contents.counts.sum()))

    def parts(self) -> list[CachePart]:
        """Rows by data shards first, then those in the order in which they were asked for.

        Raises:
            CacheError: one is damaged.
        """
        if not self.by_shard:
            return [*self._key_parts()]
        run = self.of_run
        assert run is not None, "keys are places in a set of data: see `of`"
        rows = ShardPart.open(self.path, self.layout, run.contents, views=run.views, batch_size=run.batch_size)
        return [*([rows] if rows else []), *self._key_parts(run.data)]

    def files(self) -> list[RowFiles]:
        """All rows, whichever data they are of.

        Raises:
            CacheError: a part is damaged.
        """
        found = FoundFiles.open(self.path, self.layout) if self.by_shard else None
        return [*([found] if found else []), *self._key_parts()]

    def _key_parts(self, of_data: str | None = None) -> list[KeyPart]:
        folders = (folder for folder in sorted(self.path.glob("part-*")) if _PART.fullmatch(folder.name))
        parts = (KeyPart.open(folder, self.layout, of_data=of_data) for folder in folders if folder.is_dir())
        return [part for part in parts if part is not None]

    def begin_rows(self, *, batch_size: int, shard_bytes: float) -> None:
        """Makes room for rows by data shards; nothing where they are kept otherwise."""
        if self.of_run is not None:
            ShardPart.begin(
                self.path, self.layout, views=self.of_run.views, batch_size=batch_size, shard_bytes=shard_bytes
            )

    def next_part(self) -> int:
        """The number after the last part's."""
        found = (_PART.fullmatch(folder.name) for folder in self.path.glob("part-*"))
        return max((int(name[1]) for name in found if name), default=-1) + 1

    def add_part(self, keys: Keys, *, number: int, batch_size: int, shard_bytes: float) -> None:
        """Begins a part for `keys`, unless another process has begun one of this number, for whichever keys.

        Args:
            number: from before it was found out that no part has the keys.
        """
        shard_rows = rows_of_shard(self.layout, batch_size, shard_bytes)
        folder = self.path / f"part-{number:05d}"
        contiguous = int(keys[-1]) - int(keys[0]) + 1 == len(keys)
        listed = keys.astype("<i8").tobytes()
        temporary = temporary_folder(folder)
        with explained(self.path):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            try:
                if not contiguous:
                    (temporary / KEYS_FILE).write_bytes(listed)
                values = {"rows": len(keys), "shard_rows": shard_rows, "batch_size": batch_size}
                of_keys = {"start": int(keys[0])} if contiguous else {"start": None, "keys": digest_of(listed)}
                of_data = {} if self.of_run is None else {"data": self.of_run.data}
                write_json(temporary / PART_FILE, values | of_keys | of_data)
                temporary.rename(folder)
                flush(self.path)
            except OSError:
                shutil.rmtree(temporary, ignore_errors=True)
                if not (folder / PART_FILE).exists():  # else another process was faster
                    raise
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise


def _layout_of(values: Mapping[str, Any]) -> Layout:
    """The layout that `Layout.plain` described."""
    return TokenLayout.from_plain(values) if values["kind"] == TOKENS else RowLayout.from_plain(values)

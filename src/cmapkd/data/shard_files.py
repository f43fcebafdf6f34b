"""Where the bytes of shards come from: tars on this machine, or copies of remote ones on its disk.

A remote shard is fetched whole, and its copy is read as any tar. All processes of a machine share the copies. Together
they take no more than a limit: the copy that was not read or asked for the longest goes first. A file's time of last
change says when that was, so nothing else need be kept, and a run that is resumed finds what was left.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from cmapkd.config import ConfigError, in_bytes
from cmapkd.data.reading import RangeReader
from cmapkd.data.records import Unreachable, Unusable
from cmapkd.data.shard_index import Stamp, build, cache_folder, index_file, stamp_of, write
from cmapkd.data.stores import Store

try:
    import fcntl
except ImportError:  # Windows has none: there each process fetches what it reads
    fcntl = None  # type: ignore[assignment]

GIB = 2**30
DISK = 100 * GIB  # bytes that copies take where nothing else is said
TOUCHED_EVERY = 1.0  # seconds, at most, between the notes that a copy is in use
FAILED_FOR = 300.0  # seconds for which a shard that could not be fetched is not asked for again
PATIENCE = 900.0  # seconds that another process may take to fetch a shard
_POLL = 0.05


class LocalFiles(RangeReader):
    """Tars on this machine."""

    remote = False

    def stamp(self, path: str) -> Stamp:
        """Raises OSError."""
        return stamp_of(path)

    def index(self, path: str, stamp: Stamp) -> bytes:
        """The file form of the index of a shard.

        Raises:
            Unusable: it is no tar, or no longer the one that was opened. OSError: it cannot be read.
        """
        if stamp_of(path) != stamp:
            raise Unusable(f"file has changed since it was opened: {Path(path).name}")
        return build(path, stamp)


class RemoteFiles:
    """Copies of remote shards.

    Args:
        store: where they lie.
        stamps: of each URL what it holds.
        folder: of the copies.
        limit: bytes that all copies in the folder may take.
    Attributes:
        fetched: bytes that this process fetched.
    Raises:
        ConfigError: two shards do not fit.
    """

    remote = True

    def __init__(self, store: Store, stamps: Sequence[tuple[str, Stamp]], *, folder: Path, limit: int = DISK) -> None:
        self.store, self.folder, self.limit = store, folder, limit
        self._stamps = dict(stamps)
        self.fetched = 0
        self._touched: dict[str, float] = {}
        largest = max(stamp[0] for stamp in self._stamps.values())
        if 2 * largest > limit:
            raise ConfigError(
                f"copies of shards may take {in_bytes(limit)}, and the largest shard has {in_bytes(largest)}: give "
                f"room for two at least, better for all that are read at a time: ?disk={-(-2 * largest // GIB)} (GiB)"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(f"no copies of shards can be kept in {folder}: {error.strerror}") from None

    def stamp(self, url: str) -> Stamp:
        """What the shard held when the set was opened."""
        return self._stamps[url]

    def index(self, url: str, stamp: Stamp) -> bytes:
        """The file form of the index of a shard, which is fetched for it; its checksum is kept beside the index.

        Raises:
            Unusable: it is no tar, or cannot be fetched. OSError: its copy cannot be written or read.
        """
        while True:
            with self._copy(url, stamp), suppress(FileNotFoundError):  # it may go before it is opened again
                return build(str(self._place(url, stamp)), stamp)

    def read(self, url: str, offset: int, size: int, *, stamp: Stamp) -> bytes:
        """`size` bytes at `offset`.

        Raises:
            Unusable: the shard cannot be fetched, or is another one by now. OSError: its copy cannot be read.
        """
        with self._copy(url, stamp) as handle:
            data = os.pread(handle, size, offset)
        if len(data) < size:
            raise Unusable(f"the copy of {url} ends early: remove {self._place(url, stamp)}")
        return data

    def has(self, url: str) -> bool:
        """Whether the copy of a shard is here."""
        return self._place(url, self._stamps[url]).exists()

    def hold(self, urls: Sequence[str]) -> bool:
        """Fetches the first of these shards that is not here, and notes that the others are wanted.

        Returns:
            Whether one was fetched; else all are here.
        """
        for url in urls:
            with suppress(OSError):
                os.utime(self._place(url, self._stamps[url]))
        for url in urls:
            stamp = self._stamps[url]
            if not self._place(url, stamp).exists() and self._failure(url, stamp) is None:
                with suppress(Unusable):  # whoever reads it is told
                    self._fetch(url, stamp)
                return True
        return False

    def _place(self, url: str, stamp: Stamp) -> Path:
        name = hashlib.blake2b(f"{url}\0{stamp}".encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        return self.folder / f"{name}.tar"

    @contextmanager
    def _copy(self, url: str, stamp: Stamp) -> Iterator[int]:
        """The copy of a shard, open. A removed one stays readable, and its room is free when it closes."""
        place = self._place(url, stamp)
        while True:
            try:
                handle = os.open(place, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                break
            except FileNotFoundError:
                self._fetch(url, stamp)
        try:
            now = time.monotonic()
            if now - self._touched.get(url, 0.0) > TOUCHED_EVERY:
                self._touched[url] = now
                with suppress(OSError):
                    os.utime(place)
            yield handle
        finally:
            os.close(handle)

    def _fetch(self, url: str, stamp: Stamp) -> None:
        """Fetches a shard, unless another process does so at this moment.

        Raises:
            Unreachable: it cannot be fetched, now or by another process a short time ago.
        """
        place = self._place(url, stamp)
        if (failure := self._failure(url, stamp)) is not None:
            raise Unreachable(failure)
        part = place.with_suffix(".part")
        handle = os.open(part, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
        try:
            if not _locked(handle, PATIENCE):
                raise Unreachable(f"{url} is being fetched by another process, for {PATIENCE:g} s by now")
            if not _same(handle, part):
                return  # the other process has it, or gave up: whoever wants it looks again
            self._make_room(stamp[0], handle)
            try:
                self._write(url, stamp, handle)
            except (Unusable, OSError) as error:
                part.unlink(missing_ok=True)
                if isinstance(error, Unusable):
                    with suppress(OSError):
                        write(place.with_suffix(".failed"), str(error).encode())
                    raise Unreachable(str(error)) from None
                raise
            with self._room():  # else whoever counts the files could miss this one
                part.rename(place)
        finally:
            os.close(handle)

    @contextmanager
    def _room(self) -> Iterator[None]:
        """Lets one thread of one process after the other count, remove and add files."""
        lock = os.open(self.folder / "room.lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
        try:
            if not _locked(lock, PATIENCE):
                raise Unreachable(f"another process holds {self.folder / 'room.lock'}, for {PATIENCE:g} s by now")
            yield
        finally:
            os.close(lock)

    def _write(self, url: str, stamp: Stamp, handle: int) -> None:
        def put(offset: int, data: bytes) -> None:
            while data:
                written = os.pwrite(handle, data, offset)
                offset, data = offset + written, data[written:]

        self.store.fetch(url, stamp, put)
        self.fetched += stamp[0]
        os.fsync(handle)
        known, now = index_file(url, stamp).with_suffix(".crc"), _checksum(handle)
        try:
            before = int.from_bytes(known.read_bytes(), "little")
        except OSError:
            with suppress(OSError):
                write(known, now.to_bytes(4, "little"))
            return
        if before != now:
            raise Unusable(
                f"{url} holds other bytes than when it was opened, of the same size and tag (CRC-32 {before:08x}, now "
                f"{now:08x}): the store or the network damages it"
            )

    def _failure(self, url: str, stamp: Stamp) -> str | None:
        """Why a shard could not be fetched, if that was a short time ago, in any process."""
        file = self._place(url, stamp).with_suffix(".failed")
        try:
            if time.time() - file.stat().st_mtime < FAILED_FOR:
                return file.read_text(encoding="utf-8")
            file.unlink(missing_ok=True)
        except OSError:
            pass
        return None

    def _make_room(self, size: int, handle: int) -> None:
        """Removes copies until this one fits, and takes its room.

        Raises:
            Unusable: what is being fetched leaves no room for as long as `PATIENCE`. OSError: the disk is full.
        """
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with self._room():
                if self._free(size, handle):
                    os.ftruncate(handle, size)
                    return
            time.sleep(_POLL)
        raise Unreachable(f"copies of shards leave no room of {in_bytes(size)} in {self.folder}: raise ?disk=")

    def _free(self, size: int, handle: int) -> bool:
        copies, parts = [], 0
        for file in self.folder.iterdir():
            try:
                status = file.stat()
                if file.suffix == ".tar":
                    copies.append((status.st_mtime_ns, status.st_size, file))
                elif file.suffix == ".part" and not _same(handle, file) and not _left_over(file):
                    parts += status.st_size
            except OSError:
                continue
        taken = parts + sum(each[1] for each in copies)
        for _, freed, file in sorted(copies):
            if taken + size <= self.limit:
                break
            file.unlink(missing_ok=True)
            taken -= freed
        free = shutil.disk_usage(self.folder).free
        if taken + size <= self.limit and free < size:
            raise OSError(28, f"the disk has {in_bytes(free)} left for a shard of {in_bytes(size)}", str(self.folder))
        return taken + size <= self.limit


def copies_folder() -> Path:
    """Where copies are kept, if nothing else is said: beside the indexes of tars."""
    return cache_folder().with_name("shards")


def _locked(handle: int, patience: float) -> bool:
    """Whether the lock of an open file could be had in so many seconds; the system ends it with the handle."""
    deadline = time.monotonic() + patience
    while fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL)
    return True


def _same(handle: int, file: Path) -> bool:
    """Whether a name still belongs to an open file."""
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except OSError:
        return False


def _left_over(part: Path) -> bool:
    """Removes a piece whose process has ended; whether it was one."""
    handle = os.open(part, os.O_RDWR)
    try:
        if not _locked(handle, 0.0):
            return False
        part.unlink(missing_ok=True)
        return True
    finally:
        os.close(handle)


def _checksum(handle: int) -> int:
    """CRC-32 of an open file: about 0.3 s of CPU time a GB."""
    value, offset = 0, 0
    while data := os.pread(handle, 2**22, offset):
        value, offset = zlib.crc32(data, value), offset + len(data)
    return value

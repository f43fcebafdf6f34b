"""Bytes out of tars, zips and folders by random access, from any process and after any fork."""

from __future__ import annotations

import os
import stat
import threading
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from cmapkd.config import ConfigError
from cmapkd.data.images import MAX_IMAGE_BYTES
from cmapkd.data.records import Unusable
from cmapkd.data.tar_names import IMAGE_EXTENSIONS, is_safe_name

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]


def most_files() -> int:
    """How many files one reader keeps open in a process: a quarter of those that it may have, in [16, 1024]."""
    allowed = 1024 if resource is None else resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(16, min(1024, allowed // 4))


def is_image_name(name: str) -> bool:
    base = name.rpartition("/")[2]
    return not base.startswith(".") and base.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and "." in base


class Images(Protocol):
    """Where image files are read from, by name: a folder or a zip."""

    def has(self, name: str) -> bool: ...

    def read(self, name: str) -> bytes:
        """Raises Unusable or OSError."""
        ...


class Folder:
    """Files under a folder.

    Args:
        strict: refuse names that point outside. A table beside the images that the user wrote may name `../images` and
            absolute paths; a data set from elsewhere may not.
    """

    def __init__(self, path: Path, *, strict: bool = True) -> None:
        self.path, self.strict = path, strict

    def has(self, name: str) -> bool:
        return not (self.strict and not is_safe_name(name)) and (self.path / name).is_file()

    def read(self, name: str) -> bytes:
        """The bytes of a regular file.

        Raises:
            Unusable: there is none, it is too large to be a picture, or its name is refused.
        """
        if "://" in name:
            raise Unusable("image is a URL, which is not fetched: download the images first")
        if self.strict and not is_safe_name(name):
            raise Unusable(f"image name is refused: {name} points outside its folder")
        path = self.path / name
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # a device or a pipe would never end
                raise Unusable(f"image file is not a regular file: {name}")
        except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a NUL in the name
            if isinstance(error, Unusable):
                raise
            raise Unusable(f"image file is missing: {name}") from None
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            check_size(size)
            return file.read(size)


def check_size(size: int) -> None:
    if size > MAX_IMAGE_BYTES:
        raise Unusable(f"file is too large: {size} bytes, limit {MAX_IMAGE_BYTES}")


class RangeReader:
    """Reads ranges of files through a few open handles of its own process; pickles and forks as an empty one.

    Positional reads share no file position, so a handle inherited by a fork would be safe too; the lock would not.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._handles: OrderedDict[str, int] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self._reset()

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # bound: `os` is gone when Python shuts down
        for handle in getattr(self, "_handles", {}).values():
            close(handle)

    def read(self, path: str, offset: int, size: int, *, stamp: tuple[int, int]) -> bytes:
        """`size` bytes at `offset`.

        Args:
            stamp: the file's size and modification time (ns) when its index was made.
        Raises:
            Unusable: the file is no longer that one.
        """
        if self._process != os.getpid():
            self._reset()
        with self._lock:
            handle = self._handles.get(path)
            if handle is None:
                handle = self._open(path, stamp)
            self._handles.move_to_end(path)
            data = os.pread(handle, size, offset)
            while len(data) < size:  # network file systems may return less at a time
                more = os.pread(handle, size - len(data), offset + len(data))
                if not more:
                    raise Unusable(f"file ends early: {Path(path).name} was cut after its index was made")
                data += more
            return data

    def _open(self, path: str, stamp: tuple[int, int]) -> int:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        status = os.fstat(handle)
        if (status.st_size, status.st_mtime_ns) != stamp:
            os.close(handle)
            raise Unusable(f"file has changed since it was opened: {Path(path).name}")
        self._handles[path] = handle
        if len(self._handles) > most_files():
            os.close(self._handles.popitem(last=False)[1])
        return handle


class ZipReader:
    """Members of one zip, read in place; nothing is unpacked to disk.

    Names that point outside (`..`, absolute), links, encrypted members and second members of a name are left out and
    listed in `skipped`.

    Raises:
        ConfigError: it is no zip.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        status = path.stat()
        self._stamp = (status.st_size, status.st_mtime_ns)
        self._process = os.getpid()
        try:
            self._zip: zipfile.ZipFile | None = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise ConfigError(f"{str(path)!r} is not a readable zip: {error}") from None
        infos = self._zip.infolist()
        self.members: dict[str, int] = {}  # name to size
        self.skipped: list[str] = []
        for info in infos:
            is_link = (info.external_attr >> 16) & 0o170000 == 0o120000
            if info.is_dir():
                continue
            if is_link or info.flag_bits & 1 or not is_safe_name(info.filename) or info.filename in self.members:
                self.skipped.append(info.filename)
            else:
                self.members[info.filename] = info.file_size
        self.checksums = {info.filename: info.CRC for info in infos}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_zip": None, "_process": -1}

    def has(self, name: str) -> bool:
        return name in self.members

    def read(self, name: str) -> bytes:
        """A member's bytes, its checksum verified.

        Raises:
            Unusable: it is damaged, too large, or the zip has changed since it was opened.
        """
        if name not in self.members:
            raise Unusable(f"image file is missing: {name} is not in {self.path.name}")
        check_size(self.members[name])
        archive = self._zip
        if archive is None or self._process != os.getpid():  # a handle from before a fork shares its position
            status = self.path.stat()
            if (status.st_size, status.st_mtime_ns) != self._stamp:
                raise Unusable(f"file has changed since it was opened: {self.path.name}")
            self._process = os.getpid()
            archive = self._zip = zipfile.ZipFile(self.path)
        try:
            return archive.read(name)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise Unusable(f"zip member is damaged: {error}") from None

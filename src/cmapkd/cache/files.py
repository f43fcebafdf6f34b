"""The files of a cache: written whole or not at all, JSON with a digest of its own, errors that say what to do."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from types import UnionType
from typing import Any

from cmapkd.config.disk import FULL, READ_ONLY, flush


class CacheError(ValueError):
    """A cache that cannot be read, written, or used for this run; says why, and what to do."""


def digest_of(data: bytes | memoryview) -> str:
    return blake2b(data, digest_size=16).hexdigest()


def digest_of_rows(data: bytes) -> int:
    """Eight bytes, for a few rows of a shard."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes `values` and their digest."""
    text = json.dumps(values | {"digest": _digest(values)}, indent=1, sort_keys=True) + "\n"
    with new_file(path) as temporary:
        temporary.write_bytes(text.encode())


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote.

    Raises:
        CacheError: it is not there, or not as it was written.
    """
    try:
        values: dict[str, Any] = json.loads(path.read_bytes())
        written = values.pop("digest")
        expected = _digest(values)
    except FileNotFoundError:
        raise CacheError(f"there is no {path}: build the cache first (cmapkd cache build)") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CacheError(f"{path} is damaged ({error}): restore it, or remove its folder and build again") from None
    if written != expected:
        raise CacheError(f"{path} is damaged (its digest does not fit): restore it, or remove its folder and rebuild")
    return values


def check_values(path: Path, values: Mapping[str, Any], **kinds: type | UnionType) -> None:
    """Refuses a file of ours without these values, or with others than cmapkd writes: numbers are not negative.

    Raises:
        CacheError: names the first.
    """
    for name, kind in kinds.items():
        value = values.get(name)
        good = isinstance(value, kind) and not isinstance(value, bool)
        if not good or (isinstance(value, int) and not 0 <= value < 2**62):
            raise CacheError(
                f"{path} has {name} {str(value)[:60]!r}, which no cmapkd writes: restore it, or remove its folder and "
                "build again"
            )


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, flushed and renamed to it at the end; removed if anything goes wrong.

    Raises:
        CacheError: the disk is full or read-only.
    """
    temporary = path.with_name(f".{path.name}.{_process_tag()}.writing")
    try:
        with explained(path.parent):
            yield temporary
            flush(temporary)
            temporary.rename(path)
            flush(path.parent)
    except BaseException:
        with suppress(OSError):  # a disk that refused the file refuses its removal too, and that would hide the reason
            temporary.unlink()
        raise


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turns what a disk can refuse into a `CacheError`; what is finished on it stays."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise CacheError(
                f"the disk of {folder} is full: free some space, or name another folder (cache.folder), and build "
                "again; finished shards are kept"
            ) from None
        if error.errno in READ_ONLY:
            raise CacheError(
                f"{folder} cannot be written ({error.strerror}): name another folder (cache.folder)"
            ) from None
        raise


def temporary_folder(path: Path) -> Path:
    """Where this process prepares a folder that will be renamed to `path`."""
    return path.with_name(f".{path.name}.{_process_tag()}.writing")


def leftovers(folder: Path) -> Iterator[Path]:
    """What writers that are no longer alive left in `folder`; those of other machines are not touched."""
    for path in folder.glob(".*.writing"):
        host, _, number = path.name.removesuffix(".writing").rpartition(".")[2].rpartition("-")
        if host == _host() and number.isdecimal() and not _alive(int(number)):
            yield path


def _digest(values: dict[str, Any]) -> str:
    return digest_of(json.dumps(values, sort_keys=True).encode())


def _host() -> str:
    return socket.gethostname().replace(".", "_")


def _process_tag() -> str:
    return f"{_host()}-{os.getpid()}"


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

"""Files behind URLs (`s3://`, `gs://`, `https://`, `hf://`), through fsspec: what is there, and its bytes, or an error.

A store may fail, stall, cut an answer short or hold another file than before. Each request has a time and is asked
again a few times; what still fails is an `Unusable` or a `ConfigError` that names the file and says what happened.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from cmapkd.config import ConfigError
from cmapkd.config.extras import install_advice
from cmapkd.data.places import expand_braces
from cmapkd.data.records import Unusable

T = TypeVar("T")
Stamp = tuple[int, int]
"""A file's size, and a number of 63 bits that its tag (ETag, generation, time) makes."""

TRIES = 6  # of a request
PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds before the second try, doubled each time; and the longest
REQUEST_SECONDS = 60.0  # that one request may take: 280 kB/s at least of a whole range
RANGE = 16 * 2**20  # bytes of one request
AT_ONCE = 4  # requests of one file
ASKED_AT_ONCE = 16  # files whose sizes are asked for

_TAGS: tuple[str, ...] = ("ETag", "etag", "xet_hash", "blob_id", "generation", "md5Hash")
_TAGS += ("LastModified", "last_modified", "Last-Modified", "updated", "mtime", "created")
_ABSENT = (403, 404, 410)  # answers of web servers; a bucket that may not be listed says 403 of what is not there
_jitter = random.SystemRandom()  # draws nothing from the run's random state
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}


def is_url(text: str) -> bool:
    return "://" in text


class Store:
    """The file system of one protocol. Picklable; each process connects on its own.

    Args:
        url: of any of its files.
    Raises:
        ConfigError: fsspec has no such protocol, or lacks the package for it.
    """

    def __init__(self, url: str) -> None:
        self.protocol = url.partition("://")[0]
        self._connected: tuple[int, Any] | None = None
        self._system()

    def __getstate__(self) -> dict[str, Any]:
        return {"protocol": self.protocol, "_connected": None}

    def _system(self) -> Any:
        """This process's own connection: those of a parent do not survive a fork."""
        if self._connected is None or self._connected[0] != os.getpid():
            import fsspec

            try:
                made = fsspec.filesystem(self.protocol, skip_instance_cache=True, use_listings_cache=False)
            except ImportError as error:
                extra = _EXTRAS.get(self.protocol)
                advice = f"({error})" if extra is None else install_advice(extra)
                raise ConfigError(f"{self.protocol}:// needs a package that is not installed: {advice}") from None
            except ValueError:
                raise ConfigError(
                    f"{self.protocol}:// is no protocol that fsspec knows: use s3://, gs://, https:// or hf://"
                ) from None
            self._connected = (os.getpid(), made)
        return self._connected[1]

    def find(self, pattern: str) -> list[tuple[str, Stamp]]:
        """The files that a pattern names, with what each holds: a URL, braces, a glob, or a folder with its tars.

        Raises:
            ConfigError: nothing is there, or the store does not answer.
        """
        found: list[tuple[str, Stamp]] = []
        single: list[str] = []
        for name in expand_braces(pattern):
            if any(letter in name for letter in "*?[") or name.endswith("/"):
                listed = self._listed(name + "*.tar" * name.endswith("/"))
                if not listed:
                    raise ConfigError(f"webdataset: {name!r} matches no file of the store")
                found += listed
            else:
                single.append(name)
        with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
            try:
                found += zip(single, pool.map(self.stamp, single), strict=True)
            except Unusable as error:
                raise ConfigError(f"webdataset: {error}") from None
            finally:
                pool.shutdown(cancel_futures=True)
        return list(dict(found).items())

    def _listed(self, pattern: str) -> list[tuple[str, Stamp]]:
        system = self._system()
        try:
            entries = _patiently(lambda: _ask(system, "glob", pattern, detail=True), pattern)
            names = {system.unstrip_protocol(name): info for name, info in entries.items() if info["type"] == "file"}
            return [(name, _stamp_of(name, info)) for name, info in sorted(names.items())]
        except Unusable as error:
            raise ConfigError(f"webdataset: {error}") from None

    def stamp(self, url: str) -> Stamp:
        """Raises Unusable: the store does not tell."""
        system = self._system()
        return _stamp_of(url, _patiently(lambda: _ask(system, "info", url), url))

    def small(self, urls: Sequence[str], most: int, read: Callable[[bytes], T]) -> list[T | None]:
        """What `read` makes of small files; None where there is none, or none that may be read.

        Args:
            most: bytes of a file that are fetched; the rest of it is left out.
            read: called by several threads, so that the bytes of all files are not held together.
        Raises:
            Unusable: the store does not tell.
        """

        def one(url: str) -> T | None:
            data = self._small(url, most)
            return None if data is None else read(data)

        with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
            try:
                return list(pool.map(one, urls))
            finally:
                pool.shutdown(cancel_futures=True)

    def _small(self, url: str, most: int) -> bytes | None:
        system = self._system()

        def ask() -> bytes | None:
            try:
                data: bytes = _ask(system, "cat_file", url, start=0, end=most)
                return data
            except Exception as error:
                if isinstance(error, FileNotFoundError | PermissionError) or getattr(error, "status", 0) in _ABSENT:
                    return None
                with suppress(Exception):
                    if _ask(system, "info", url).get("size") == 0:
                        return b""  # it has no range that could be asked for
                raise

        return _patiently(ask, url)

    def fetch(self, url: str, stamp: Stamp, write: Callable[[int, bytes], object]) -> None:
        """Reads a whole file, in ranges side by side.

        Args:
            stamp: what it must hold, before and after.
            write: is given an offset and the bytes from there on, by several threads.
        Raises:
            Unusable: it is another file by now, or cannot be read.
        """
        system = self._system()
        self._check(url, stamp)

        def read(start: int) -> None:
            end = min(start + RANGE, stamp[0])
            write(start, _patiently(lambda: _range(system, url, start, end), url))

        with ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                list(pool.map(read, range(0, stamp[0], RANGE)))
            finally:
                pool.shutdown(cancel_futures=True)
        self._check(url, stamp)

    def _check(self, url: str, stamp: Stamp) -> None:
        now = self.stamp(url)
        if now != stamp:
            size = f"{stamp[0]} bytes, now {now[0]}" if now[0] != stamp[0] else f"{now[0]} bytes, with another tag"
            raise Unusable(f"file has changed since it was opened: {url} ({size})")


def tag_number(tag: object) -> int:
    digest = hashlib.blake2b(str(tag).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _stamp_of(url: str, info: dict[str, Any]) -> Stamp:
    if not isinstance(info.get("size"), int):
        raise Unusable(f"the store does not say how large {url} is")
    return info["size"], tag_number(next((info[name] for name in _TAGS if info.get(name)), ""))


def _ask(system: Any, what: str, *arguments: Any, **options: Any) -> Any:
    """Calls a function of a file system, within `REQUEST_SECONDS` where it can be interrupted."""
    if getattr(system, "async_impl", False):
        from fsspec.asyn import sync

        return sync(system.loop, getattr(system, f"_{what}"), *arguments, timeout=REQUEST_SECONDS, **options)
    return getattr(system, what)(*arguments, **options)


def _range(system: Any, url: str, start: int, end: int) -> bytes:
    data: bytes = _ask(system, "cat_file", url, start=start, end=end)
    if len(data) != end - start:
        raise OSError(f"{len(data)} bytes came where {end - start} were asked for")
    return data


def _patiently(ask: Callable[[], T], url: str) -> T:
    """What is asked for, after some tries if need be.

    Raises:
        Unusable: none of them had an answer.
    """
    start, tries = time.monotonic(), 0
    while True:
        tries += 1
        try:
            return ask()
        except Exception as error:  # each package has errors of its own
            if tries == TRIES or isinstance(error, PermissionError):
                raise Unusable(
                    f"{url} cannot be read: {_told(error)} ({tries} tries in {time.monotonic() - start:.0f} s)"
                ) from None
        longest = min(LONGEST_PAUSE, PAUSE * 2 ** (tries - 1))
        time.sleep(longest * _jitter.uniform(0.5, 1.0))


def _told(error: BaseException) -> str:
    """An error in words; those of fsspec hide what a server answered."""
    inner = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ is not None else error
    if isinstance(inner, TimeoutError) or type(inner).__name__ == "FSTimeoutError":
        return f"no answer within {REQUEST_SECONDS:g} s"
    first: Sequence[str] = str(inner).splitlines() or [""]
    return f"{type(inner).__name__}: {first[0][:200]}" if first[0] else type(inner).__name__

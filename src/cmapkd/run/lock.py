"""One living run for each folder: a second one is refused in words and harms nothing."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from cmapkd.config import ConfigError, writing

try:
    import fcntl
except ImportError:  # Windows has none: there a second run is not noticed
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
"""The file in a run folder that its living run holds. Who holds it stands in it."""


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Holds a run folder, which is made if need be, as long as the context lasts.

    The lock belongs to the process: the kernel ends it with the process, however that dies, and processes that a
    data loader forks do not have it. So a lock is never left behind, and a resume after a kill need not wait.

    Raises:
        ConfigError: another process holds the folder; the message says which.
    """
    if fcntl is None or (_there(out) and not out.is_dir()):
        yield  # what is no folder is refused by who prepares it
        return
    fresh = not _there(out)
    try:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a name that no disk takes, or a place where nothing can be made
        raise ConfigError(f"the folder {out} cannot be made ({error.strerror}): name another one") from None
    with _held(out) as file:
        holder = {"host": socket.gethostname(), "process": os.getpid(), "since": _now()}
        with suppress(OSError):  # a full disk refuses the words, not the lock
            file.truncate(0)
            file.write(json.dumps(holder) + "\n")
            file.flush()
        try:
            yield
        finally:
            (out / LOCK).unlink(missing_ok=True)
            if fresh:  # it stays unless nothing was written into it
                with suppress(OSError):
                    out.rmdir()


def _there(path: Path) -> bool:
    with suppress(OSError):  # of a name that is too long, the system says no more than that
        return path.exists()
    return False


def _held(out: Path) -> TextIO:
    """The lock's open file, which this process holds as long as it is open."""
    while True:
        with writing(out):
            file = (out / LOCK).open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still_there(file, out / LOCK):
                return file
            file.close()  # the run that held it has just ended and removed it
        except (BlockingIOError, PermissionError):  # systems say either of a lock that another process has
            file.seek(0)
            holder = _holder(file.read())
            file.close()
            raise ConfigError(
                f"{out} is being written by another run{holder}: wait until that run ends, stop it, or name another "
                "folder"
            ) from None
        except OSError:  # a drive without locks: there a second run is not noticed
            return file


def _is_still_there(file: TextIO, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _holder(text: str) -> str:
    """Who holds the folder, as far as its lock says so."""
    try:
        holder = json.loads(text)
        return f" (process {holder['process']} on {holder['host']}, since {holder['since']})"
    except (ValueError, KeyError, TypeError):
        return ""


def _now() -> str:
    return datetime.now(UTC).isoformat(sep=" ", timespec="seconds")

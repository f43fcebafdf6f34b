"""Folders that nothing may be written to, for tests that run as root, whom no file mode stops."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_locked: set[str] = set()
_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.utime"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if not _locked or not (event in _CHANGES or (event == "open" and arguments[2] & _WRITES)):
        return
    for path in arguments[:2]:
        if not isinstance(path, str | bytes | os.PathLike):
            continue
        name = os.path.realpath(os.fsdecode(path))
        if any(name == folder or name.startswith(folder + os.sep) for folder in _locked):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), name)


sys.addaudithook(_refuse)  # it cannot be taken away again: it does nothing while no folder is locked


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Refuses, like a read-only disk, whatever this process wants to change in `folder` by Python's own calls."""
    name = os.path.realpath(folder)
    _locked.add(name)
    try:
        yield
    finally:
        _locked.discard(name)

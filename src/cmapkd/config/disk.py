"""What a disk can refuse, in words: it is full, may not be written, or does not answer."""

from __future__ import annotations

import errno
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cmapkd.config.resumable import RESUME

FULL = (errno.ENOSPC, errno.EDQUOT)
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_NAMES = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
_GONE = (errno.EIO, errno.ESTALE, errno.ENXIO)
_IN_WORDS = re.compile(r"\(os error (\d+)\)")  # how libraries in Rust, such as safetensors, pass an error on


class DiskError(ValueError):
    """A disk that takes no more; says which, and what to do."""


@contextmanager
def writing(folder: Path, *, again: str = RESUME) -> Iterator[None]:
    """Turns what the disk of a run's folder refuses into a `DiskError`; other errors pass.

    Args:
        again: what to do once the disk takes more.
    Raises:
        DiskError: the disk is full, read-only, or does not answer.
    """
    try:
        yield
    except DiskError:
        raise
    except Exception as error:
        number = error_number(error)
        if number in FULL:
            raise DiskError(
                f"the disk of {folder} is full: free some space and {again}; what was written before is whole"
            ) from error
        if number in READ_ONLY:
            raise DiskError(
                f"{folder} cannot be written ({os.strerror(number)}): name another folder, or make it writable and "
                f"{again}"
            ) from error
        if number in _GONE:
            raise DiskError(
                f"the disk of {folder} does not answer ({os.strerror(number)}): {again} once it does"
            ) from error
        raise


def check_writable(path: Path) -> None:
    """Refuses a file that could not be written in the end, before the work for it. Makes its folder.

    Raises:
        DiskError: it is a folder, or its folder takes no file.
    """
    if path.is_dir():
        raise DiskError(f"{path} is a folder: name a file, for example {path / 'scores.json'}")
    if path.exists() and not path.is_file():  # a terminal or a pipe
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".cmapkd") as trial:
            trial.write(b"x")
    except OSError as error:
        raise DiskError(f"{path} cannot be written ({error.strerror}): name another file") from None


def is_of_the_place(error: BaseException) -> bool:
    """Whether an error says of a file's name or disk that it cannot be used, which its user can change."""
    if not isinstance(error, OSError) or error.filename is None:
        return False
    place = str(error.filename)
    return error.errno in (*FULL, *READ_ONLY, *_NAMES) or place.startswith(("/proc/", "/sys/", "/dev/"))


def error_number(error: BaseException) -> int:
    """The system's number of an error, 0 where it has none."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = _IN_WORDS.search(str(error))
    return int(found[1]) if found else 0


def usual_rights(files: Iterable[Path]) -> None:
    """Gives files the rights that any new file has in their folder: some libraries write for the owner alone."""
    rights: dict[Path, int] = {}
    for file in list(files):  # before the first probe is there to be found
        folder = file.parent
        if folder not in rights:
            probe = folder / f".{os.getpid()}.rights"
            probe.touch()
            rights[folder] = stat.S_IMODE(probe.stat().st_mode)
            probe.unlink()
        file.chmod(rights[folder])


def flush(path: Path) -> None:
    """Has what a file or a folder holds written to the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str, *, again: str = RESUME) -> None:
    """Writes a file whole or not at all; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"), again=again)


def write_bytes(path: Path, content: bytes, *, again: str = RESUME) -> None:
    """Writes a file whole or not at all: under another name, flushed and renamed.

    Raises:
        DiskError: the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    with writing(path.parent, again=again):
        try:
            temporary.write_bytes(content)
            flush(temporary)
            temporary.replace(path)
            flush(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

"""Runs one attempt and judges how it ends: read, skipped, refused in words of ours, or a failure.

A failure is any other exception, more than `SECONDS` of computing or `WAITING` of waiting, more memory than `ROOM` beyond what the process had, a file written
outside the folders that may be written to, code that is unpickled or started, a connection, or a wrong result.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import cmapkd
from cmapkd.data.check import TooManyBadSamples
from cmapkd.training import NonFiniteLossError

SECONDS = 20  # of processor time
WAITING = 240  # on the clock of a machine that may have much else to do
ROOM = 3 * 2**30  # of address space: a picture at the limit of pixels takes 0.7 GB, and is copied once
OURS = Path(cmapkd.__file__).parent
_COMPILED = os.path.realpath(sys.pycache_prefix) if sys.pycache_prefix else None

Ending = Literal["read", "skipped", "refused", "failure"]


class WrongResult(Exception):
    """What was read is not what was written, or not what a sample may be."""


@dataclass(frozen=True, slots=True)
class Outcome:
    ending: Ending
    detail: str


class _Hang(BaseException):
    pass


class _Watch:
    """What an audit hook, which cannot be taken off again, saw while `allowed` was set."""

    allowed: tuple[str, ...] | None = None
    seen: list[str]

    def __init__(self) -> None:
        self.seen = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (
                isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            )
            if writes and isinstance(path, str | bytes | os.PathLike):
                self._check(event, path)
        elif event in ("os.rename", "os.link", "os.symlink"):
            self._check(event, arguments[1])
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree"):
            self._check(event, arguments[0])
        elif event in (
            "pickle.find_class",
            "os.system",
            "os.exec",
            "subprocess.Popen",
            "os.posix_spawn",
            "socket.connect",
        ):
            self.seen.append(f"{event} {str(arguments)[:200]}")

    def _check(self, event: str, path: Any) -> None:
        if isinstance(path, int):
            return
        text = os.path.realpath(os.fsdecode(path))
        if "__pycache__" in text or (_COMPILED and text.startswith(_COMPILED)):  # of a library that is imported late
            return
        allowed = self.allowed or ()
        if not any(text == root or text.startswith(root + "/") for root in (*allowed, "/dev/null", "/dev/shm")):
            self.seen.append(f"{event} {text}")


_watch = _Watch()
_installed = False


def judge(attempt: Callable[[], tuple[int, int]], folder: Path) -> Outcome:
    """Runs `attempt`, which returns how many samples it read and how many it skipped; it may write into `folder` only,
    and into the user's cache folder."""
    global _installed
    if not _installed:
        sys.addaudithook(_watch)
        _installed = True
    caches = (os.environ.get("XDG_CACHE_HOME"), os.environ.get("HF_HOME"))
    _watch.seen.clear()
    _watch.allowed = (str(folder.resolve()), *(os.path.realpath(path) for path in caches if path))
    try:
        with warnings.catch_warnings(), _limits(), contextlib.chdir(folder):
            warnings.simplefilter("ignore")
            read, skipped = attempt()
        outcome = Outcome("skipped", f"{skipped} of {read + skipped}") if skipped else Outcome("read", str(read))
    except _Hang:
        outcome = Outcome("failure", f"more than {SECONDS} seconds of computing or {WAITING} of waiting")
    except Exception as error:
        outcome = _judged(error)
    finally:
        _watch.allowed = None
    if _watch.seen:
        return Outcome("failure", f"outside: {_watch.seen[0]}")
    return outcome


def _judged(error: Exception) -> Outcome:
    """Clear is an error that our own code raised, of the kinds that it documents, with words."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    ours = last is not None and Path(last.filename).is_relative_to(OURS)
    documented = isinstance(error, ValueError | TooManyBadSamples | NonFiniteLossError) and not isinstance(
        error, UnicodeError
    )
    if isinstance(error, WrongResult) or not ours or not documented or len(str(error)) < 20:
        where = "" if last is None else f" at {Path(last.filename).name}:{last.lineno}"
        return Outcome("failure", f"{type(error).__name__}: {str(error)[:300]}{where}")
    return Outcome("refused", f"{type(error).__name__}: {str(error)[:200]}")


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    def ring(_number: int, _frame: FrameType | None) -> None:
        raise _Hang

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = {number: signal.signal(number, ring) for number in (signal.SIGALRM, signal.SIGPROF)}
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, hard))
    signal.setitimer(signal.ITIMER_REAL, WAITING)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

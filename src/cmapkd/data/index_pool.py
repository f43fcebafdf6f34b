"""Indexes many shards at once, in processes that end with the one they serve."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from cmapkd.data.shard_index import Stamp, build, index_file, write

try:
    import fcntl
except ImportError:  # Windows has none: there two processes may index the same shards, to the same files
    fcntl = None  # type: ignore[assignment]

LEAST_SHARDS, LEAST_BYTES = 4, 64 * 2**20  # below, starting a process takes longer than the work
_START = (
    "import sys, json; sys.path[:] = json.loads(sys.stdin.readline()); "
    "from cmapkd.data.index_pool import serve; serve()"
)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_indexes(shards: Sequence[tuple[str, Stamp]]) -> None:
    """Writes the indexes of shards into the cache, by as many processes as there are cores.

    A shard that cannot be indexed, or whose index cannot be written, is left to the caller, who sees that no file is
    there. Nothing else is lost when a process is killed: what it wrote is whole.

    Args:
        shards: path and stamp of each.
    """
    workers = min(num_cores(), len(shards))
    if (
        not sys.executable
        or workers < 2
        or len(shards) < LEAST_SHARDS
        or sum(stamp[0] for _, stamp in shards) < LEAST_BYTES
    ):
        return
    queue, lock, stopped = iter(shards), threading.Lock(), threading.Event()

    def work() -> None:
        with suppress(OSError), _server() as server:
            assert server.stdin is not None
            assert server.stdout is not None
            while True:
                with lock:
                    shard = next(queue, None)
                if shard is None or stopped.is_set():
                    return
                server.stdin.write(json.dumps(shard) + "\n")
                server.stdin.flush()
                if not server.stdout.readline():
                    return  # it died, perhaps of this shard: the caller finds out

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:
        stopped.set()  # where waiting was interrupted, each process ends with the shard that it reads


@contextmanager
def _server() -> Iterator[subprocess.Popen[str]]:
    """A process that indexes what it is told, line by line. It ends with its input, however this process ends."""
    command = [sys.executable, "-P", "-c", _START]
    pipe = subprocess.PIPE
    server = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdin is not None
        server.stdin.write(json.dumps(sys.path) + "\n")
        yield server
    finally:
        with suppress(OSError):
            server.communicate()


def serve() -> None:
    """Indexes the shards whose path and stamp come as lines of JSON, and answers each with a line."""
    for line in sys.stdin:
        path, (size, time) = json.loads(line)
        with suppress(OSError, ValueError):  # also what is no tar: the caller builds it again to learn why
            write(index_file(path, (size, time)), build(path, (size, time)))
        sys.stdout.write("done\n")
        sys.stdout.flush()


@contextmanager
def alone(file: Path) -> Iterator[None]:
    """Lets one process after the other in, where the file can be made. The system ends the lock with its process."""
    held = None
    if fcntl is not None:
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            held = file.open("a")
            fcntl.lockf(held, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if held is not None:
            with suppress(OSError):
                file.unlink(missing_ok=True)
            held.close()

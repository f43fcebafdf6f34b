"""Scripts of tests, each in a process of its own, without a start of Python and torch for each of them.

One process imports once what the scripts need. Then every script runs in a fork of it, as `python SCRIPT ARGUMENTS`
would. A start takes five seconds of a processor; a fork takes none. That process ends with the tests: its input ends.

    done = run_script(Path("several_processes.py"), str(folder), timeout=600)

A test that has something to do with the process while it runs begins it, and waits for its end:

    with begun(Path("sixty_steps.py"), str(folder), timeout=600) as script:
        os.killpg(script.pid, signal.SIGTERM)
        done = script.end()
"""

from __future__ import annotations

import atexit
import gc
import json
import multiprocessing.util
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Done:
    """How a script ended; below zero: by that signal. What it printed is that of all processes that it began."""

    returncode: int
    stdout: str
    stderr: str


class Script:
    """One that was begun: the process `pid`, which leads a session and a group of its own."""

    def __init__(self, name: str, server: subprocess.Popen[str], printed: tuple[Path, Path], timeout: float) -> None:
        self._name, self._server, self._printed, self._timeout = name, server, printed, timeout
        self._done: Done | None = None
        self.pid = int(self._told())

    @property
    def lives(self) -> bool:
        """Whether it has not ended yet."""
        return Path(f"/proc/{self.pid}").exists()

    def end(self) -> Done:
        """Waits for it.

        Raises:
            TimeoutError: it took longer than it may; it was killed with all that it had begun.
        """
        if self._done is None:
            code = json.loads(self._told())
            out, err = (
                path.read_text(encoding="utf-8", errors="replace") if path.exists() else "" for path in self._printed
            )
            if code is None:
                self._done = Done(-signal.SIGKILL, out, err)
                raise TimeoutError(f"{self._name} took more than {self._timeout:g} s: {err[-2000:]}")
            self._done = Done(code, out, err)
        return self._done

    def _told(self) -> str:
        assert self._server.stdout is not None
        answer = self._server.stdout.readline()
        assert answer, "the process that starts scripts has ended"
        return answer


def run_script(script: Path, *arguments: str, timeout: float, environment: Mapping[str, str] | None = None) -> Done:
    """Runs a script in a new process, on one thread.

    Args:
        environment: what is added to that of the tests.
    Raises:
        TimeoutError: it took longer; it was killed with all that it had begun.
    """
    with begun(script, *arguments, timeout=timeout, environment=environment) as running:
        return running.end()


@contextmanager
def begun(
    script: Path, *arguments: str, timeout: float, environment: Mapping[str, str] | None = None
) -> Iterator[Script]:
    """Begins it, as `run_script` does; one at a time. What still runs in the end is killed."""
    server = _server()
    assert server.stdin is not None
    with tempfile.TemporaryDirectory(prefix="cmapkd-script-") as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        asked = {"script": str(script), "arguments": arguments, "out": str(out), "err": str(err), "timeout": timeout}
        server.stdin.write(json.dumps(asked | {"environment": dict(environment or {})}) + "\n")
        server.stdin.flush()
        running = Script(script.name, server, (out, err), timeout)
        try:
            yield running
        finally:
            if running.lives:
                for kill in (os.killpg, os.kill):  # it leads no group yet where it has just begun
                    with suppress(ProcessLookupError):
                        kill(running.pid, signal.SIGKILL)
            running.end()


@cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__))],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.communicate)  # closes its input, and waits for it
    return server


def _import_what_scripts_need() -> None:
    """And what libraries import when they are first used."""
    import functorch  # noqa: F401
    import torch
    import torch.distributed.fsdp

    import cmapkd.run  # noqa: F401

    torch.optim.AdamW([torch.zeros(1)])
    gc.collect()
    gc.freeze()  # children that look for circles need not look here
    gc.set_threshold(20_000, *gc.get_threshold()[1:])  # as in `conftest.py`, and
    os.fsync = lambda descriptor: None  # which no script looks at


def _serve() -> None:
    _import_what_scripts_need()
    for line in sys.stdin:
        asked = json.loads(line)
        if not (child := os.fork()):
            _become(asked)
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()
        sys.stdout.write(json.dumps(_wait(child, asked["timeout"])) + "\n")
        sys.stdout.flush()


def _become(asked: dict[str, Any]) -> None:
    """Runs the script in this process, and ends it."""
    code = 1
    try:
        os.setsid()
        os.environ.update(asked["environment"])
        for number, place in enumerate((os.devnull, asked["out"], asked["err"])):
            flags = os.O_RDONLY if not number else os.O_WRONLY | os.O_CREAT | os.O_APPEND
            os.dup2(os.open(place, flags), number)
        sys.argv = [asked["script"], *asked["arguments"]]
        sys.path[0] = str(Path(asked["script"]).parent)
        try:
            runpy.run_path(asked["script"], run_name="__main__")
        finally:  # at its end Python itself waits for threads, and ends processes that were begun
            threading._shutdown()  # type: ignore[attr-defined]
            multiprocessing.util._exit_function()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int, timeout: float) -> int | None:
    """The exit code of a child; None where it took too long."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


if __name__ == "__main__":
    _serve()

"""A run folder has one living run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cmapkd.config import ConfigError
from cmapkd.run import lock
from cmapkd.run.lock import LOCK, locked

# The lock alone: `cmapkd.run` imports torch, which takes seconds in each process.
ALONE = f"""
import sys, types
sys.modules["cmapkd.run"] = types.ModuleType("cmapkd.run")
sys.modules["cmapkd.run"].__path__ = [{str(Path(lock.__file__).parent)!r}]
"""
HOLD = f"""{ALONE}
import time
from pathlib import Path
from cmapkd.run.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(folder: Path, script: str = HOLD) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder, until it is killed with all that it has started."""
    arguments = [sys.executable, "-c", script, str(folder)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_a_second_run_is_refused_and_told_who_holds_the_folder(tmp_path: Path) -> None:
    with holder(tmp_path / "run") as process:
        where = rf"run is being written by another run \(process {process.pid} on .+, since 20\d\d-.+\): wait until"
        with pytest.raises(ConfigError, match=where), locked(tmp_path / "run"):
            pass
        assert json.loads((tmp_path / "run" / LOCK).read_text())["process"] == process.pid


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_died_leaves_no_lock_behind(end: signal.Signals, tmp_path: Path) -> None:
    with holder(tmp_path / "run") as process:
        process.send_signal(end)
        process.wait()
    start = time.monotonic()
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["process"] == os.getpid()
    assert time.monotonic() - start < 1
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_forked_worker_that_outlives_its_run_does_not_hold_the_folder(tmp_path: Path) -> None:
    script = HOLD.replace('print("held"', 'import os\n    if not os.fork():\n        time.sleep(60)\n    print("held"')
    with holder(tmp_path / "run", script) as process:
        process.kill()  # its fork lives on
        process.wait()
        with locked(tmp_path / "run"):
            pass


def test_nothing_is_left_of_a_run_that_wrote_nothing(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("kept")
    with locked(tmp_path / "file"):  # refused by who prepares the folder
        pass
    assert (tmp_path / "file").read_text() == "kept"


COUNT = f"""{ALONE}
from pathlib import Path
from cmapkd.config import ConfigError
from cmapkd.run.lock import locked
print("here", flush=True)
sys.stdin.readline()
folder, done = Path(sys.argv[1]), 0
while done < 300:
    try:
        with locked(folder):
            inside = folder / "inside"
            inside.touch(exist_ok=False)  # fails if another process is inside
            inside.unlink()
            done += 1
    except ConfigError:
        continue
"""


def test_many_processes_are_never_inside_together(tmp_path: Path) -> None:
    command = [sys.executable, "-c", COUNT, str(tmp_path)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"  # all begin at once
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=120)
    assert [process.returncode for process in processes] == [0, 0, 0]

"""Scripts in forks of one process: how they end, and that one knows nothing of another."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from started import Done, run_script

SCRIPT = """
import os, signal, sys, time
import torch
assert "left" not in vars(torch) and "beside" not in sys.modules  # of a script before
torch.left = True
import beside
print("said", *sys.argv[1:], flush=True)
how = sys.argv[1]
if how == "words":
    sys.exit("in words")
if how == "three":
    sys.exit(3)
if how == "error":
    raise ValueError("of its own")
if how == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if how == "hangs":
    if not (child := os.fork()):
        time.sleep(600)
    open(sys.argv[2], "w").write(str(child))
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "beside.py").write_text("")
    (folder / "script.py").write_text(SCRIPT)
    return folder / "script.py"


@pytest.mark.parametrize(
    ("how", "code", "told"),
    [("well", 0, ""), ("words", 1, "in words\n"), ("three", 3, ""), ("error", 1, "ValueError: of its own\n")],
)
def test_how_a_script_ends(script: Path, how: str, code: int, told: str) -> None:
    found = run_script(script, how, "more", timeout=60)
    assert (found.returncode, found.stdout) == (code, f"said {how} more\n")
    assert found.stderr.endswith(told)
    assert bool(found.stderr) == bool(told)


def lives(process: Path) -> bool:
    try:
        return process.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_script_that_is_killed_or_hangs(script: Path, tmp_path: Path) -> None:
    assert run_script(script, "killed", timeout=60) == Done(-9, "said killed\n", "")
    with pytest.raises(TimeoutError, match=r"script\.py took more than 5 s"):
        run_script(script, "hangs", str(tmp_path / "child"), timeout=5)
    child, deadline = Path("/proc", (tmp_path / "child").read_text(), "stat"), time.monotonic() + 60
    while lives(child):  # it goes with its parent, in a moment
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert run_script(script, "well", timeout=60).returncode == 0

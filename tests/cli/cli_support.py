"""Commands run one after the other in one fresh process, whose imports are then known; or in this one."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

_DRIVER = """
import contextlib, io, json, sys, warnings
from cmapkd.cli import main

ends = []
for arguments in json.loads(sys.argv[1]):
    sys.argv, said, code = ["cmapkd", *arguments], io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    ends.append((code, said.getvalue(), sorted({"torch", "numpy", "transformers"} & set(sys.modules))))
print(json.dumps(ends))
"""


def run_commands(
    commands: Sequence[Sequence[str]], *, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> list[tuple[int, str, list[str]]]:
    """Of each command its exit code, what it printed, and the heavy libraries that are imported by then."""
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER, json.dumps(commands)],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [(code, said, heavy) for code, said, heavy in json.loads(done.stdout)]


def run_here(command: Sequence[str]) -> tuple[int, str]:
    """Of a command its exit code, and what it printed; where it does not matter what is imported by then."""
    from cmapkd.cli import main

    said = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(),
        redirect_stdout(said),
        redirect_stderr(said),
    ):
        warnings.simplefilter("default")  # as in a process of its own
        patch.setattr(sys, "argv", ["cmapkd", *command])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0), said.getvalue()

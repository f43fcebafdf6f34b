"""Every method on a pretended GPU, whole and in micro-batches: one device for all, and how often the host waits for it.

A wait is a number that is read from the device, or a copy that the host does not go on beside. A forward pass has none.
A step of the trainer has at most one, its own, whatever the method and however many micro-batches. Steps with their
backward pass run on a device of torch's experimental kind, which takes minutes: these are slow tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pretended import HOW, SIZES, cases_of

FAILED = "failed"
BUDGET = {"forward": 0, "learning": 1}
SLOW = {"forward": (), "learning": (pytest.mark.slow,)}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pretended")


@cache
def found_by(out: Path, how: str) -> dict[str, Any]:
    """What a process that pretends found, in one of the ways."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("pretended.py")), str(out), how],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    if done.returncode:
        return {FAILED: done.stderr[-4000:]}
    found: dict[str, Any] = json.loads((out / f"{how}.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("how", "case"), [pytest.param(how, case, marks=SLOW[how]) for how in HOW for case in cases_of(how)]
)
def test_a_step_runs_where_the_student_is_and_nobody_waits(out: Path, how: str, case: str, size: str) -> None:
    every = found_by(out, how)
    assert FAILED not in every, every[FAILED]
    found = every[f"{case}, {size}"]
    assert "error" not in found, found["error"]
    waits: dict[str, int] = found["waits"]
    count = sum(waits.values())
    listed = "\n".join(f"{number} x {what}" for what, number in sorted(waits.items()))
    assert count <= BUDGET[how], f"the host waits {count} times in a step, {BUDGET[how]} allowed:\n{listed}"

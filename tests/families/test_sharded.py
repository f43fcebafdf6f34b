"""FSDP2 of every model family, in two processes: the same student as with whole weights, and as one process trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from family_support import FAMILIES, has_batch_norm, make
from sharded_families import FAILED, TWO, trained
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes found."""
    folder = tmp_path_factory.mktemp("sharded")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("sharded_families.py")), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def found_by(out: Path, name: str, how: str, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(out / f"{name}, {how}, rank {rank}.pt", weights_only=True)
    assert FAILED not in found, found[FAILED]
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(
                found[key], value, rtol=1e-4, atol=2e-6, equal_nan=False, msg=lambda text, key=key: f"{key}: {text}"
            )
        else:
            assert torch.equal(found[key], value), key


@pytest.mark.parametrize("rank", range(TWO))
@pytest.mark.parametrize("name", FAMILIES)
def test_shared_out_it_is_the_student_of_whole_weights(out: Path, name: str, rank: int) -> None:
    assert_same(found_by(out, name, "fsdp2", rank), found_by(out, name, "none", rank))


@pytest.mark.parametrize("name", FAMILIES)
def test_shared_out_it_is_the_student_of_one_process(out: Path, name: str, tmp_path: Path) -> None:
    """Batch norms see one process's half of the batch, so families with them are compared above only."""
    if has_batch_norm(make(name, tmp_path / "looked at")):
        pytest.skip("a batch norm of two processes is another one than that of one")
    assert_same(found_by(out, name, "fsdp2", 0), trained(name, tmp_path))

"""FSDP2 of every model family, in two processes: the same student as with whole weights, and as one process trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from family_support import FAMILIES, has_batch_norm, make
from sharded_families import AGAIN, COMPUTED_AGAIN, FAILED, HOW, TEACHER, TWO, path_of, trained, ways_of
from torch import Tensor

from started import run_script

STATISTICS = ("running_mean", "running_var")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes found."""
    folder = tmp_path_factory.mktemp("sharded")
    done = run_script(Path(__file__).with_name("sharded_families.py"), str(folder), timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def found_by(out: Path, name: str, how: str, rank: int) -> dict[str, Any]:
    path = path_of(out, name, how, rank)
    assert path.exists(), f"process {rank} was not done with {name}, {how}: it waited for its partner"
    found: dict[str, Any] = torch.load(path, weights_only=True)
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


def without_statistics(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what batch norms measure: each process measures its own samples, and the first process's is saved."""
    return {key: value for key, value in found.items() if not key.endswith(STATISTICS)}


@pytest.mark.parametrize("name", FAMILIES)
def test_shared_out_it_is_the_student_of_whole_weights(out: Path, name: str) -> None:
    assert_same(found_by(out, name, "fsdp2", 0), found_by(out, name, "none", 0))
    assert_same(*(without_statistics(found_by(out, name, how, 1)) for how in ("fsdp2", "none")))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "joined"])  # a joined model is no teacher
def test_a_teacher_whose_weights_are_held_in_bf16_answers_the_same_shared_out(out: Path, name: str) -> None:
    for rank in range(TWO):
        found = found_by(out, name, TEACHER, rank)
        assert found.pop("held and shared") > 0
        for key, value in found.items():
            how, _, what = key.partition("/")
            if how != "own":
                assert torch.equal(value, found[f"own/{what}"]), key


@pytest.mark.parametrize("name", COMPUTED_AGAIN)
def test_blocks_that_compute_again_change_nothing(out: Path, name: str) -> None:
    assert_same(found_by(out, name, AGAIN, 0), found_by(out, name, "fsdp2", 0))


@pytest.mark.parametrize(("name", "how"), [(name, how) for name in FAMILIES for how in ways_of(name) if how in HOW])
def test_both_processes_have_the_same_tensors(out: Path, name: str, how: str) -> None:
    """Buffers, too, though nothing exchanges them."""
    first, second = (without_statistics(found_by(out, name, how, rank)) for rank in range(TWO))
    differing = [key for key in second if not torch.equal(first[key], second[key])]
    assert not differing


@pytest.mark.parametrize("name", FAMILIES)
def test_shared_out_it_is_the_student_of_one_process(out: Path, name: str, tmp_path: Path) -> None:
    """Batch norms see one process's half of the batch, so families with them are compared above only."""
    student = make(name, tmp_path / "model")
    if has_batch_norm(student):
        pytest.skip("a batch norm of two processes is another one than that of one")
    assert_same(found_by(out, name, "fsdp2", 0), trained(student, tmp_path / "run"))

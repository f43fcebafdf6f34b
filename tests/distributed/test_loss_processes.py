"""In-batch losses of one to four processes: own rows over tiles, SigLIP's loss in a ring, against the whole form."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from started import run_script

sys.path.insert(0, str(Path(__file__).parent))
from loss_processes import LOSSES, SIZES, everything, of_method, sigmoid

Found = dict[str, Tensor]
NAMES = (*LOSSES, "sigmoid", "sigmoid, several positives", "method")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("losses")
    done = run_script(Path(__file__).with_name("loss_processes.py"), str(folder), timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@cache
def whole() -> Found:
    return everything(local=False)


def of(found: Found, name: str) -> Found:
    return {key.removeprefix(f"{name}/"): value for key, value in found.items() if key.startswith(f"{name}/")}


def assert_equal(found: Found, expected: Found) -> None:
    """Each error relative to the largest number of its kind."""
    assert found.keys() == expected.keys()
    assert len(found) > 1
    for key, value in expected.items():
        error = float((found[key] - value).abs().max()) / max(float(value.abs().max()), 1e-3)
        assert error < 1e-10, f"{key}: {error}"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [*NAMES, "method, in micro-batches"])
def test_shares_of_several_processes_make_the_whole(out: Path, name: str, size: int) -> None:
    expected = of(whole(), name.removesuffix(", in micro-batches"))
    for rank in range(size):
        found = torch.load(out / f"rank-{rank}-of-{size}.pt", weights_only=True)
        assert_equal(of(found, name), expected)


@pytest.mark.parametrize("name", NAMES)
def test_one_process_alone(name: str) -> None:
    """Tiles and the ring where there is nobody to share with."""
    assert_equal(of(everything(local=True), name), of(whole(), name))


@pytest.mark.parametrize("size", SIZES)
def test_all_rows_on_every_process_are_the_whole_too(out: Path, size: int) -> None:
    for rank in range(size):
        found = of(torch.load(out / f"rank-{rank}-of-{size}.pt", weights_only=True), "all")
        for name in ("contrastive", "sigmoid"):
            assert_equal(of(found, name), of(whole(), name))


@pytest.mark.parametrize("size", SIZES)
def test_each_process_gets_what_the_one_before_it_held(out: Path, size: int) -> None:
    for rank in range(size):
        passed = torch.load(out / f"rank-{rank}-of-{size}.pt", weights_only=True)["passed"]
        assert passed.tolist() == [[(rank - 1) % size] * 3] * 2


@pytest.mark.parametrize("size", SIZES)
def test_every_process_has_the_same_value_to_the_bit(out: Path, size: int) -> None:
    found = [torch.load(out / f"rank-{rank}-of-{size}.pt", weights_only=True) for rank in range(size)]
    assert len({float(each["sigmoid/value"]) for each in found}) == 1
    assert len({float(each["contrastive/value"]) for each in found}) == 1


def test_the_whole_depends_on_what_is_tested() -> None:
    """Else equality would prove little."""
    one, other = sigmoid(None, ring=False), sigmoid(torch.zeros(12, dtype=torch.long), ring=False)
    assert abs(float(one["sigmoid/value"]) - float(other["sigmoid, several positives/value"])) > 1e-3
    assert of_method(None, local_loss=False)["method/gradient/student.bias"].abs() > 1e-6

"""A run goes on in 1, then 2, then 1 processes: every rank computes one loss, and it is that of the undisturbed run."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import CASES, FAILED, FLOAT32, SITTINGS, STEPS, bounds, path_of, sitting
from torch import Tensor

from started import run_script

# Of the largest number of its kind at the step. What is float64 here is not quite: banks and the sum of the terms.
TOLERANCE = {case: 5e-5 if case in FLOAT32 else 1e-6 for case in CASES}

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:the masks of stage"),  # a few steps of theirs take nothing out
]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every process of every sitting found."""
    folder = tmp_path_factory.mktemp("resume")
    done = run_script(Path(__file__).with_name("runs.py"), str(folder), timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@cache
def found_by(out: Path, case: str, number: int, rank: int) -> dict[str, Any]:
    path = path_of(out, case, number, rank)
    assert path.exists(), f"process {rank} did not come to the end of sitting {number}"
    found: dict[str, Any] = torch.load(path, weights_only=True)
    assert FAILED not in found, found[FAILED]
    return found


@cache
def undisturbed(out: Path, case: str) -> dict[str, Tensor]:
    return sitting(case, out / f"{case}, undisturbed", first=1, last=STEPS, state=0)


def kind_of(key: str) -> str:
    step, kind, name = key.split("/", 2)
    return f"{step}/{kind}/{name}" if kind == "term" else f"{step}/{kind}"


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], case: str, first: int, last: int) -> None:
    """At every step from `first` to `last`; gradients relative to the largest of the step, terms each to itself."""
    expected = {key: value for key, value in expected.items() if first <= int(key.split("/")[0]) <= last}
    assert found.keys() == expected.keys()
    scales: dict[str, float] = {}
    for key, value in expected.items():
        scales[kind_of(key)] = max(scales.get(kind_of(key), 1e-6), float(value.abs().max()))
    errors = {key: float((found[key] - value).abs().max()) / scales[kind_of(key)] for key, value in expected.items()}
    wrong = [f"step {key}: off by {error:.2g}" for key, error in errors.items() if not error < TOLERANCE[case]]
    assert not wrong, f"{len(wrong)} of {len(errors)} numbers differ: {'; '.join(wrong[:5])}"


@pytest.mark.parametrize("case", CASES)
def test_every_rank_computes_the_same_loss(out: Path, case: str) -> None:
    for number, size in enumerate(SITTINGS):
        for rank in range(1, size):
            assert_same(found_by(out, case, number, rank), found_by(out, case, number, 0), case, *bounds(number))


@pytest.mark.parametrize("number", range(len(SITTINGS)), ids=lambda n: f"sitting {n} in {SITTINGS[n]}")
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_loss_and_the_gradient_of_the_run_that_nothing_stopped(out: Path, case: str, number: int) -> None:
    for rank in range(SITTINGS[number]):
        assert_same(found_by(out, case, number, rank), undisturbed(out, case), case, *bounds(number))


@pytest.mark.parametrize("case", CASES)
def test_no_loss_draws_from_the_random_state_of_its_process(out: Path, case: str, tmp_path: Path) -> None:
    """Then it does not matter what that state is, in how many processes."""
    assert_same(sitting(case, tmp_path, first=1, last=STEPS, state=1), undisturbed(out, case), case, 1, STEPS)

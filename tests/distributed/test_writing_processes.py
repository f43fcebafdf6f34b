"""Two processes equal one for models that write: uneven answers, answers of their own, shares of the weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from started import run_script

sys.path.insert(0, str(Path(__file__).parent))
from writing_processes import CASES, TRAINED, TWO, learned_from, trained

from writers import WRITERS, assert_same

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("writing")
    done = run_script(Path(__file__).with_name("writing_processes.py"), str(folder), timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(TWO)]


def of(found: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    return {key: value for key, value in found.items() if key.startswith(start)}


def test_every_method_that_writes_is_tried() -> None:
    assert {kind for kind, _ in CASES.values()} == {*WRITERS}


@pytest.mark.parametrize("name", CASES)
def test_terms_and_gradients_of_two_equal_those_of_one(of_two: list[dict[str, Tensor]], name: str) -> None:
    """What is logged and what buffers hold as well."""
    expected = learned_from(name, None)
    for found in of_two:
        assert_same(of(found, f"{name}/"), expected)


@pytest.mark.parametrize("name", TRAINED)
def test_training_in_two_processes_gives_the_same_model(
    of_two: list[dict[str, Tensor]], name: str, tmp_path: Path
) -> None:
    """Also where one process took the first steps, and two go on."""
    start = f"trained/{name}/"
    expected = trained(name, tmp_path)
    assert_same(of(of_two[0], start), expected, tolerance=1e-7)
    for key, value in of(of_two[1], f"{start}method/").items():
        assert torch.equal(value, of_two[0][key]), key
    went_on = {key.replace("went on/", "trained/"): value for key, value in of(of_two[0], f"went on/{name}/").items()}
    assert_same(went_on, expected, tolerance=1e-7)

"""Two processes of four equal one of eight: every method's terms and gradients, the gather, and whole training runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from two_processes import (
    BATCH,
    CASES,
    DTYPES,
    TRAINED,
    WORLD_SIZE,
    gather_loss,
    losses_and_gradients,
    rows,
    trained,
    with_heads,
)

from helpers import ROUNDING

TOLERANCE = {"float32": 5e-6, "float64": 1e-10}  # float32: rounding, sums are taken in another order


pytestmark = pytest.mark.filterwarnings("ignore:the masks of stage")  # a few steps of theirs take nothing out


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As the ranks have: sums over more threads round differently, and what is made in float32 keeps it in float64."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Tensor]]]:
    """What each process found."""
    out = tmp_path_factory.mktemp("two")
    script = Path(__file__).with_name("two_processes.py")
    done = subprocess.run(
        [sys.executable, str(script), str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out, [torch.load(out / f"rank-{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_terms_and_gradients_equal_those_of_one_process(
    ranks: tuple[Path, list[dict[str, Tensor]]], name: str, dtype: str
) -> None:
    whole = losses_and_gradients(name, DTYPES[dtype], None)
    assert any("/gradient/" in key for key in whole)
    for found in ranks[1]:
        mine = {key: value for key, value in found.items() if key.startswith(f"{name}/{DTYPES[dtype]}/")}
        assert mine.keys() == whole.keys()
        for key, value in whole.items():
            largest = max(1.0, float(value.abs().max()))
            error = float((mine[key] - value).abs().max()) / largest
            rounding = ROUNDING.get(CASES[name][0], 1.0) if dtype == "float32" else 1.0
            assert error < TOLERANCE[dtype] * rounding, f"{key}: {error}"


def test_gather_passes_on_the_gradient_of_every_process(ranks: tuple[Path, list[dict[str, Tensor]]]) -> None:
    image, text = rows(1).requires_grad_(), rows(2).requires_grad_()
    loss = gather_loss(image, text)
    loss.backward()
    assert image.grad is not None
    assert text.grad is not None
    share = BATCH // WORLD_SIZE
    for rank, found in enumerate(ranks[1]):
        mine = slice(rank * share, (rank + 1) * share)
        torch.testing.assert_close(found["gather/loss"], loss.detach())
        # both processes ask for the same loss, so a row's gradient is twice that of one; the wrapper halves it
        torch.testing.assert_close(found["gather/image"], WORLD_SIZE * image.grad[mine])
        torch.testing.assert_close(found["gather/text"], WORLD_SIZE * text.grad[mine])


def test_heads_learn_the_same_however_their_lessons_are_shared(ranks: tuple[Path, list[dict[str, Tensor]]]) -> None:
    whole = with_heads(None)
    for found in ranks[1]:
        for key, value in whole.items():
            torch.testing.assert_close(
                found[key], value, rtol=1e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}"
            )


@pytest.mark.parametrize("name", TRAINED)
def test_training_in_two_processes_gives_the_same_model(
    ranks: tuple[Path, list[dict[str, Tensor]]], name: str, tmp_path: Path
) -> None:
    whole = trained(name, tmp_path / name)
    out, found = ranks
    for mine in found:
        for key, value in whole.items():
            if not key.startswith("ledger/"):
                steps = 1e-3 if value.dtype == torch.float16 else 0.0  # a bank's entry may round to its neighbour
                torch.testing.assert_close(
                    mine[key], value, rtol=1e-4 + steps, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
                )
    assert torch.equal(found[0][f"ledger/{name}"], whole[f"ledger/{name}"])
    assert all(torch.equal(found[1][key], value) for key, value in found[0].items() if key.startswith("trained/"))
    assert (out / name / "metrics.jsonl").read_text().count("\n") == 8
    one, two = ((folder / name / "bad_samples.jsonl").read_text().splitlines() for folder in (tmp_path, out))
    assert sorted(one) == sorted(two)
    assert (out / name / "checkpoints" / "step-000000008" / "random-1.safetensors").exists()

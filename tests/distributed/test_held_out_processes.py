"""A run that is selected by held-out pairs is the same in two processes as in one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from started import run_script

sys.path.insert(0, str(Path(__file__).parent))
from held_out_processes import TWO, WEIGHTINGS, trained

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held-out")
    script = Path(__file__).with_name("held_out_processes.py")
    done = run_script(script, str(folder), timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_two_processes_equal_one(out: Path, name: str, tmp_path: Path) -> None:
    whole = trained(name, tmp_path / "one")
    ranks = [torch.load(out / f"rank-{rank}.pt", weights_only=True) for rank in range(TWO)]
    for found in ranks:
        for key, value in whole.items():
            torch.testing.assert_close(
                found[key], value, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
            )
    mine = [key for key in whole if key.startswith(f"{name}/method/")]
    assert all(torch.equal(ranks[0][key], ranks[1][key]) for key in mine)
    learned = {"slopes": "weight", "slopes by sample": "weight", "bilevel": "out_bias", "bandit": "logits"}
    if name in learned:
        found = next(whole[key] for key in mine if key.endswith(f"jointly.{learned[name]}"))
        assert float(found.std()) > 0.05

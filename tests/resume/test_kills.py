"""Kills between the writes of one checkpoint that `tests/faults/test_disk.py` does not have."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cmapkd.training import Trainer, checkpoint
from cmapkd.training.checkpoint import read_checkpoint, write_checkpoint
from helpers import make_method, make_trainer


@pytest.mark.parametrize("name", ["step-000000001", "best-000000001"])
def test_a_kill_after_the_second_rename_leaves_the_new_checkpoint_and_nothing_in_the_way(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, progress = tmp_path / name, checkpoint.Progress(step=1)
    write_checkpoint(path, {"method": {"a": torch.ones(3)}}, progress)
    remove = shutil.rmtree

    def kill(folder: Path, *arguments: Any, **options: Any) -> None:
        if Path(folder).name.endswith(".replaced"):
            raise KeyboardInterrupt
        remove(folder, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", kill)
        with pytest.raises(KeyboardInterrupt):
            write_checkpoint(path, {"method": {"a": torch.zeros(3)}}, progress)
    checkpoint.restore_replaced(tmp_path)  # as a resume does
    checkpoint.put_in_order(tmp_path, progress)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    assert torch.equal(read_checkpoint(path)[0]["method"]["a"], torch.zeros(3))
    write_checkpoint(path, {"method": {"a": torch.full((3,), 2.0)}}, progress)
    assert torch.equal(read_checkpoint(path)[0]["method"]["a"], torch.full((3,), 2.0))


def running(out: Path) -> Trainer:
    """Six steps, validated after each; the fourth is the best."""
    trainer: list[Trainer] = []

    def validate(_student: Any) -> dict[str, float]:
        return {"score": 5.0 if trainer[0].progress.step == 4 else 1.0}

    options: dict[str, Any] = {"checkpoint_every": 3, "evaluate_every": 1, "validate": validate}
    trainer.append(make_trainer(out, make_method("contrastive"), steps=6, **options))
    return trainer[0]


def test_a_run_goes_on_beside_what_such_a_kill_left(tmp_path: Path) -> None:
    whole = running(tmp_path / "whole")
    whole.run()
    folder = tmp_path / "whole" / "checkpoints"
    shutil.rmtree(folder / "step-000000006")  # the kill came before it
    shutil.copytree(folder / "best-000000004", folder / ".best-000000004.replaced")
    again = running(tmp_path / "whole")
    again.run(resume=True)
    assert sorted(entry.name for entry in folder.iterdir()) == ["best-000000004", "step-000000003", "step-000000006"]
    state = again.method.state_dict()
    assert all(torch.equal(state[key], value) for key, value in whole.method.state_dict().items())

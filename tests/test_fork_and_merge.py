"""Fork and merge: averages, the search on the simplex, and that an interrupted call goes on in its round."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from cmapkd.config import ConfigError
from cmapkd.training.checkpoint import Progress, checkpoint_path, read_checkpoint, read_latest, write_checkpoint

ROOT = Path(__file__).parents[1]

with pytest.MonkeyPatch.context() as patched:
    patched.syspath_prepend(ROOT / "benchmarks")
    fork: Any = importlib.import_module("fork_and_merge")

PLAN: dict[str, Any] = {
    "base": "cmapkd_scenes",
    "student": "tiny:debug",
    "data.train": "scenes:easy?length=24",
    "data.val": "scenes:easy@val?length=12",
    "data.test": "scenes:easy@test?length=12",
    "data.held_out": "scenes:easy?start=24&length=12",
    "training.batch_size": 8,
    "training.steps": 3,
    "training.device": "cpu",
    "evaluation.tasks": ["retrieval"],
    "every": 2,
    "check": "scenes:easy@val?length=12",
    "arms": {"even": {}, "early": {"method.visual_levels": {"P2": 40.0, "P5": 0.1}}},
}


def plan(folder: Path, **changes: Any) -> Any:
    file = folder / "plan.yaml"
    file.write_text(yaml.safe_dump(PLAN | changes, sort_keys=False), encoding="utf-8")
    return fork.Plan.read(file)


def test_the_declared_plan_reads_and_its_arms_can_be_averaged() -> None:
    declared = fork.Plan.read(ROOT / "examples" / "fork_and_merge.yaml")
    assert (declared.every, declared.steps, len(declared.arms)) == (100, 800, 6)
    compared = {arm.method.compared() for arm in declared.arms.values()}
    assert compared == {("P2", "P3", "P4", "P5", "L1", "L2", "L3", "L4")}
    assert len({arm.method.model_dump_json() for arm in declared.arms.values()}) == 6


def test_averages_are_written_out_and_what_is_no_number_stays() -> None:
    arms = [
        {"method": {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)}, "random-0": {"torch": torch.tensor([1.0])}},
        {"method": {"w": torch.tensor([5.0, -2.0]), "n": torch.tensor(4)}, "random-0": {"torch": torch.tensor([9.0])}},
    ]
    found = fork.merged(arms, [0.25, 0.75])
    torch.testing.assert_close(found["method"]["w"], torch.tensor([4.0, -1.0]))
    assert int(found["method"]["n"]) == 3
    assert float(found["random-0"]["torch"]) == 1.0
    arms[1]["method"]["more"] = torch.zeros(1)
    with pytest.raises(ConfigError, match="do not hold the same tensors"):
        fork.merged(arms, [0.5, 0.5])


@pytest.mark.parametrize(
    ("goal", "expected"),
    [([0.2, 0.5, 0.3], [0.2, 0.5, 0.3]), ([3.0, -1.0, -1.0], [1.0, 0.0, 0.0]), ([0.6, 0.6, -0.5], [0.5, 0.5, 0.0])],
)
def test_the_least_loss_on_the_simplex(goal: list[float], expected: list[float]) -> None:
    def loss(weights: Tensor) -> Tensor:
        return (weights - torch.tensor(goal, dtype=torch.float64)).square().sum()

    found, losses = fork.least_on_simplex(loss, 3, steps=60)
    assert found == pytest.approx(expected, abs=0.02)
    assert sum(found) == pytest.approx(1.0)
    assert losses["merged"] <= min(losses["best arm"], losses["mean of all"])
    assert losses["merged"] == pytest.approx(float(loss(torch.tensor(found, dtype=torch.float64))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"one": {}}}, "has 1 arms"),
        ({"data.held_out": None}, r"'even' needs data\.held_out"),
        ({"arms": {"a": {}, "b": {"training.steps": 4}}}, r"differ in training\.steps"),
    ],
)
def test_plans_that_cannot_be_merged_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(tmp_path, **changes)


def check(found: Any) -> None:
    assert [each["step"] for each in found["rounds"]] == [2, 3]
    for each in found["rounds"]:
        assert sum(each["weights"].values()) == pytest.approx(1.0)
        assert each["loss"]["merged"] <= each["loss"]["best arm"]


def test_rounds_train_every_arm_from_the_merged_student(tmp_path: Path) -> None:
    found = fork.fork_and_merge(plan(tmp_path), tmp_path / "out")
    check(found)
    assert found["scores"]["retrieval"]["mean_r@1"] > 0
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["merged", "rounds.jsonl"]
    last, progress = read_checkpoint(tmp_path / "out" / "merged" / "step-000000003")
    assert progress.step == 3
    assert float(last["optimizer"]["0.step"]) == 3.0  # the optimizer goes on, it does not begin anew


def test_an_interrupted_call_goes_on_in_its_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, calls, failing = plan(tmp_path), [], []
    start = {f"student.{key}": value for key, value in fork.HeldOut(made.arms["even"]).student.state_dict().items()}

    def moved(_config: Any, step: int, out: Path) -> Any:
        """In place of training: noise of the arm and step on what the round began with."""
        calls.append((out.name, step))
        if len(calls) in failing:
            raise KeyboardInterrupt
        goal = checkpoint_path(out / "checkpoints", step)
        if goal.exists():
            return read_checkpoint(goal)[0]
        before = read_latest(out / "checkpoints")
        state = start if before is None else before[0]["method"]
        draws = torch.Generator().manual_seed(step + len(out.name))
        noisy = {
            key: value + 0.01 * torch.randn(value.shape, generator=draws) if value.is_floating_point() else value
            for key, value in state.items()
        }
        write_checkpoint(goal, {"method": noisy}, Progress(step))
        return read_checkpoint(goal)[0]

    monkeypatch.setattr(fork, "train_until", moved)
    monkeypatch.setattr(
        fork, "scores_of", lambda student, _plan: sum(p.detach().sum().item() for p in student.parameters())
    )
    whole = fork.fork_and_merge(made, tmp_path / "whole")
    check(whole)
    calls.clear()
    failing.append(4)  # the second arm of the second round
    with pytest.raises(KeyboardInterrupt):
        fork.fork_and_merge(made, tmp_path / "parts")
    again = fork.fork_and_merge(made, tmp_path / "parts")
    assert [step for _, step in calls] == [2, 2, 3, 3, 3, 3]  # the first round was not trained again
    assert again == whole

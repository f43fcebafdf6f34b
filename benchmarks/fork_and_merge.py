"""Fork and merge: how much any choice of static weights could gain, were it made anew every so many steps.

    uv run python benchmarks/fork_and_merge.py examples/fork_and_merge.yaml --out runs/fork --json runs/fork.json

In every round each arm trains a copy of the same student for `every` steps with its own settings, on the same batches.
Then λ on the simplex minimises L_out(Σ λ_k θ_k), the student's own loss on all held-out pairs, and the round ends with
Σ λ_k θ_k; the optimizer's moments and the method's own modules are averaged alike. It costs as much as all arms
together: a ceiling for selections that look so far ahead, and no product. An interrupted call goes on in its round.

The file is a recipe with three more keys: `every`, `arms` (settings by name) and `check` (the source that scores the
last student). Source: ForkMerge, Jiang et al. 2023, arXiv:2301.12618.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.func import functional_call

import cmapkd.run.train as running
from cmapkd.config import ConfigError, load_config, writing
from cmapkd.data.batches import BatchBuilder
from cmapkd.data.held_out import open_held_out
from cmapkd.data.open import open_source
from cmapkd.data.plans import PlanSampler
from cmapkd.data.types import ModelInput
from cmapkd.evaluation.run import evaluate
from cmapkd.methods.dual import task_loss
from cmapkd.models import DualEncoder
from cmapkd.provenance import describe_environment
from cmapkd.run import RunConfig
from cmapkd.run.build import build_student, load_teachers, open_training, readers
from cmapkd.run.measure import Measured
from cmapkd.training import Interrupted, Trainer
from cmapkd.training.checkpoint import checkpoint_path, read_checkpoint, write_checkpoint

OWN_KEYS = ("every", "arms", "check")
Groups = dict[str, dict[str, Tensor]]  # of a checkpoint, by file


@dataclass(frozen=True)
class Plan:
    """A file read.

    Attributes:
        arms: the run of each arm, which differ in what their losses count.
        every: steps of a round, h.
        check: source of the scores.
    """

    arms: dict[str, RunConfig]
    every: int
    check: str

    @property
    def steps(self) -> int:
        steps = next(iter(self.arms.values())).training.steps
        assert steps is not None
        return steps

    @classmethod
    def read(cls, file: Path, overrides: Sequence[str] = ()) -> Plan:
        """A plan from its YAML.

        Raises:
            ConfigError: a key is missing, the arms do not train in the same rounds, or there are fewer than two.
        """
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        missing = [key for key in OWN_KEYS if key not in values]
        if missing:
            raise ConfigError(f"{file} lacks {', '.join(missing)}: give every, arms and check")
        shared = {key: value for key, value in values.items() if key not in OWN_KEYS}
        arms = {name: _config(shared, own, overrides) for name, own in values["arms"].items()}
        if len(arms) < 2:
            raise ConfigError(f"{file} has {len(arms)} arms: fork and merge takes two or more")
        for name, config in arms.items():
            if config.data.held_out is None or config.training.steps is None:
                raise ConfigError(f"arm {name!r} needs data.held_out and training.steps: give them to all arms")
        if len({config.training.steps for config in arms.values()}) > 1:
            raise ConfigError("the arms differ in training.steps: they train in the same rounds")
        return cls(arms, int(values["every"]), str(values["check"]))


def _config(shared: Mapping[str, Any], own: Mapping[str, Any], overrides: Sequence[str]) -> RunConfig:
    base = str(shared["base"])
    rest = {key: value for key, value in shared.items() if key != "base"}
    given = [f"{key}={json.dumps(value)}" for key, value in [*rest.items(), *own.items()]]
    return load_config(RunConfig, base, [*given, *overrides])


class UntilStep(Trainer):
    """A trainer that stops after a step, with a checkpoint, as on a signal."""

    until: int

    def _agreed(self, stop: bool) -> bool:
        return stop or self.progress.step >= self.until


def train_until(config: RunConfig, step: int, out: Path) -> Groups:
    """Goes on from the checkpoint in `out` if there is one; the checkpoint at `step`."""
    goal = checkpoint_path(out / "checkpoints", step)
    if not goal.exists():
        trainer = running.Trainer
        running.Trainer = type("Until", (UntilStep,), {"until": step})  # type: ignore[misc]
        try:
            out.mkdir(parents=True, exist_ok=True)
            running.train(config, Measured.open(config), out=out, resume=True, console=None, title=out.name)
        except Interrupted as stopped:
            if stopped.checkpoint != goal:
                raise
        finally:
            running.Trainer = trainer  # type: ignore[misc]
    return read_checkpoint(goal)[0]


# ------------------------------------------------------------------------------------------------ merging


def merged(arms: Sequence[Groups], weights: Sequence[float]) -> Groups:
    """Every floating tensor averaged by the weights; what is no number to average is the first arm's.

    Raises:
        ConfigError: the arms do not hold the same tensors.
    """
    first = arms[0]
    for other in arms[1:]:
        for name, group in first.items():
            if {key: value.shape for key, value in group.items()} != {k: v.shape for k, v in other[name].items()}:
                raise ConfigError(
                    f"the arms do not hold the same tensors ({name}), so they cannot be averaged: let all of them "
                    "compare the same levels, with weights above zero"
                )
    return {
        name: {key: _average([arm[name][key] for arm in arms], weights) for key in group}
        if not name.startswith("random")
        else group
        for name, group in first.items()
    }


def _average(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    if not values[0].is_floating_point() or all(torch.equal(values[0], other) for other in values[1:]):
        return values[0]
    total = torch.stack([weight * value.double() for weight, value in zip(weights, values, strict=True)]).sum(0)
    return total.to(values[0].dtype)


def least_on_simplex(
    loss: Callable[[Tensor], Tensor], count: int, *, steps: int = 30
) -> tuple[list[float], dict[str, float]]:
    """λ >= 0 of sum 1 where a loss is least: the best of the corners, of the middle, and of a descent from the best.

    The descent is exponentiated gradient, whose step is halved where the loss does not fall.

    Returns:
        λ, and the losses of the best corner, of the middle and of λ.
    """
    corners = torch.eye(count, dtype=torch.float64)
    middle = torch.full((count,), 1 / count, dtype=torch.float64)
    with torch.no_grad():
        of_corners = [float(loss(corner)) for corner in corners]
        of_middle = float(loss(middle))
    least = min(of_corners)
    best = (of_middle, middle) if of_middle <= least else (least, corners[of_corners.index(least)])
    at, rate = 0.9 * best[1] + 0.1 * middle, 1.0  # a corner could never be left
    value = float("inf")
    for _ in range(steps):
        point = at.clone().requires_grad_()
        now = loss(point)
        if float(now.detach()) < best[0]:
            best = float(now.detach()), at
        [slope] = torch.autograd.grad(now, point)
        if float(now.detach()) > value:
            rate /= 2
        value = float(now.detach())
        slope = slope - slope @ at
        moved = at * (-rate * slope / slope.abs().max().clamp_min(1e-30)).exp()
        at = moved / moved.sum()
    with torch.no_grad():
        last = float(loss(at))
    value, found = min(best, (last, at), key=lambda pair: pair[0])
    return found.tolist(), {"best arm": least, "mean of all": of_middle, "merged": value}


class HeldOut:
    """The student's own loss on all held-out pairs, in eval mode."""

    def __init__(self, config: RunConfig) -> None:
        data = config.data
        assert data.held_out is not None
        assert data.views is not None
        torch.manual_seed(config.seed)
        source = open_training(config)
        self.student: DualEncoder = build_student(config, source, load_teachers(config)).eval()
        pairs = open_held_out(data.train, data.held_out)
        builder = BatchBuilder(pairs, data.views, readers(self.student), seed=config.seed)
        plan = PlanSampler(len(pairs), batch_size=len(pairs), seed=config.seed, start=0, stop=1).plan(0)
        self.inputs: ModelInput = builder[plan].inputs["student"]

    def of(self, arms: Sequence[Groups]) -> Callable[[Tensor], Tensor]:
        """The loss of the arms' students averaged by λ."""
        states = [_student_of(arm) for arm in arms]
        learning = {name for name, _ in self.student.named_parameters()}
        parameters = {name: torch.stack([state[name] for state in states]) for name in learning}
        others = {
            name: _average([state[name] for state in states], [1 / len(states)] * len(states))
            for name in states[0]
            if name not in learning
        }

        def loss(weights: Tensor) -> Tensor:
            values = {n: torch.tensordot(weights.to(each), each, dims=1) for n, each in parameters.items()}
            features = functional_call(self.student, values | others, (self.inputs,))
            return task_loss(features)

        return loss


def _student_of(groups: Groups) -> dict[str, Tensor]:
    """The student's tensors among those of its method."""
    prefix = "student."
    return {key.removeprefix(prefix): value for key, value in groups["method"].items() if key.startswith(prefix)}


# ------------------------------------------------------------------------------------------------ rounds


def fork_and_merge(plan: Plan, out: Path) -> dict[str, Any]:
    """All rounds, from where an earlier call stopped; what each chose, and the scores of the last student."""
    log = out / "rounds.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    ends = [*range(plan.every, plan.steps, plan.every), plan.steps]
    held_out = HeldOut(next(iter(plan.arms.values())))
    for number, end in enumerate(ends):
        goal = checkpoint_path(out / "merged", end)
        if goal.exists() and len(done) > number:
            continue
        before = checkpoint_path(out / "merged", ends[number - 1]) if number else None
        found, progress = [], None
        for name, config in plan.arms.items():
            folder = out / f"round-{number}" / name.replace("/", "_")
            if before is not None and not checkpoint_path(folder / "checkpoints", end).exists():
                _fork(before, folder / "checkpoints" / before.name)
            found.append(train_until(config, end, folder))
            progress = progress or read_checkpoint(checkpoint_path(folder / "checkpoints", end))[1]
        weights, losses = least_on_simplex(held_out.of(found), len(found))
        assert progress is not None
        goal.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(goal, merged(found, weights), progress)
        chosen = dict(zip(plan.arms, weights, strict=True))
        done = [*done[:number], {"step": end, "weights": chosen, "loss": losses}]
        with writing(out):
            written = log.with_suffix(".writing")
            written.write_text("".join(json.dumps(each) + "\n" for each in done), encoding="utf-8")
            written.replace(log)
        shutil.rmtree(out / f"round-{number}")
        print(json.dumps(done[-1]), flush=True)
    held_out.student.load_state_dict(_student_of(read_checkpoint(goal)[0]))
    return {"rounds": done, "scores": scores_of(held_out.student, plan)}


def _fork(checkpoint: Path, copy: Path) -> None:
    """The merged checkpoint as an arm's own, unless an interrupted call has put it there."""
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        temporary = copy.with_name(f".{copy.name}.copied")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(checkpoint, temporary)
        temporary.rename(copy)


def scores_of(student: nn.Module, plan: Plan) -> Mapping[str, Any]:
    config = next(iter(plan.arms.values()))
    source = open_source(plan.check, split="val")
    found: Mapping[str, Any] = evaluate(
        student, source, config.evaluation, device=torch.device("cpu"), on_bad_sample=config.data.on_bad_sample
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("overrides", nargs="*", help="of every arm: key=value")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    plan = Plan.read(arguments.plan, arguments.overrides)
    result = fork_and_merge(plan, arguments.out)
    settings = {name: config.plain() for name, config in plan.arms.items()}
    text = json.dumps(
        {
            **result,
            "every": plan.every,
            "check": plan.check,
            "settings": settings,
            "environment": describe_environment(),
        },
        indent=1,
    )
    arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

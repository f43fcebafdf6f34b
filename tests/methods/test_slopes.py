"""Slopes of levels and terms along the held-out loss, against autograd in loops; and runs selected by them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cmapkd.config import ConfigError
from cmapkd.data.held_out import WithHeldOut
from cmapkd.data.parts import PartOfSource
from cmapkd.data.types import Batch
from cmapkd.methods import StageConfig, StepInfo, build_method
from cmapkd.methods.cmapkd import CMAPKD
from cmapkd.methods.cmapkd.measuring import directions_of, measure
from cmapkd.methods.cmapkd.slopes import (
    evaluating,
    gradient,
    learning,
    norms_of,
    slopes_by_difference,
    slopes_forward,
)
from cmapkd.methods.dual import task_loss
from cmapkd.objectives import contrastive_loss
from cmapkd.training import Trainer
from helpers import CMAPKD_EXACT, MemorySource, make_builder, make_method, make_model, make_trainer, random_batch
from training.test_resume import assert_same_end, interrupt

SLOPES = {"name": "gradient_alignment", "every": 2, "norms_every": 2}
LEVELS = ["P2", "P3", "P4", "P5", "L1", "L2", "L3", "L4"]


def selected(dtype: torch.dtype = torch.float64, settings: Any = CMAPKD_EXACT, **weighting: Any) -> CMAPKD:
    """CMAPKD with every term and level, a bank that holds something, and a selection by slopes."""
    method = make_method("cmapkd", settings={**settings, "weighting": {**SLOPES, **weighting}}).to(dtype).train()
    assert isinstance(method, CMAPKD)
    assert method.teacher is not None
    method.teacher.model.to(dtype)
    earlier = random_batch(6, seed=1, dtype=dtype)
    method.step = StepInfo(step=1)  # no step that measures
    method(replace(earlier, ids=tuple(f"earlier{i}" for i in range(6))), method.step)
    return method


def batch_of(size: int = 4, *, dtype: torch.dtype = torch.float64) -> Batch:
    return replace(random_batch(size, dtype=dtype), held_out=random_batch(6, seed=2, dtype=dtype))


def written_out(method: CMAPKD, batch: Batch, direction: Any) -> dict[str, list[float]]:
    """⟨∇ℓ[b,i], v⟩, one backward pass for each number."""
    columns = method.columns(batch)
    parameters = learning(method.student)
    found: dict[str, list[float]] = {}
    for name, column in columns.items():
        found[name] = []
        for value in column.reshape(-1):
            parts = torch.autograd.grad(value, [*parameters.values()], retain_graph=True, allow_unused=True)
            products = [
                (part * direction[key]).sum() for key, part in zip(parameters, parts, strict=True) if part is not None
            ]
            found[name].append(float(sum(products, torch.zeros(()))))
    return found


def test_forward_slopes_are_the_gradients_of_every_sample_times_the_direction() -> None:
    method, batch = selected(), batch_of()
    with evaluating(method), torch.enable_grad():
        assert batch.held_out is not None
        [direction] = directions_of(method, batch.held_out, count=1, preconditioned_by_optimizer=True)
        expected = written_out(method, batch, direction)
        found = slopes_forward(method.student, lambda: method.columns(batch), direction)
    assert {*LEVELS, "contrastive", "interactive", "bank", "relation", "P2-L1"} <= {*found}
    assert "bridge" not in found  # it teaches the teacher's bridge, not the student
    assert found["P2"].shape == (4,)
    for name, values in expected.items():
        assert any(values), name
        torch.testing.assert_close(found[name].reshape(-1), torch.tensor(values, dtype=torch.float64), msg=name)


def test_differences_agree_with_forward_derivatives() -> None:
    method, batch = selected(), batch_of()
    with evaluating(method), torch.enable_grad():
        direction = gradient(
            task_loss(method.encode_student(random_batch(6, seed=2, dtype=torch.float64))), method.student
        )
        exact = slopes_forward(method.student, lambda: method.columns(batch), direction)
        by_step = {
            step: slopes_by_difference(method.student, lambda: method.columns(batch), direction, step=step)
            for step in (3e-4, 1e-5)
        }
    for name, slope in exact.items():
        coarse, fine = (float((near[name] - slope).norm() / slope.norm()) for near in by_step.values())
        assert coarse < 0.05, f"{name}: {coarse}"
        assert fine < 1e-4, f"{name}: {fine}"


def test_the_direction_is_the_gradient_over_the_root_of_adams_moments() -> None:
    method, held_out = selected(), random_batch(6, seed=2, dtype=torch.float64)
    draws = torch.Generator().manual_seed(0)
    moments = {p: torch.rand(p.shape, generator=draws, dtype=p.dtype) for p in method.student.parameters()}
    method.second_moment = moments.get
    [found] = directions_of(method, held_out, count=1, preconditioned_by_optimizer=True)
    parameters = dict(method.student.named_parameters())
    plain = torch.autograd.grad(task_loss(method.encode_student(held_out)), [*parameters.values()])
    for (name, parameter), one in zip(parameters.items(), plain, strict=True):
        torch.testing.assert_close(found[name], one / (moments[parameter].sqrt() + 1e-6))
    [bare] = directions_of(method, held_out, count=1, preconditioned_by_optimizer=False)
    torch.testing.assert_close(dict(bare), dict(zip(parameters, plain, strict=True)))


def test_two_directions_are_of_every_other_pair() -> None:
    method, held_out = selected(), random_batch(6, seed=2, dtype=torch.float64)
    first, second = directions_of(method, held_out, count=2, preconditioned_by_optimizer=False)
    student = method.encode_student(held_out)
    for found, rows in ((first, slice(0, None, 2)), (second, slice(1, None, 2))):
        image, text = student.image.embedding[rows], student.text.embedding[rows]
        loss = contrastive_loss(image, text, logit_scale=student.logit_scale)
        torch.testing.assert_close(dict(found), dict(gradient(loss, method.student, keep=True)))


def test_norms_are_those_of_the_mean_losses_gradients() -> None:
    method, batch = selected(), batch_of()
    with evaluating(method), torch.enable_grad():
        columns = method.columns(batch)
        norms = norms_of(method.student, columns)
        parts = torch.autograd.grad(columns["P2"].mean(), [*method.student.parameters()], allow_unused=True)
    expected = sum(float(part.square().sum()) for part in parts if part is not None) ** 0.5
    assert norms["P2"] == pytest.approx(expected)
    assert norms["P2"] > 0


def test_weights_reach_levels_and_terms_and_share_out_a_budget_of_gradient() -> None:
    method, batch = selected(rate=2.0), batch_of()
    plain = {name: term.weight for name, term in make_method("cmapkd", settings=CMAPKD_EXACT)(random_batch(4)).items()}
    terms = method(batch, StepInfo(step=0))
    joint = method.joint
    assert joint is not None
    items = [item for item in joint.items if joint.norms[joint.items.index(item)] > 0]
    weights = joint.weights_of(joint.items)
    norms = dict(zip(joint.items, joint.norms.tolist(), strict=True))
    assert sum(weights[i] * norms[i] for i in items) == pytest.approx(sum(norms[i] for i in items), rel=1e-5)
    assert max(weights.values()) > 1.2
    assert min(weights.values()) >= 0.5
    for term in ("contrastive", "interactive", "bank", "relation"):
        assert terms[term].weight == pytest.approx(plain[term] * weights[term])
    assert terms["bridge"].weight == plain["bridge"]
    method.eval()
    columns = {name: value.mean() for name, value in method.columns(batch).items()}
    visual = sum(weights[level] * columns[level] for level in ("P2", "P3", "P4", "P5"))
    torch.testing.assert_close(terms["visual"].value, visual)  # the term's own weight is 1
    assert {"selection/weight/P2", "selection/weight/bank"} <= {*method.measurements}


def test_what_lowers_the_held_out_loss_gains_weight() -> None:
    """The task's own loss on the held-out pairs themselves is what lowers it most."""
    method = selected(rate=1.0, preconditioned=False)
    same = random_batch(6, dtype=torch.float64)
    method(replace(same, held_out=same), StepInfo(step=0))
    assert method.joint is not None
    weights = method.joint.weights_of(method.joint.items)
    assert weights["contrastive"] == max(weights.values())


def test_measuring_moves_neither_the_bank_nor_the_modes() -> None:
    method, batch = selected(), batch_of()
    before = {key: value.clone() for key, value in method.state_dict().items() if not key.startswith("weighting")}
    assert method.joint is not None
    measure(method, method.joint, batch)
    assert all(torch.equal(before[key], method.state_dict()[key]) for key in before)
    assert all(module.training for module in method.modules())
    assert all(parameter.grad is None for parameter in method.parameters())


def test_weights_by_sample_ask_whether_both_halves_agree() -> None:
    batch = batch_of(6)
    asks, never = selected(by_sample=1.0, agreement=-1.0), selected(by_sample=1.0, agreement=0.999)
    for method in (asks, never):
        method(batch, StepInfo(step=0))
    assert asks.joint is not None
    assert never.joint is not None
    assert not never.joint.by_sample
    assert {"P2", "L4"} <= {*asks.joint.by_sample}
    assert "contrastive" not in asks.joint.by_sample
    factor = asks.joint.by_sample["P2"]
    torch.testing.assert_close(factor.mean(), torch.ones((), dtype=factor.dtype))
    assert float(factor.std()) > 0.1
    weights = asks.joint.weights_of(asks.joint.items)
    asks.eval()
    columns = asks.columns(batch)
    asks.train()
    expected = sum((weights[i] * asks.joint.by_sample[i] * columns[i]).mean() for i in ("P2", "P3", "P4", "P5"))
    torch.testing.assert_close(asks.eval()(batch)["visual"].value, expected)
    asks.train()(batch, StepInfo(step=1))  # this step does not measure
    assert not asks.joint.by_sample


def test_a_stage_selects_among_what_it_has() -> None:
    method, batch = selected(), batch_of()
    method.enter(
        StageConfig(name="coarse", share=1.0, levels=("P5", "L4"), terms=("contrastive", "visual", "language"))
    )
    method(batch, StepInfo(step=0))
    assert {key for key in method.measurements if key.startswith("selection")} == {
        f"selection/weight/{item}" for item in ("P5", "L4", "contrastive")
    }
    method.enter(StageConfig(name="modules", share=1.0, train=("modules",)))
    before = method.joint.measured if method.joint is not None else -1
    method(batch, StepInfo(step=0))  # nothing of the student learns, so nothing is measured
    assert method.joint is not None
    assert method.joint.measured == before


def test_a_batch_without_held_out_pairs_is_refused() -> None:
    method = selected()
    with pytest.raises(ValueError, match=r"set data\.held_out"):
        method(random_batch(4, dtype=torch.float64), StepInfo(step=0))
    assert method.needs_held_out
    assert method.held_out_every == 2
    policy = make_method("cmapkd", settings={"weighting": "policy"})
    assert policy.held_out_every == 1
    assert not policy.needs_held_out
    assert make_method("cmapkd").held_out_every is None


def test_it_weighs_no_terms_of_other_methods() -> None:
    plain = make_method("clip_kd")
    config = type(plain).Config.from_mapping({"name": "clip_kd", "term_weighting": "gradient_alignment"})
    with pytest.raises(ConfigError, match=r"method\.weighting of cmapkd"):
        build_method(config, student=plain.student, teacher=plain.teacher)


def test_a_policy_is_told_the_loss_on_held_out_pairs() -> None:
    policy = {"name": "policy", "warmup_steps": 2, "window": 2, "edge": 1}
    method = make_method("cmapkd", settings={"weighting": policy}).train()
    assert isinstance(method, CMAPKD)
    batch = batch_of(dtype=torch.float32)
    method(batch)
    assert batch.held_out is not None
    told: Tensor = method.weighting["visual"].latest.clone()
    torch.testing.assert_close(told, task_loss(method.encode_student(batch.held_out)).detach())
    method(replace(batch, held_out=None))  # without, it is told of the batch itself
    assert float(method.weighting["visual"].latest) != float(told)


def trainer(out: Path, *, steps: int = 8, **options: Any) -> Trainer:
    settings = {**CMAPKD_EXACT, "weighting": {**SLOPES, "rate": 0.5, **options.pop("weighting", {})}}
    method = make_method("cmapkd", student=make_model(), settings=settings)
    made = make_trainer(out, method, source=MemorySource(24), steps=steps, **options)
    alone = make_method("contrastive", student=method.student)
    held_out = make_builder(alone, PartOfSource(MemorySource(40), 24, 40))
    made.builder = WithHeldOut(made.builder, held_out, every=2, batch_size=8, seed=5)
    return made


def test_a_run_resumes_bit_identically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trainer(tmp_path / "whole")
    whole.run()
    for step in (1, 4, 5):
        interrupt(trainer(tmp_path / "parts"), step, monkeypatch, resume=step > 1)
    again = trainer(tmp_path / "parts")
    again.run(resume=True)
    assert_same_end(whole, again)
    weights = whole.method.weighting["jointly"].weight
    assert float(weights.std()) > 0.05  # something was selected


def test_bf16_and_micro_batches_train(tmp_path: Path) -> None:
    done = trainer(tmp_path / "run", steps=3, precision="bf16", micro_batch=3)
    done.run()
    assert done.method.weighting["jointly"].measured == 2

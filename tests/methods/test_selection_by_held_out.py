"""Bilevel weights and the bandit within CMAPKD: what they are told, what they reach, and that a run resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_slopes import batch_of

from cmapkd.data.held_out import WithHeldOut
from cmapkd.data.parts import PartOfSource
from cmapkd.data.plans import PlanSampler
from cmapkd.methods import StepInfo
from cmapkd.methods.cmapkd import CMAPKD
from cmapkd.methods.cmapkd.measuring import measure_loss
from cmapkd.methods.cmapkd.slopes import norms_of
from cmapkd.methods.dual import task_loss
from cmapkd.training import Trainer
from cmapkd.weighting import BanditWeighting, BilevelWeighting
from helpers import CMAPKD_EXACT, MemorySource, make_builder, make_method, make_model, make_trainer, random_batch
from training.test_resume import assert_same_end, interrupt

BILEVEL = {"name": "bilevel", "every": 2, "norms_every": 2, "hidden": 4, "rate": 0.3}
BANDIT = {"name": "bandit", "window": 2, "norms_every": 2, "rate": 0.5, "fixed": ["contrastive"]}
WEIGHTINGS = {"bilevel": BILEVEL, "bandit": BANDIT}


def selected(dtype: torch.dtype = torch.float64, **weighting: Any) -> CMAPKD:
    """CMAPKD with every term and level and a bank that holds something."""
    method = make_method("cmapkd", settings={**CMAPKD_EXACT, "weighting": weighting}).to(dtype).train()
    assert isinstance(method, CMAPKD)
    assert method.teacher is not None
    method.teacher.model.to(dtype)
    earlier = random_batch(6, seed=1, dtype=dtype)
    method(replace(earlier, ids=tuple(f"earlier{i}" for i in range(6))), StepInfo(step=1))  # a step without measurement
    return method


def test_weights_by_sample_reach_the_levels_and_the_terms() -> None:
    method, batch = selected(**BILEVEL), batch_of()
    plain = {name: term.weight for name, term in make_method("cmapkd", settings=CMAPKD_EXACT)(random_batch(4)).items()}
    one = method.joint
    assert isinstance(one, BilevelWeighting)
    for _ in range(3):
        method(batch, StepInfo(step=0))
    one.eval()  # the next steps weigh by what was learned and move nothing
    terms = method(batch, StepInfo(step=1))
    factor = one.by_sample["P2"]
    assert float(factor.std()) > 1e-3
    weights = one.weights_of(one.items)
    for term in ("contrastive", "interactive", "bank", "relation"):
        assert terms[term].weight == pytest.approx(plain[term] * weights[term])
        assert weights[term] != 1.0
    method.eval()
    columns = method.columns(batch)
    expected = sum((one.by_sample[i] * columns[i]).mean() for i in ("P2", "P3", "P4", "P5"))
    torch.testing.assert_close(terms["visual"].value, torch.as_tensor(expected))
    assert method.measurements == {} or "selection/weight/P2" in method.measurements


def test_what_is_measured_of_items_is_the_same_under_any_chosen_weights() -> None:
    vectors = {"uniform": {}, "other": {"contrastive": 4.0, "bank": 0.0}}
    method, batch = selected(**{**BANDIT, "fixed": [], "vectors": vectors}), batch_of()
    one = method.joint
    assert isinstance(one, BanditWeighting)
    method(batch, StepInfo(step=0))
    method.eval()
    found = []
    for number in range(2):
        one.chosen.fill_(number)
        columns = method.columns(batch)
        found.append((columns, norms_of(method.student, columns)))
    (columns, norms), (others, other_norms) = found
    for item, column in columns.items():
        torch.testing.assert_close(others[item], column)
        torch.testing.assert_close(other_norms[item], norms[item])
    assert float(columns["bank"].detach()) > 0


def test_the_bandit_is_told_the_loss_on_all_held_out_pairs() -> None:
    method, batch = selected(**BANDIT), batch_of()
    one = method.joint
    assert isinstance(one, BanditWeighting)
    assert method.held_out_whole
    assert not selected(**BILEVEL).held_out_whole
    method(batch, StepInfo(step=0))
    method.eval()
    assert batch.held_out is not None
    torch.testing.assert_close(one.before, task_loss(method.encode_student(batch.held_out)).detach())
    assert "selection/probability/uniform" in method.measurements
    assert method.measurements["selection/weight/contrastive"] == 1.0


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_many_held_out_pairs_are_encoded_a_few_at_a_time(
    micro_batch: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, batch = selected(**BANDIT), replace(batch_of(), held_out=random_batch(11, seed=7, dtype=torch.float64))
    assert batch.held_out is not None
    one = method.joint
    assert isinstance(one, BanditWeighting)
    method.eval()
    wanted = task_loss(method.encode_student(batch.held_out)).detach()
    sizes: list[int] = []
    encode = method._encode_student

    def noting(part: Any, number: int = 0) -> Any:
        sizes.append(len(part))
        return encode(part, number)

    monkeypatch.setattr(method, "_encode_student", noting)
    for number, place in ((11, "cpu"), (4, "meta")):  # pixels of many stay until they are encoded
        moved = replace(batch, held_out=random_batch(number)).to("meta").held_out
        assert moved is not None
        assert moved.inputs["student"].images.device.type == place
    method.micro_batch = micro_batch
    measure_loss(method, one, batch, batch.held_out)
    assert max(sizes) == (micro_batch or len(batch)) < 11
    torch.testing.assert_close(one.before, wanted.to(one.before.dtype))


def test_all_held_out_pairs_are_the_same_each_time() -> None:
    method = make_method("contrastive")
    source = MemorySource(24)
    parts = (PartOfSource(source, 0, 17), PartOfSource(source, 17, 24))
    made = WithHeldOut(*(make_builder(method, part) for part in parts), every=2, batch_size=None, seed=3)
    sampler = PlanSampler(17, batch_size=4, seed=3, start=0, stop=6)
    first, none, again, *_ = (made[plan].held_out for plan in sampler)
    assert none is None
    assert first is not None
    assert again is not None
    alone = make_builder(method, source)
    assert made.bytes_of(4) == alone.bytes_of(4) + alone.bytes_of(7)
    assert {*first.ids} == {f"m{i}" for i in range(17, 24)}
    assert first.ids == again.ids
    for role, each in first.inputs.items():
        assert torch.equal(each.images, again.inputs[role].images)


def trainer(name: str, out: Path, *, steps: int = 6, **options: Any) -> Trainer:
    bank = {"size": 12, "store": "fp32"}
    method = make_method("cmapkd", student=make_model(), settings={"bank": bank, "weighting": WEIGHTINGS[name]})
    made = make_trainer(out, method, source=MemorySource(24), steps=steps, **options)
    alone = make_method("contrastive", student=method.student)
    held_out = make_builder(alone, PartOfSource(MemorySource(40), 24, 40))
    size = None if method.held_out_whole else 8
    made.builder = WithHeldOut(made.builder, held_out, every=2, batch_size=size, seed=5)
    return made


@pytest.mark.parametrize(("name", "step"), [("bilevel", 3), ("bandit", 4)])
def test_a_run_resumes_bit_identically(tmp_path: Path, name: str, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trainer(name, tmp_path / "whole")
    whole.run()
    interrupt(trainer(name, tmp_path / "parts"), step, monkeypatch)
    again = trainer(name, tmp_path / "parts")
    again.run(resume=True)
    assert_same_end(whole, again)
    one = whole.method.joint
    learned = one.out if name == "bilevel" else one.logits
    assert float(learned.std()) > 1e-3  # something was learned


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_bf16_and_micro_batches_train(tmp_path: Path, name: str) -> None:
    done = trainer(name, tmp_path / "run", steps=2, precision="bf16", micro_batch=4)
    done.run()
    assert done.method.joint.measured == 1


def test_micro_batches_look_ahead_as_whole_batches_do() -> None:
    """Micro-batches are encoded a second time in the backward pass, and then too with the parameters ahead."""
    found = []
    for size in (None, 2):
        method, batch = selected(**BILEVEL), batch_of()
        method.micro_batch = size
        method(batch, StepInfo(step=0))
        found.append({name: getattr(method.joint, f"{name}_first") for name in BilevelWeighting.network})
    for name, whole in found[0].items():
        torch.testing.assert_close(found[1][name], whole, rtol=1e-6, atol=1e-12)

"""Selections by held-out pairs measure students of every family: forward mode, and parameters exchanged for a call."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family_support import FAMILIES, make
from torch import Tensor

from cmapkd.data.plans import PlanSampler
from cmapkd.methods.cmapkd import CMAPKD
from cmapkd.methods.cmapkd.measuring import measure
from cmapkd.methods.cmapkd.slopes import evaluating, gradient, gradient_at, learning, slopes_by_difference
from cmapkd.methods.dual import task_loss
from cmapkd.weighting import BilevelWeighting
from helpers import make_builder, make_method

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_look_ahead_step_is_measured(name: str, tmp_path: Path) -> None:
    student = make(name, tmp_path / "model")
    settings: dict[str, Any] = {"name": "bilevel", "preconditioned": False, "look_ahead": 1e-6}  # as good as no step
    method = make_method("cmapkd", student=student, settings={"weighting": settings}).train()
    assert isinstance(method, CMAPKD)
    first, second = (make_builder(method)[plan] for plan in PlanSampler(24, batch_size=4, seed=5, start=0, stop=2))
    one = method.joint
    assert isinstance(one, BilevelWeighting)
    given: list[dict[str, Tensor]] = []
    learn = one.observe_look_ahead

    def observed(losses: Any, slopes: Any) -> None:
        given.append(slopes)
        learn(losses, slopes)

    one.observe_look_ahead = observed  # type: ignore[method-assign]
    before = {key: each.clone() for key, each in student.state_dict().items()}
    measure(method, one, replace(first, held_out=second))
    assert all(torch.equal(each, before[key]) for key, each in student.state_dict().items())
    assert float(one.out_bias.abs().max()) > 1e-3  # it learned
    own = {key: each.detach() for key, each in learning(student).items()}
    with evaluating(method), torch.enable_grad():
        there = gradient_at(lambda: task_loss(method.encode_student(second)), student, own)
        here = gradient(task_loss(method.encode_student(second)), student)
        for key, each in here.items():
            torch.testing.assert_close(there[key], each, msg=key)
        near = slopes_by_difference(student, lambda: method.columns(first), here, step=1e-4)
    found = torch.cat([each.reshape(-1) for each in given[0].values()])
    expected = torch.cat([near[key].reshape(-1) for key in given[0]])
    assert float((found - expected).norm() / expected.norm()) < 0.1
    assert torch.backends.mha.get_fastpath_enabled()  # put back

"""A uniform mean of the student's weights, which is then the student that is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cmapkd.config import ConfigError
from cmapkd.features.weights import Anchor
from cmapkd.training import TrainConfig
from cmapkd.training.checkpoint import list_checkpoints
from helpers import make_method, make_model, make_trainer


def trainer(out: Path, **options: Any) -> Any:
    return make_trainer(out, make_method("contrastive"), optim={"schedule": "constant"}, **options)


def after(out: Path, steps: int) -> dict[str, Tensor]:
    return dict(trainer(out / f"alone {steps}", steps=steps).run().student.state_dict())


def test_it_is_the_mean_of_the_start_and_of_every_nth_step(tmp_path: Path) -> None:
    start = make_method("contrastive").student.state_dict()
    result = trainer(tmp_path / "whole", steps=5, mean_every=2, checkpoint_every=3).run()
    two, four = after(tmp_path, 2), after(tmp_path, 4)
    for key, value in result.student.state_dict().items():
        torch.testing.assert_close(value, (start[key] + two[key] + four[key]) / 3, rtol=1e-5, atol=1e-6)
    # a resume between two steps that count
    list_checkpoints(tmp_path / "whole" / "checkpoints")[-1].rename(tmp_path / "last")
    again = trainer(tmp_path / "whole", steps=5, mean_every=2, checkpoint_every=3).run(resume=True)
    for key, value in result.student.state_dict().items():
        assert torch.equal(again.student.state_dict()[key], value), key


def test_settings_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(ConfigError, match="ema and mean_every are both averages of the student"):
        TrainConfig.from_mapping({"steps": 9, "ema": 0.9, "mean_every": 3})
    with pytest.raises(ConfigError, match="mean_every is 10 and the run has 9 steps: the student as it began"):
        TrainConfig.from_mapping({"steps": 9, "mean_every": 10})
    with pytest.raises(ValueError, match="mean_every is 10 and the run has 4 steps"):  # once its length is known
        TrainConfig.from_mapping({"epochs": 1, "mean_every": 10}).check_mean(4)


def test_an_anchor_is_where_a_model_began() -> None:
    model = make_model().double()
    anchor = Anchor(model)
    assert anchor.distance(model).item() == 0
    assert len(anchor.state_dict()) == len(list(model.parameters()))
    expected = 0.0
    model.log_logit_scale.requires_grad_(False)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            parameter.add_(0.1 * number)
            expected += 0.0 if name == "log_logit_scale" else parameter.numel() * (0.1 * number) ** 2
    distance = anchor.distance(model)
    assert distance.item() == pytest.approx(expected, rel=1e-10)
    distance.backward()
    name, moved = list(model.named_parameters())[3]
    torch.testing.assert_close(moved.grad, torch.full_like(moved, 0.6), msg=name)
    with pytest.raises(ValueError, match="other parameters than the one"):
        anchor.distance(model.vision)

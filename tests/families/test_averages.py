"""`training.ema` of every model family: the average of its weights, and what is saved is what is measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from family_support import FAMILIES, all_tensors, is_averaged, make, method_for
from model_support import features, inputs
from torch import Tensor

from cmapkd.models import DualEncoder, load_model
from cmapkd.training import Trainer
from helpers import make_trainer

DECAY, STEPS = 0.9, 4

pytestmark = pytest.mark.usefixtures("one_thread")


def averaging(name: str, folder: Path, steps: int = STEPS) -> tuple[Trainer, list[dict[str, Tensor]]]:
    """A trainer that keeps an average, and the student's tensors after each of its steps, once it has run."""
    after: list[dict[str, Tensor]] = []

    def note(_average: DualEncoder) -> dict[str, float]:
        after.append(all_tensors(trainer.method.student))
        return {"score": 0.0}

    method = method_for(make(name, folder / "model"))
    options = {"optim": {"schedule": "constant"}, "evaluate_every": 1, "validate": note}
    trainer = make_trainer(folder / "run", method, steps=steps, ema=DECAY, **options)
    return trainer, after


@dataclass(frozen=True, slots=True)
class Whole:
    """A run that nothing interrupted.

    Attributes:
        after: the learning student's tensors after each step.
        average: the tensors of the student that would be saved.
    """

    name: str
    last: DualEncoder
    student: DualEncoder
    after: list[dict[str, Tensor]]
    average: dict[str, Tensor]


@pytest.fixture(scope="module", params=FAMILIES)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    trainer, after = averaging(request.param, tmp_path_factory.mktemp("whole"))
    student = trainer.run().student
    return Whole(request.param, trainer.method.student, student, after, all_tensors(student))


def test_the_average_is_of_weights_and_statistics_and_the_rest_is_the_students(whole: Whole) -> None:
    assert len(whole.after) == STEPS
    assert whole.average.keys() == whole.after[0].keys()
    for key, last in whole.after[-1].items():
        if not is_averaged(key, whole.last):
            assert torch.equal(whole.average[key], last), f"{key} is no weight, and must be as the student has it"
            continue
        expected = whole.after[0][key]
        for step in whole.after[1:]:
            expected = DECAY * expected + (1 - DECAY) * step[key]
        torch.testing.assert_close(
            whole.average[key], expected, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_what_is_saved_is_what_is_measured(whole: Whole, tmp_path: Path) -> None:
    student = whole.student.eval()
    measured = features(student, inputs(student))
    assert all(bool(value.isfinite().all()) for value in measured)
    raw = features(whole.last.eval(), inputs(student))
    assert not torch.equal(measured[0], raw[0])  # the average is another model than the last step's
    student.save(tmp_path / "saved")
    loaded = load_model(tmp_path / "saved")
    for one, other in zip(features(loaded, inputs(student)), measured, strict=True):
        assert torch.equal(one, other)


def test_a_resumed_average_is_the_same_to_the_last_bit(whole: Whole, tmp_path: Path) -> None:
    averaging(whole.name, tmp_path / "cut", steps=2)[0].run()
    resumed, _ = averaging(whole.name, tmp_path / "cut")
    found = all_tensors(resumed.run(resume=True).student)
    assert found.keys() == whole.average.keys()
    differing = [key for key, value in whole.average.items() if not torch.equal(found[key], value)]
    assert not differing

"""A model's forward and backward never make the host wait for its device: no value of a tensor is looked at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import inputs
from test_parts import FAMILIES
from torch.utils._python_dispatch import TorchDispatchMode

from cmapkd.data.templates import ClassPrompts
from cmapkd.models import DualEncoder, LevelRequest
from cmapkd.models.masked import MaskedEncoder
from cmapkd.models.texts import LearnedClassVectors
from helpers import make_model

aten = torch.ops.aten
WAITING = (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default, aten.nonzero.default)
# transformers' BERT and its kin look whether a mask has padding at all.
OF_THE_LIBRARY = {"open_clip with a transformers text tower"}


class Waiting(TorchDispatchMode):
    """Counts the operations whose result the host needs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITING:
            self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


def waits(run: Callable[[], Any]) -> Counter[str]:
    with Waiting() as mode:
        run()
    return mode.found


def test_waiting_is_found() -> None:
    x = torch.ones(3)
    assert waits(lambda: (float(x[0]), x.nonzero(), bool((x > 0).all()))).total() == 3


def step(model: DualEncoder) -> None:
    needs = LevelRequest(tuple(i.name for i in model.image_levels), tuple(i.name for i in model.text_levels))
    for asked in (LevelRequest(), needs):
        output = model(inputs(model), asked)
        (output.image.embedding.sum() + output.text.embedding.sum() + output.logit_scale).backward()
    model.after_step()
    model.measurements()


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in OF_THE_LIBRARY])
@pytest.mark.parametrize("training", [True, False])
def test_no_family_waits(family: str, training: bool, tmp_path: Path) -> None:
    model = FAMILIES[family](tmp_path).train(training)
    batch = inputs(model)
    assert not waits(lambda: model(batch))
    step(model)  # once, so that what is made at first is made
    assert not waits(lambda: step(model))


def test_draws_of_masks_and_of_prompts_do_not_wait() -> None:
    model = MaskedEncoder(make_model()).train()
    with torch.no_grad():
        for mask in model.masks.values():
            mask.uniform_(-3, 3)
    batch = inputs(model)

    def masked() -> None:
        model.draw(torch.Generator().manual_seed(1))
        output = model(batch)
        (output.image.embedding.sum() + model.expected_weights()).backward()

    assert not waits(masked)
    student = make_model()
    vectors = LearnedClassVectors(ClassPrompts(("dog", "cat"), ("a {}", "the {}", "one {}")), student, at_once=2)
    assert not waits(lambda: vectors(student, torch.Generator().manual_seed(1)).sum().backward())

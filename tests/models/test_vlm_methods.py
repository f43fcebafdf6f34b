"""Methods that read more than answers of both models, over every family of models that write."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from model_support import randomise
from torch import nn
from vlm_support import MAKERS, chat, make_vlm

from cmapkd.data.types import Batch
from cmapkd.models import FrozenTeacher
from writers import loss_of, make_task

READING: dict[str, dict[str, Any]] = {
    "llava_kd": {"relation_level": "projector"},
    "align_kd": {"focus": 2},
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("name", READING)
def test_every_family_can_learn(name: str, kind: str) -> None:
    """Every term is zero of a student that equals its teacher, and its gradients reach projector and vision tower."""
    student = make_vlm(kind)
    teacher = copy.deepcopy(student)
    method = make_task(name, student=student, teacher=FrozenTeacher(teacher), **READING[name]).eval()
    for layer in method.children():
        if isinstance(layer, nn.Linear):  # from the teacher's maps or widths to the same ones
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)
    inputs = chat(student)
    batch = Batch(("a", "b", "c"), {"student": inputs, "teacher": inputs}, ("",) * 3)
    equal = method(batch)
    assert equal.keys() == set(method.term_names)
    torch.manual_seed(1)
    randomise(teacher)
    terms = method(batch)
    for term in method.of_teacher:
        assert abs(float(equal[term].value.detach())) < 0.05 * float(terms[term].value.detach()), term
        method.zero_grad()
        terms[term].value.backward(retain_graph=True)
        learned = {each for each, own in student.named_parameters() if own.grad is not None and own.grad.any()}
        assert learned & student.parts["projector"], term
        assert learned & student.parts["vision"], term
    assert torch.isfinite(loss_of(terms))

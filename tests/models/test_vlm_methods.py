"""Methods that read more than answers of both models, over every family of models that write."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from model_support import randomise
from torch import nn
from vlm_support import MAKERS, chat, make_vlm

from cmapkd.config import ConfigError
from cmapkd.data.types import Batch, ModelInput, TokenBatch
from cmapkd.models import FrozenTeacher
from cmapkd.models.linear_vlm import convert
from cmapkd.models.tap_attention import MEAN
from cmapkd.models.token_types import TokenNeeds
from writers import loss_of, make_seer, make_task

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


@pytest.mark.parametrize("kind", MAKERS)
def test_every_family_can_be_kept_from_looking_back(kind: str) -> None:
    """What is hidden gets no attention in any layer; everything else of the model's own mask stays."""
    model = make_vlm(kind)
    inputs = chat(model)
    layers = tuple(range(len(model.text_levels)))
    plain = model(inputs, TokenNeeds(attention=layers, attention_mean=True))
    every = torch.stack([plain.attention[layer] for layer in layers])
    torch.testing.assert_close(plain.attention[MEAN], every.mean((0, 2)))
    torch.testing.assert_close(plain.hidden["answer"].values, model(inputs).hidden["answer"].values)
    batch, length = inputs.texts.ids.shape
    hidden = torch.zeros(batch, length, length, dtype=torch.bool)
    hidden[:, -3:, 2] = True
    masked = model(inputs, TokenNeeds(attention=layers, hidden=hidden))
    for layer in layers:
        maps = masked.attention[layer]
        assert not maps.masked_select(hidden[:, None].expand_as(maps)).any()
        seen = every[layer] > 0
        real = inputs.texts.mask[:, None, :, None].expand_as(maps)
        assert not maps.masked_select(~seen & real).any()
        torch.testing.assert_close(maps[:, :, :-3], every[layer][:, :, :-3])
    nothing = model(inputs, TokenNeeds(hidden=torch.zeros_like(hidden)))
    torch.testing.assert_close(nothing.hidden["answer"].values, plain.hidden["answer"].values)


@pytest.mark.parametrize("kind", MAKERS)
def test_every_family_can_learn_from_image_encoders(kind: str) -> None:
    student = make_vlm(kind)
    seer, inputs = make_seer(), chat(student)
    seer.model.float()
    pixels = torch.randint(0, 256, (3, 3, 24, 24), dtype=torch.uint8)
    seen = ModelInput(pixels, TokenBatch(torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1, dtype=torch.bool)))
    batch = Batch(("a", "b", "c"), {"student": inputs, "teacher": seen}, ("",) * 3)
    for name in ("ola_vlm", "move_kd"):
        if name == "move_kd" and student.encoded_shape is None:
            with pytest.raises(ConfigError, match="patches of all pictures in one row"):
                make_task(name, student=student, teacher=seer)
            continue
        method = make_task(name, student=student, teacher=seer)
        for term, found in method(batch).items():
            method.zero_grad()
            found.value.backward(retain_graph=True)
            learned = {each for each, own in student.named_parameters() if own.grad is not None and own.grad.any()}
            assert torch.isfinite(found.value), term
            assert learned & student.parts["vision"], term


@pytest.mark.parametrize("kind", ["qwen3_vl", "gemma3"])
def test_layers_of_other_families_are_called_alike(kind: str) -> None:
    """The teacher's own layers, called again as they were called, give what they gave."""
    student, teacher = convert(make_vlm(kind), [1], mixer="mamba2", convolution=2), make_vlm(kind)
    method: Any = make_task("linearize", student=student, teacher=FrozenTeacher(teacher), form="infinitevl")
    inputs = chat(teacher)
    batch = Batch(("a", "b", "c"), {"student": inputs, "teacher": inputs}, ("",) * 3)
    call = method._ask(batch).calls[1]
    torch.testing.assert_close(call.of(teacher.layers[1], "layer"), call.output)
    assert all(torch.isfinite(term.value) for term in method(batch).values())

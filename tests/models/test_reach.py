"""What stands behind an output, asked of autograd."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from cmapkd.models.reach import example_output, last_matrix_behind, parameters_behind
from helpers import make_model


def test_parameters_behind_a_tower_and_a_level() -> None:
    model = make_model()
    names = {name for name, _ in model.named_parameters()}
    image, text = (parameters_behind(model, partial(example_output, model, tower)) for tower in ("image", "text"))
    assert image == {name for name in names if name.startswith("vision.")}
    assert text == {name for name in names if name.startswith("text.")}
    level = parameters_behind(model, partial(example_output, model, "image", "blocks.0"))
    assert image - level == {"vision.norm.weight", "vision.norm.bias", "vision.project.weight"}


def test_last_matrix_is_the_nearest_however_the_modules_are_ordered() -> None:
    model = make_model()
    assert last_matrix_behind(model, partial(example_output, model, "image")) == "vision.project.weight"
    assert last_matrix_behind(model, partial(example_output, model, "text")) == "text.project.weight"
    level = partial(example_output, model, "image", "blocks.0")
    assert last_matrix_behind(model, level) == "vision.blocks.0.shrink.weight"
    words = partial(example_output, model, "text", "blocks.0")
    assert last_matrix_behind(model, words) == "text.blocks.0.shrink.weight"
    bias = nn.ParameterDict({"b": torch.ones(3)})
    with pytest.raises(ValueError, match="no matrix of weights"):
        last_matrix_behind(bias, lambda: bias["b"] * 2)


def test_a_model_is_left_as_it_was() -> None:
    model = make_model()
    model.vision.requires_grad_(False)
    model.train()
    model.text.eval()
    random = torch.get_rng_state()
    last_matrix_behind(model, partial(example_output, model, "image"))
    with pytest.raises(ValueError, match="cannot be trained"):  # nothing behind it learns
        last_matrix_behind(model, partial(example_output, model, "image"), learning=True)
    assert not any(parameter.requires_grad for parameter in model.vision.parameters())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.text.parameters())
    assert model.vision.training
    assert not model.text.training
    assert torch.equal(torch.get_rng_state(), random)

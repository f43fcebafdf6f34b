"""Pixels that come in bytes and are normalised at the tower: every term and gradient as of pixels normalised before."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_micro_batches import CASES, MICRO_BATCH, built
from torch import Tensor

from cmapkd.data.plans import Plan
from cmapkd.data.types import Batch
from cmapkd.methods import Method
from cmapkd.models import ImageSpec
from cmapkd.models import images as image_module
from helpers import make_builder

PLACES = tuple(range(1, 9))


def normalised(images: Tensor, spec: ImageSpec) -> Tensor:
    """As data workers made it: on the host, by numpy."""
    pixels = images.numpy().astype(np.float32)
    pixels /= np.float32(255)
    pixels -= np.array(spec.mean, np.float32)[:, None, None]
    pixels /= np.array(spec.std, np.float32)[:, None, None]
    return torch.from_numpy(pixels)


def batches(method: Method) -> tuple[Batch, Batch]:
    """In bytes, and the same with floating-point pixels."""
    builder = make_builder(method)
    batch = builder[Plan(0, 0, PLACES, PLACES)]
    before = {}
    for role in batch.inputs:
        pair = batch.pairs(role)
        before[role] = replace(pair, images=normalised(pair.images, builder.readers[role].preprocess))
    return batch, replace(batch, inputs=before)


def results(method: Method, batch: Batch) -> dict[str, Tensor]:
    terms = method(batch)
    torch.stack([term.weight * term.value for term in terms.values()]).sum().backward()
    values = {f"term/{key}": term.value.detach() for key, term in terms.items()}
    found = {name: parameter.grad for name, parameter in method.named_parameters() if parameter.grad is not None}
    return values | {f"gradient/{name}": gradient for name, gradient in found.items()}


def assert_same(name: str, micro_batch: int | None) -> None:
    found = []
    for number in (0, 1):
        method = built(name)
        method.micro_batch = micro_batch
        batch = batches(method)[number]
        assert all(batch.pairs(role).images.is_floating_point() == bool(number) for role in batch.inputs)
        found.append(results(method, batch))
    assert found[0].keys() == found[1].keys()
    assert any(key.startswith("gradient/") for key in found[0])
    for key, value in found[1].items():
        assert torch.equal(found[0][key], value), key


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("micro_batch", [None, MICRO_BATCH])
@pytest.mark.parametrize("name", CASES)
def test_terms_and_gradients_have_the_same_bits(name: str, micro_batch: int | None) -> None:
    assert_same(name, micro_batch)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("micro_batch", [None, MICRO_BATCH])
def test_a_table_in_place_of_division_changes_nothing(micro_batch: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_module, "_EXACT", frozenset())
    monkeypatch.setattr(image_module, "_TABLES", {})
    assert_same("clip_kd, everything", micro_batch)
    assert image_module._TABLES

"""The part of a teacher that learns in c2kd: its text tower, of every model family, and nothing of its image tower."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from family_support import FAMILIES, make
from model_support import TEXTS

from cmapkd.models import FrozenTeacher
from cmapkd.models.trainable_text import trainable_text_tower

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "joined"])  # a joined model is no teacher
def test_the_copy_has_the_text_tower_alone(name: str, tmp_path: Path) -> None:
    teacher = FrozenTeacher(make(name, tmp_path)).model
    levels = tuple(level.name for level in teacher.text_levels)
    tower = trainable_text_tower(teacher).eval()
    texts = teacher.tokenizer(TEXTS)
    expected, found = teacher.encode_text(texts, levels), tower.encode_text(texts, levels)
    torch.testing.assert_close(found.embedding, expected.embedding)
    for level in levels:
        torch.testing.assert_close(found.levels[level].values, expected.levels[level].values)
    names = {name for name, _ in tower.named_parameters()}
    assert names.isdisjoint(teacher.parts["image"])
    assert teacher.parts["text"] <= names
    learning = {name for name, parameter in tower.named_parameters() if parameter.requires_grad}
    assert learning
    assert learning <= teacher.parts["text"] | teacher.parts["projections"]
    image_modules = {name.rpartition(".")[0] for name in teacher.parts["image"]}
    buffers = [name for name, _ in tower.named_buffers()]
    assert not [name for name in buffers if name.rpartition(".")[0] in image_modules - {""}]
    found.embedding.sum().backward()
    assert all(parameter.grad is not None for parameter in tower.parameters() if parameter.requires_grad)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())

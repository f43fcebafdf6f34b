"""A text tower that learns, out of a model whose image tower is of no use."""

from __future__ import annotations

import copy
from functools import partial

from torch import nn

from cmapkd.models.base import DualEncoder
from cmapkd.models.reach import example_output, parameters_behind


def trainable_text_tower(model: DualEncoder) -> DualEncoder:
    """A copy of a model whose text tower learns, without its image tower: `encode_text` works, `encode_image` does not.

    So no frozen weight of a teacher is written to checkpoints, counted as the method's, or held on the device.
    """
    copied = copy.deepcopy(model)
    reached = parameters_behind(copied, partial(example_output, copied, "text"))
    of_images = {*copied.parts["image"], *copied.parts["projections"]} - reached
    _remove_parameters(copied, frozenset(of_images))
    for name, parameter in copied.named_parameters():
        parameter.requires_grad_(name in reached)
    return copied


def _remove_parameters(module: nn.Module, names: frozenset[str], prefix: str = "") -> None:
    """Takes out parameters by name, and modules all of whose parameters are among them, with their buffers."""
    for child_name, child in [*module.named_children()]:
        inner = f"{prefix}{child_name}."
        inside = {inner + name for name, _ in child.named_parameters()}
        if inside and inside <= names:
            setattr(module, child_name, None)
        else:
            _remove_parameters(child, names, inner)
    for name in [name for name, _ in module.named_parameters(recurse=False)]:
        if prefix + name in names:
            module.register_parameter(name, None)

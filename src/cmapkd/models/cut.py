"""A smaller model out of a larger one: the units that are kept, with their weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cmapkd.models.base import DualEncoder
from cmapkd.models.prunable import Kept, kept_sizes
from cmapkd.models.storage import load_weights
from cmapkd.models.types import Tower


def cut(model: DualEncoder, kept: Mapping[Tower, Kept], weights: Mapping[str, Tensor] | None = None) -> DualEncoder:
    """The smaller model that has the kept units alone, on the same device.

    Args:
        weights: in place of the model's own, by name.
    """
    towers = model.prunable
    smaller = model.resized({tower: kept_sizes(kept[tower]) for tower in towers})
    state = model.state_dict() | dict(weights or {})
    for tower, parts in towers.items():
        for name, group in parts.groups.items():
            for place in group.places:
                state[place.weight] = place.take(state[place.weight], kept[tower][name], group.size)
    load_weights(smaller, state, where=f"{model.name}, cut")
    learning = dict(model.named_parameters())
    for name, parameter in smaller.named_parameters():
        parameter.requires_grad_(learning[name].requires_grad)
    return smaller.to(model.log_logit_scale).train(model.training)

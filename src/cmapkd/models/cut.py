"""A smaller model out of a larger one: the units that are kept, with their weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cmapkd.models.base import DualEncoder
from cmapkd.models.prunable import Kept, PrunableTower, TowerSizes, kept_sizes
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


def weights_in(towers: Mapping[Tower, PrunableTower], sizes: Mapping[Tower, TowerSizes] | None = None) -> int:
    """Entries of the matrices of all layers of these towers.

    Args:
        sizes: that they would have; None: those that they have.
    """
    return sum(parts.num_weights(None if sizes is None else sizes[tower]) for tower, parts in towers.items())


def sampled(model: DualEncoder, num_weights: float, generator: torch.Generator) -> DualEncoder:
    """A smaller model of units drawn at random, the same share of every group.

    Args:
        num_weights: what the smaller model may have; it is the largest that has no more.
        generator: what the units are drawn from, on the CPU, the same in every process.
    """
    towers = model.prunable
    orders = {
        tower: {name: torch.randperm(group.size, generator=generator) for name, group in parts.groups.items()}
        for tower, parts in towers.items()
    }

    def kept(share: float) -> dict[Tower, Kept]:
        return {
            tower: {name: order[: max(1, round(len(order) * share))].sort().values for name, order in of.items()}
            for tower, of in orders.items()
        }

    for step in range(999, 0, -1):
        chosen = kept(step / 1000)
        if weights_in(towers, {tower: kept_sizes(units) for tower, units in chosen.items()}) <= num_weights:
            break
    return cut(model, chosen)

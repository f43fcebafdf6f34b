"""Which activation a checkpoint was trained with: GELU or OpenAI's QuickGELU. Their weights have the same shapes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cmapkd.data.types import ModelInput
from cmapkd.models.base import DualEncoder, eval_mode

_NAMES = {"gelu": "GELU", "quick_gelu": "QuickGELU"}


def assumption(model: DualEncoder) -> str | None:
    """One line that says which activation is assumed for a checkpoint that does not say its own; None: nothing is."""
    assumed = model.assumed_activation
    if assumed is None:
        return None
    other = "quick_gelu" if assumed == "gelu" else "gelu"
    return (
        f"{model.name} is assumed to use {_NAMES[assumed]}: its checkpoint does not say. If it was trained with "
        f"{_NAMES[other]}, set options.quick_gelu: {str(other == 'quick_gelu').lower()}; if not, "
        f"{str(assumed == 'quick_gelu').lower()}. `cmapkd doctor` compares both on a few pairs."
    )


@torch.no_grad()
def activation_losses(model: DualEncoder, inputs: ModelInput) -> dict[str, float]:
    """CLIP's loss of a few pairs with either activation: `{"gelu": ..., "quick_gelu": ...}`, the assumed one first.

    Args:
        inputs: matching pairs, at least two, on the model's device.
    Returns:
        Means over pairs and both directions, in nats, >= 0. The weights' own activation has the lower one, unless the
        pairs are too few or too hard. Empty where the model assumes nothing.
    """
    twin = model.activation_twin()
    if twin is None or model.assumed_activation is None:
        return {}
    names = [model.assumed_activation, *(name for name in _NAMES if name != model.assumed_activation)]
    return {name: _loss(each, inputs) for name, each in zip(names, (model, twin), strict=True)}


def _loss(model: DualEncoder, inputs: ModelInput) -> float:
    with eval_mode(model):
        output = model(inputs)
    images, texts = (F.normalize(tower.embedding.float(), dim=-1) for tower in (output.image, output.text))
    logits = output.logit_scale.float() * images @ texts.T
    pairs = torch.arange(len(logits), device=logits.device)
    return float((F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2)

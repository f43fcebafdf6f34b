"""Weights as something to stay near: the distance of a model to where it began."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Anchor(nn.Module):
    """The weights that a model has now, and how far it has gone from them.

    The copy is in checkpoints, so that a resumed run stays near the same weights. A saved student has none of it.

    Args:
        model: whose parameters are copied, also those that do not learn.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = tuple(name for name, _ in model.named_parameters())
        for number, (_, parameter) in enumerate(model.named_parameters()):
            self.register_buffer(f"weight_{number}", parameter.detach().clone())

    def distance(self, model: nn.Module) -> Float[Tensor, ""]:
        """Σ (θ - θ_start)² over all parameters that learn; not a mean, so it grows with the size of the model.

        Raises:
            ValueError: the model has other parameters than the one that was copied.
        """
        now = dict(model.named_parameters())
        if tuple(now) != self.names:
            raise ValueError("the model has other parameters than the one whose weights are the anchor")
        squares = [
            (now[name] - self.get_buffer(f"weight_{number}")).square().sum()
            for number, name in enumerate(self.names)
            if now[name].requires_grad
        ]
        return torch.stack(squares).sum() if squares else next(iter(now.values())).new_zeros(())

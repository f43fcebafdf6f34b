"""A frozen model without its smallest weights, for as long as somebody wants: layer by layer, and back bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.models.base import Model


class Thinned:
    """Sets the smallest weights of a model's matrices to zero, and gives them back.

    In each matrix of its own, the same share of the weights is zero. While any is, a copy of the matrices is held.

    Args:
        model: no optimizer has its weights.
        parts: of the model, whose linear layers are thinned.
    Raises:
        ConfigError: the model has no such part, or no linear layer in them.
    """

    def __init__(self, model: Model, parts: Sequence[str]) -> None:
        known = model.parts
        for part in parts:
            if part not in known:
                raise ConfigError(f"teacher {model.name} has no part {part!r} to thin; it has: {', '.join(known)}")
        named = frozenset().union(*(known[part] for part in parts))
        linears = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        self.model, self.names, self.share = model, [name for name in linears if name in named], 0.0
        if not self.names:
            raise ConfigError(
                f"teacher {model.name} has no linear layer in {' and '.join(parts)} that could be thinned"
            )
        self._whole: dict[str, Tensor] = {}

    @torch.no_grad()
    def to(self, share: float) -> None:
        """Leaves out this share of the weights of each matrix, the smallest by magnitude, rounded down; 0: none."""
        if share == self.share:
            return
        for name in self.names:
            weight = self.model.get_parameter(name)
            if name in self._whole:
                weight.copy_(self._whole[name])
            count = int(share * weight.numel() + 1e-9)
            if not count:
                self._whole.pop(name, None)
                continue
            self._whole.setdefault(name, weight.clone())
            sizes = weight.abs().float()
            least = sizes.flatten().kthvalue(min(count + 1, weight.numel())).values
            weight.masked_fill_(sizes < least, 0.0)
        self.share = share

"""Weightings in one line, random losses for them, and the loop that trains one alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cmapkd.weighting import WEIGHTINGS, Weighted, Weighting, make_weighting, weighting_config

ITEMS = ("P2", "P3", "P4", "P5")
DIM = 12
SETTINGS: dict[str, dict[str, Any]] = {name: {} for name in WEIGHTINGS} | {
    "manual": {"weights": {"P2": 0.5, "P3": 1.0, "P4": 0.0, "P5": 3.0}},
    "policy": {"warmup_steps": 6, "window": 3, "edge": 2},
}


def make(name: str, *, items: Sequence[str] = ITEMS, seed: int = 0, **settings: Any) -> Weighting:
    torch.manual_seed(seed)
    config = weighting_config({"name": name, **SETTINGS[name], **settings})
    widths = None if WEIGHTINGS[name].reads_gradients else [DIM // len(items)] * len(items)
    return make_weighting(config, items=items, context_dim=DIM, level_widths=widths)


def batch(size: int = 5, *, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Losses in (0, 1) and contexts."""
    draws = torch.Generator().manual_seed(seed)
    return torch.rand(size, len(ITEMS), generator=draws), torch.randn(size, DIM, generator=draws)


def weigh(weighting: Weighting, losses: Tensor, context: Tensor, active: Tensor | None = None) -> Weighted:
    """One forward; what a strategy draws comes from the process's own generator, which the tests set."""
    return weighting(losses, context, active, generator=torch.default_generator)


def step(weighting: Weighting, losses: Tensor, context: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """One step of training; the weights it used."""
    weighted = weigh(weighting, losses, context)
    optimizer.zero_grad()
    weighted.loss.backward()
    optimizer.step()
    return weighted.weights


def settled(name: str, **settings: Any) -> Weighting:
    """A weighting whose weights differ between items, and between samples where it reads the context."""
    weighting = make(name, **settings)
    draws = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in weighting.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=draws)
    for _ in range(14 if name == "policy" else 0):  # beyond its warm-up, in the middle of a window
        weighting.observe(torch.rand((), generator=draws))
        weigh(weighting, *batch(seed=3))
    return weighting


def entropy(weights: Tensor) -> Tensor:
    """Of each sample's weights as shares of one, in nats."""
    return torch.special.entr(weights / weights.sum(-1, keepdim=True)).sum(-1)

"""Parameter groups, AdamW and the learning-rate schedule as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from cmapkd.methods import Method
from cmapkd.methods.stages import ParameterPart
from cmapkd.models.parts import undecayed
from cmapkd.models.shares import is_shared_out
from cmapkd.training.config import OptimConfig

_OWN_EPS = 1e-8  # torch's own


Group = tuple[ParameterPart, bool, float | None]
"""Of a parameter: its part, whether it is decayed, and its own rate."""


def parameter_groups(method: Method) -> dict[Group, list[nn.Parameter]]:
    """What learns, by group, in the order in which checkpoints number it."""
    groups: dict[Group, list[nn.Parameter]] = {}
    left_alone = undecayed(method)
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            own = method.own_rate(name)
            decayed = own is None and parameter.ndim >= 2 and name not in left_alone
            groups.setdefault((method.part_of(name), decayed, own), []).append(parameter)
    return groups


def make_optimizer(method: Method, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the student and the method's own modules, matrices apart from vectors (which are not decayed)."""
    rates = {"student": 1.0, "modules": config.module_rate, "weighting": config.weighting_rate}
    return torch.optim.AdamW(
        [
            {
                "params": alike,
                "weight_decay": config.weight_decay if decayed else 0.0,
                "rate": rates[part],
                "own_rate": own,
                # what is no weight may have gradients far smaller than weights', as one mask of a million, and may have
                # to stop at once where a constraint is met
                "eps": config.eps if own is None else _OWN_EPS,
                "betas": config.betas if own is None else (0.0, config.betas[1]),
            }
            for (part, decayed, own), parameters in parameter_groups(method).items()
            for alike in _by_type(parameters)
        ],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def _by_type(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """One list; two where some are shared out among processes, which the fused step cannot mix with others."""
    types: dict[bool, list[nn.Parameter]] = {}
    for parameter in parameters:
        types.setdefault(is_shared_out(parameter), []).append(parameter)
    return [*types.values()]


def learning_rate(step: int, *, total: int, config: OptimConfig, peak: float | None = None) -> float:
    """Rate at `step` (0 is the first): linear warm-up, then a cosine from the peak down to `final_rate` of it.

    Args:
        peak: in place of `config.learning_rate`, for a stage with its own; the shape stays that of the whole run.
    """
    peak = peak or config.learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return peak
    progress = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return peak * (config.final_rate + (1 - config.final_rate) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Every group's rate: its multiple of this one, or its own."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate"] if group["own_rate"] is None else group["own_rate"]

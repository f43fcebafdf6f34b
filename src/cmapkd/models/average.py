"""A moving average of a model: of its weights and running statistics. Every other buffer is copied."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cmapkd.models.shares import is_shared_out


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float, *, averaged: frozenset[str] | None = None) -> None:
    """average <- decay * average + (1 - decay) * model, for parameters and for running statistics of batch norms.

    Buffers that are no statistics are copied as they are. They are constants or counters: a causal mask holds -inf,
    whose average with itself is not a number, and position ids are integers.

    Args:
        average: a copy of `model`, on the same device and, if shared out among processes, in the same way.
        decay: in [0, 1]; 0 copies the model.
        averaged: names of the parameters to average; the others, and all statistics, are copied. None: all.
    """
    mine, theirs = _floating(average), _floating(model)
    chosen = frozenset(name for name in mine if decay and (averaged is None or name in averaged))
    followed, copied = [name for name in mine if name in chosen], [name for name in mine if name not in chosen]
    if followed:
        ours, new = ([_local(tensors[name]) for name in followed] for tensors in (mine, theirs))
        torch._foreach_lerp_(ours, new, 1 - decay)
    if copied:
        ours, new = ([_local(tensors[name]) for name in copied] for tensors in (mine, theirs))
        torch._foreach_copy_(ours, new)
    known = {id(tensor) for tensor in mine.values()}
    for kept, buffer in zip(average.buffers(), model.buffers(), strict=True):
        if id(kept) not in known:
            kept.copy_(buffer)


def _local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor that is shared out; a view of the same memory."""
    return tensor.to_local() if is_shared_out(tensor) else tensor


def _floating(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and running statistics, by names that only depend on the model's structure."""
    statistics = {
        f"{path}.{name}": statistic
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        for name, statistic in (("running_mean", module.running_mean), ("running_var", module.running_var))
        if statistic is not None
    }
    return {name: parameter.detach() for name, parameter in model.named_parameters()} | statistics


class MovingAverage(nn.Module):
    """The average of a model over a run (`training.ema`). The first update copies the model.

    Args:
        model: what is averaged; copied.
        decay: weight of the past, in (0, 1).
    """

    n_averaged: Tensor

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(model)
        self.decay = decay
        self.register_buffer("n_averaged", torch.zeros((), dtype=torch.long))  # on the CPU: read at every update

    def update(self, model: nn.Module, step: int) -> None:  # noqa: ARG002  for means that take note now and then
        """Takes note of the model after an optimizer step.

        Args:
            step: optimizer steps done before the one that just ended.
        """
        follow(self.module, model, self.decay if int(self.n_averaged) else 0.0)
        self.n_averaged += 1


class RunningMean(MovingAverage):
    """The mean of a model's weights as they began and after every n-th step, all alike (`training.mean_every`).

    Args:
        model: what is averaged; copied, and that copy counts as one.
        every: steps between two that count, >= 1.
    """

    def __init__(self, model: nn.Module, every: int) -> None:
        super().__init__(model, 0.0)
        self.every = every
        self.n_averaged += 1

    def update(self, model: nn.Module, step: int) -> None:
        """Takes note of the model if this was an n-th step."""
        if (step + 1) % self.every == 0:
            number = int(self.n_averaged)
            follow(self.module, model, number / (number + 1))
            self.n_averaged += 1


def make_average(model: nn.Module, *, ema: float | None, every: int | None) -> MovingAverage | None:
    """The average that a run keeps of its student, from `training.ema` or `training.mean_every`; None without."""
    if every is not None:
        return RunningMean(model, every)
    return None if ema is None else MovingAverage(model, ema)

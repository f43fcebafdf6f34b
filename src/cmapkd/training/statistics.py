"""Running statistics of batch norms, which every process takes of its own part of the batch: one mean for all."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cmapkd.models import MomentumTeacher


class SharedStatistics:
    """Gives every process the mean of all processes' running statistics.

    The wrapper of whole methods could send the first process's buffers to all others before every forward pass. That
    costs a broadcast of every buffer, most of which are the same everywhere, and throws the other processes' statistics
    away. This exchanges the statistics alone, in one piece. Those that no process changes are left alone: of frozen
    norms, and of a momentum teacher, which follows its student.

    Args:
        method: whose batch norms are looked at, now.
    """

    def __init__(self, method: nn.Module) -> None:
        self.norms = [*_norms(method)] if dist.is_available() and dist.is_initialized() else []

    @torch.no_grad()
    def average(self) -> None:
        """After an optimizer step; every process must call it. Without batch norms, or alone, it does nothing."""
        moving = [norm for norm in self.norms if norm.momentum != 0]
        tensors = [each for norm in moving for each in (norm.running_mean, norm.running_var) if each is not None]
        if not tensors or dist.get_world_size() == 1:
            return
        whole = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(whole)
        whole /= dist.get_world_size()
        for tensor, mean in zip(tensors, whole.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def _norms(module: nn.Module) -> Iterator[_BatchNorm]:
    if isinstance(module, MomentumTeacher):
        return
    if isinstance(module, _BatchNorm):
        yield module
    for child in module.children():
        yield from _norms(child)

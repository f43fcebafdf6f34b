"""Running statistics of batch norms, which every process takes of its own part of the batch: one mean for all."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class SharedStatistics:
    """Gives every process the mean of all processes' running statistics.

    The wrapper of whole methods could send the first process's buffers to all others before every forward pass. That
    costs a broadcast of every buffer, most of which are the same everywhere, and throws the other processes' statistics
    away. This exchanges the statistics alone, in one piece.

    Args:
        method: whose batch norms are looked at, now.
    """

    def __init__(self, method: nn.Module) -> None:
        self.tensors = list(_running(method)) if dist.is_available() and dist.is_initialized() else []

    @torch.no_grad()
    def average(self) -> None:
        """After an optimizer step; every process must call it. Without batch norms, or alone, it does nothing."""
        if not self.tensors or dist.get_world_size() == 1:
            return
        whole = torch.cat([tensor.flatten() for tensor in self.tensors])
        dist.all_reduce(whole)
        whole /= dist.get_world_size()
        for tensor, mean in zip(self.tensors, whole.split([tensor.numel() for tensor in self.tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def _running(method: nn.Module) -> Iterator[Tensor]:
    for module in method.modules():
        if isinstance(module, _BatchNorm):
            yield from (each for each in (module.running_mean, module.running_var) if each is not None)

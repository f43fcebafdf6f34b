"""Gradients of a method that every process has whole: their mean over the processes, by torch's own wrapper."""

from __future__ import annotations

import gc
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cmapkd.data.types import Batch
from cmapkd.methods import Method, StepInfo, Term


class AveragedGradients:
    """Terms of a method, whose backward pass leaves the mean of all processes' gradients.

    torch's wrapper waits in the backward pass for every parameter that it knows. Where some have no gradient it must
    look for them in each step: a walk through the graph, an exchange and a wait for the device. A method that is
    `steady` needs the search in the first step of a stage alone. From then on these parameters are left out.

    On CPUs, more than two processes go on searching. Without the search the wrapper orders its buckets anew after its
    first step, and sums of three numbers depend on the order: a resumed run would end in other bits.

    Buffers are not sent: they are the same by construction, and `statistics.py` sees to batch norms.

    Args:
        method: whose weights are those of the first process from now on.
        device: where it is moved.
    """

    def __init__(self, method: Method, device: torch.device) -> None:
        self.method = method.to(device)
        self.learns_once = method.steady_in_run and (device.type != "cpu" or dist.get_world_size() == 2)
        self._without: frozenset[str] | None = None  # names of what learns and has no gradient, once that is known
        self._wrapped: nn.Module | None = None
        self._equal = False  # whether all processes have the same weights already

    def __call__(self, batch: Batch, step: StepInfo | None = None) -> dict[str, Term]:
        """The terms, see `Method.forward`."""
        if self._wrapped is None:
            self._wrapped = self._wrap()
        terms: dict[str, Term] = self._wrapped(batch, step)
        return terms

    @property
    def searches(self) -> bool:
        """Whether the next step looks for parameters without gradient."""
        return self._without is None

    def begin_stage(self) -> None:
        """Others may learn, and other terms be read, from the next step on."""
        self._without = None
        self.close()

    def close(self) -> None:
        """Lets go of the gradients: an old wrapper would go on to exchange them."""
        self._wrapped = None
        gc.collect()

    def after_backward(self) -> None:
        """Learns which parameters have no gradient, or makes sure that they are still the same.

        Raises:
            RuntimeError: the method said that it is steady, and is not.
        """
        if not self.learns_once:
            return
        learning = ((name, each) for name, each in self.method.named_parameters() if each.requires_grad)
        without = frozenset(name for name, parameter in learning if parameter.grad is None)
        if self._without is None:
            self._without = without
            self.close()
        elif without != self._without:
            kind, others = type(self.method).__name__, ", ".join(sorted(without ^ self._without)[:3])
            raise RuntimeError(
                f"{kind} is declared steady, but {others} had a gradient in one step of the stage and none in another. "
                f"Set steady = False in {kind}: then several processes look for those without gradient in each step"
            )

    def _wrap(self) -> nn.Module:
        left_out = [each for name, each in self.method.named_parameters() if name in (self._without or ())]
        for parameter in left_out:
            parameter.requires_grad_(False)  # the wrapper takes those that learn when it is made
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # later torch has another name for not sending buffers
                return DistributedDataParallel(
                    self.method,
                    find_unused_parameters=self.searches,
                    broadcast_buffers=False,
                    gradient_as_bucket_view=True,
                    init_sync=not self._equal,
                )
        finally:
            self._equal = True
            for parameter in left_out:
                parameter.requires_grad_(True)

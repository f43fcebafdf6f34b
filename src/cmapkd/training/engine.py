"""What steps a method: its wrapper, optimizer and average, whole on every process or shared out among them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cmapkd.data.types import Batch
from cmapkd.methods import Method, StepInfo, Term
from cmapkd.models import Model, MovingAverage
from cmapkd.models.average import make_average
from cmapkd.models.compiled import compile_in_place
from cmapkd.training import checkpoint as checkpoints
from cmapkd.training.config import OptimConfig, TrainConfig
from cmapkd.training.exchange import AveragedGradients
from cmapkd.training.optim import make_optimizer, parameter_groups
from cmapkd.training.processes import patient_group
from cmapkd.training.recompute import recompute_blocks
from cmapkd.training.sharding import (
    ShardedMethod,
    empty_state,
    load_sharded_optimizer,
    numbered_state,
    put_state,
    whole_tensors,
)
from cmapkd.training.shards import has_shares, read_shares, stored
from cmapkd.training.statistics import SharedStatistics


class Engine(ABC):
    """A method ready to learn. Made anew when the method exchanges its modules.

    Attributes:
        wrapped: the terms of this process's part of a batch; its backward pass takes means over all processes.
        optimizer: of what learns.
        average: of the student, if the run keeps one.
    """

    wrapped: Callable[[Batch, StepInfo], dict[str, Term]]
    optimizer: torch.optim.Optimizer
    average: MovingAverage | None

    def __init__(self, method: Method) -> None:
        self.method = method

    def enter_stage(self) -> None:  # noqa: B027  nothing to do is a right answer
        """Called when the method has entered a stage."""

    def close(self) -> None:  # noqa: B027
        """Called when the method goes on with another engine."""

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss, a mean over all processes."""
        loss.backward()

    def update(self, step: StepInfo, finite: Tensor) -> None:
        """The optimizer's step, and everything that follows the weights.

        Args:
            finite: Bool scalar on the device: whether loss and gradient are numbers. Nobody waits for it here.
        """
        self._optimize(finite)
        self.optimizer.zero_grad(set_to_none=True)
        self.statistics.average()
        self.method.after_step(step)
        if self.average is not None:
            self.average.update(self.method.student, step.step)

    def _optimize(self, finite: Tensor) -> None:  # noqa: ARG002  the run stops at the next look in any case
        self.optimizer.step()

    @abstractmethod
    def clip(self, max_norm: float) -> Tensor:
        """The norm of the whole gradient, which is scaled down to `max_norm`; a scalar, read by nobody here."""

    @property
    @abstractmethod
    def student(self) -> Model:
        """The student as it would be saved now; every process must ask for it, and the first has it whole."""

    def release(self, student: Model) -> None:  # noqa: B027  nothing to do is a right answer
        """Called when `student` has been measured."""

    @abstractmethod
    def state(self) -> dict[str, dict[str, Tensor]]:
        """Method, optimizer and average as a checkpoint holds them, whole; every process must ask for it."""

    @abstractmethod
    def load(self, tensors: Mapping[str, dict[str, Tensor]]) -> None:
        """Puts back what either kind of engine gave."""

    def read(self, path: Path) -> None:
        """Puts back what a checkpoint holds, of either kind of engine and in either form; every process must call it.

        Raises:
            ValueError: the checkpoint is of another method or student.
        """
        self.load(checkpoints.read_tensors(path))

    def own_shares(self) -> dict[str, dict[str, Any]]:
        """As `state`, where what is shared out are DTensors with this process's share alone."""
        return self.state()

    @property
    def statistics(self) -> SharedStatistics:
        """Of the batch norms, over all processes."""
        if self._statistics is None:
            self._statistics = SharedStatistics(self.method)
        return self._statistics

    _statistics: SharedStatistics | None = None


class WholeEngine(Engine):
    """Every process has all weights."""

    def __init__(self, method: Method, config: TrainConfig, optim: OptimConfig, accelerator: Accelerator) -> None:
        super().__init__(method)
        device, several = accelerator.device, accelerator.num_processes > 1
        self.averaged = AveragedGradients(method, device) if several else None
        self.wrapped = self.averaged or method.to(device)
        self.optimizer = make_optimizer(method, optim)
        method.second_moment = self._second_moment
        self.average = make_average(method.student, ema=config.ema, every=config.mean_every)
        self.compiled = config.compile

    def enter_stage(self) -> None:
        if self.compiled:  # graphs of other stages count, and torch makes no more than a few
            torch.compiler.reset()
        if self.averaged is not None:
            self.averaged.begin_stage()

    def close(self) -> None:
        if self.averaged is not None:
            self.averaged.close()

    def backward(self, loss: Tensor) -> None:
        super().backward(loss)
        if self.averaged is not None:
            self.averaged.after_backward()

    def _second_moment(self, parameter: nn.Parameter) -> Tensor | None:
        """The optimizer's running mean of the squared gradient; None before its first step."""
        moment: Tensor | None = self.optimizer.state.get(parameter, {}).get("exp_avg_sq")
        return moment

    def _optimize(self, finite: Tensor) -> None:
        # the fused kernel leaves the weights as they are where this flag of gradient scalers is 1, on the device
        self.optimizer.found_inf = 1.0 - finite.float()  # type: ignore[attr-defined]
        self.optimizer.step()

    def clip(self, max_norm: float) -> Tensor:
        norm: Tensor = torch.nn.utils.clip_grad_norm_(self.method.parameters(), max_norm)
        return norm

    @property
    def student(self) -> Model:
        student = self.method.student if self.average is None else self.average.module
        assert isinstance(student, Model)
        return student

    def state(self) -> dict[str, dict[str, Tensor]]:
        tensors = {"method": self.method.state_dict(), "optimizer": checkpoints.optimizer_tensors(self.optimizer)}
        return tensors | ({"average": self.average.state_dict()} if self.average is not None else {})

    def load(self, tensors: Mapping[str, dict[str, Tensor]]) -> None:
        self.method.load_state_dict(tensors["method"])
        checkpoints.load_optimizer(self.optimizer, tensors["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(tensors["average"])


class SharedEngine(Engine):
    """Every process has a share of the weights (`training.sharding: fsdp2`)."""

    def __init__(self, method: Method, config: TrainConfig, optim: OptimConfig, accelerator: Accelerator) -> None:
        super().__init__(method)
        self.shares = ShardedMethod(
            method,
            device=accelerator.device,
            teachers=config.shard_teacher,
            ema=config.ema,
            mean_every=config.mean_every,
        )
        self.wrapped, self.average = self.shares, self.shares.average
        self.optimizer = make_optimizer(method, optim)
        # before a stage freezes any: in the order in which checkpoints number what an optimizer knows of them
        self._numbered = [parameter for group in parameter_groups(method).values() for parameter in group]

    def clip(self, max_norm: float) -> Tensor:
        self.shares.average_gradients()
        return self.shares.clip(max_norm)

    @property
    def student(self) -> Model:
        return self.shares.student()

    def release(self, student: Model) -> None:
        student.cpu()  # the device has no room for a whole copy beside the shares

    def state(self) -> dict[str, dict[str, Tensor]]:
        return {name: whole_tensors(tensors) for name, tensors in self.own_shares().items()}

    def own_shares(self) -> dict[str, dict[str, Any]]:
        optimizer = numbered_state(self.optimizer, self._numbered)
        tensors: dict[str, dict[str, Any]] = {"method": self.method.state_dict(), "optimizer": optimizer}
        return tensors | ({"average": self.average.state_dict()} if self.average is not None else {})

    def load(self, tensors: Mapping[str, dict[str, Tensor]]) -> None:
        self.shares.load(tensors["method"])
        load_sharded_optimizer(self.optimizer, self._numbered, tensors["optimizer"])
        if self.average is not None:
            self.shares.load_average(tensors["average"])

    def read(self, path: Path) -> None:
        """No process ever holds more than its shares where the checkpoint was written so."""
        if not has_shares(path):
            super().read(path)
            return
        shares = self.own_shares()
        known = {
            name.removeprefix("optimizer/"): (entry.size, entry.properties.dtype)
            for name, entry in stored(path).items()
            if name.startswith("optimizer/")
        }
        shares["optimizer"] = empty_state(known, self._numbered)
        read_shares(path, shares, patient_group())
        self.method.load_state_dict(shares["method"])
        put_state(self.optimizer, self._numbered, shares["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(shares["average"])


def make_engine(method: Method, config: TrainConfig, optim: OptimConfig, accelerator: Accelerator) -> Engine:
    """The engine that the config asks for; one process alone has everything whole."""
    if config.activation_checkpointing:
        recompute_blocks(method, config.stages or method.default_stages)
    if config.compile:
        compile_in_place(method.student)
    shared = config.sharding == "fsdp2" and accelerator.num_processes > 1
    kind = SharedEngine if shared else WholeEngine
    return kind(method, config, optim, accelerator)

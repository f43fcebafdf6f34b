"""FSDP2: every process holds a share of the weights, gradients and optimizer state (`training.sharding: fsdp2`).

`torch.distributed.fsdp.fully_shard` directly: Accelerate's plugin does nothing on CPUs, where the equality with one
process is tested, and has no way around parameters of a single number, which cannot be shared out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cmapkd.data.types import Batch
from cmapkd.methods import Method, StepInfo, Term
from cmapkd.models import Model, MomentumTeacher, Teacher
from cmapkd.models.average import make_average
from cmapkd.models.joined import JoinedEncoder
from cmapkd.models.shares import is_shared_out


class ShardedMethod:
    """A method whose student and modules are shared out among all processes, in place.

    The method is one group, which is whole from its forward pass to the end of its backward pass; each block of a tower
    is a group of its own, which is whole while it computes. Names of weights stay as they are, so stages, parameter
    groups and checkpoints know nothing of it: what is written is whole, and any number of processes can go on from it.
    Numbers that stand alone (logit scales) are on every process.

    Args:
        device: where the shares are; the method is moved there, from the weights of the first process.
        teachers: whether the live teachers are shared out, too.
        ema, mean_every: of an averaged student, see `make_average`.
    Raises:
        ValueError: a teacher shall be shared out whose text tower the student has.
    """

    def __init__(
        self,
        method: Method,
        *,
        device: torch.device,
        teachers: bool,
        ema: float | None,
        mean_every: int | None = None,
    ) -> None:
        self.method = method
        self.mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        whole = copy.deepcopy(method.student)
        self._whole = whole if dist.get_rank() == 0 else whole.to("meta")  # others only take part in filling it
        if teachers:
            for teacher in method.teachers.values():
                self._shard_teacher(teacher)
        method.to(device)
        _broadcast(method)
        self.average = make_average(method.student, ema=ema, every=mean_every)
        if self.average is not None:
            shard(self.average.module, self.mesh)
        shard(method, self.mesh)

    def __call__(self, batch: Batch, step: StepInfo | None = None) -> dict[str, Term]:
        terms: dict[str, Term] = self.method(batch, step)
        return terms

    def average_gradients(self) -> None:
        """After the backward pass: of the numbers that every process has, the mean of what all found."""
        for parameter in self.method.parameters():
            if parameter.grad is not None and not is_shared_out(parameter):
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.mesh.size()

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """The norm of the whole gradient, which is scaled down to `max_norm`, as `torch.nn.utils.clip_grad_norm_`."""
        gradients = [parameter.grad for parameter in self.method.parameters() if parameter.grad is not None]
        own = [gradient.to_local() for gradient in gradients if is_shared_out(gradient)]
        common = [gradient for gradient in gradients if not is_shared_out(gradient)]
        squares = _squares(own, like=gradients[0])
        dist.all_reduce(squares)
        norm = (squares + _squares(common, like=gradients[0])).sqrt()
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in (*own, *common):
            gradient.mul_(factor)
        return norm

    def student(self) -> Model:
        """The student as it would be saved now, whole, on the first process's CPU; every process must ask for it."""
        source = self.method.student if self.average is None else self.average.module
        tensors = whole_tensors(source.state_dict())
        if dist.get_rank() == 0:
            self._whole.cpu().load_state_dict(tensors)
        return self._whole

    def load(self, tensors: Mapping[str, Any]) -> None:
        """Gives the method its shares of whole tensors."""
        self.method.load_state_dict(shared_like(tensors, self.method.state_dict()))

    def load_average(self, tensors: Mapping[str, Any]) -> None:
        """Likewise the average."""
        assert self.average is not None
        self.average.load_state_dict(shared_like(tensors, self.average.state_dict()))

    def _shard_teacher(self, teacher: Teacher) -> None:
        # a momentum teacher is shared out as the method is, so that it can follow the student share by share
        if teacher.from_disk or isinstance(teacher, MomentumTeacher):
            return
        if isinstance(self.method.student, JoinedEncoder):
            raise ValueError(
                "training.shard_teacher is set, but this student's text tower is the teacher's, and is saved and "
                "evaluated whole: leave it off"
            )
        teacher.to(self.mesh.device_type)
        shard(teacher.model, self.mesh, keep_root=False)


def shard(module: nn.Module, mesh: DeviceMesh, *, keep_root: bool = True) -> None:
    """Shares out a module's weights: its blocks each for itself, then the rest.

    Args:
        keep_root: the rest stays whole between forward and backward pass; for what has no backward pass it need not.
    """
    from torch.distributed.fsdp import fully_shard  # as long to import as all of this package

    alone = {parameter for parameter in module.parameters() if parameter.numel() == 1}
    for block in blocks(module):
        fully_shard(block, mesh=mesh, ignored_params=alone)
    fully_shard(module, mesh=mesh, ignored_params=alone, reshard_after_forward=not keep_root)


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost elements of lists and sequences that are made of several layers: a transformer's blocks."""
    for child in module.children():
        for inner in child.children() if isinstance(child, (nn.ModuleList, nn.Sequential)) else ():
            if _is_block(inner):
                yield inner
            else:
                yield from blocks(inner)
        if not isinstance(child, (nn.ModuleList, nn.Sequential)):
            yield from blocks(child)


def _is_block(module: nn.Module) -> bool:
    layers = [child for child in module.children() if any(True for _ in child.parameters())]
    return len(layers) > 1 and not isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential))


@torch.no_grad()
def whole_tensors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """With every share put together, on the CPU; every process must call it, with the same names."""
    return {name: value.full_tensor().cpu() if is_shared_out(value) else value for name, value in tensors.items()}


def shared_like(tensors: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """This process's shares of whole tensors, where `like` has shares."""
    return {name: _shared(value, like.get(name)) for name, value in tensors.items()}


def _shared(value: Any, like: Any) -> Any:
    if not is_shared_out(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    there = value.to(device=like.device, dtype=like.dtype)
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)  # each takes its own


def numbered_state(optimizer: torch.optim.Optimizer, order: Sequence[nn.Parameter]) -> dict[str, Any]:
    """An optimizer's state as `checkpoint.optimizer_tensors` names it, parameters numbered in this order, in shares."""
    return {
        f"{number}.{name}": torch.as_tensor(value) if not isinstance(value, Tensor) else value
        for number, parameter in enumerate(order)
        for name, value in optimizer.state.get(parameter, {}).items()
    }


def empty_state(
    sizes: Mapping[str, tuple[torch.Size, torch.dtype]], order: Sequence[nn.Parameter]
) -> dict[str, Tensor]:
    """Room for such a state, as `numbered_state` names it: shared out as its parameter is, where it has its shape.

    Raises:
        ValueError: it is not of these parameters.
    """
    room = {}
    for key, (size, dtype) in sizes.items():
        like = _owner(key, size, order)
        room[key] = (
            torch.empty_like(like, dtype=dtype, requires_grad=False)
            if size == like.shape
            else torch.empty(size, dtype=dtype, device=like.device)
        )
    return room


def _owner(key: str, size: torch.Size, order: Sequence[nn.Parameter]) -> nn.Parameter:
    """The parameter that an entry of an optimizer's state belongs to: it has its shape, or is one number, as a count of
    steps."""
    number = int(key.partition(".")[0])
    if number < len(order) and size in (order[number].shape, torch.Size()):
        return order[number]
    here = f"of shape {tuple(order[number].shape)}" if number < len(order) else "not there"
    raise ValueError(
        f"the optimizer state of parameter {number} in the checkpoint is of shape {tuple(size)}, and the parameter is "
        f"{here} in this run: resume with the settings that the run was started with"
    )


def put_state(optimizer: torch.optim.Optimizer, order: Sequence[nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Gives the optimizer what `numbered_state` found."""
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        optimizer.state[order[int(number)]][name] = value


def load_sharded_optimizer(
    optimizer: torch.optim.Optimizer, order: Sequence[nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Likewise from whole tensors."""
    shares = {}
    for key, value in tensors.items():
        parameter = _owner(key, value.shape, order)
        like = parameter if value.shape == parameter.shape else None
        shares[key] = _shared(value.to(parameter.device), like)
    put_state(optimizer, order, shares)


def _broadcast(module: nn.Module) -> None:
    """The first process's weights and buffers to all, as the wrapper of whole ones does."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.numel() and tensor.dtype != torch.bool:  # masks are constants, and gloo sends none
            dist.broadcast(tensor.detach(), 0)


def _squares(gradients: Iterable[Tensor], *, like: Tensor) -> Tensor:
    total = torch.zeros((), device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
    for gradient in gradients:
        total += gradient.to(total.dtype).square().sum()
    return total

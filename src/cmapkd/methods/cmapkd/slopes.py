"""How fast a step on each level and term lowers a loss on held-out pairs: slopes along its gradient, and norms."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from cmapkd.features import mean_over_processes
from cmapkd.objectives.common import at_least_float32

Direction = Mapping[str, Tensor]  # by the name of the student's parameter, of its shape
Columns = dict[str, Tensor]  # losses as they count, by level or term: Float[batch], or one number
SecondMoment = Callable[[nn.Parameter], Tensor | None]
Answer = TypeVar("Answer")
_STEP = 3e-4  # of a difference in float32: shorter ones drown in rounding, longer ones see the curvature


class Asked(nn.Module, Generic[Answer]):
    """What is computed with a student, as a module: its parameters can then be exchanged for a call.

    Args:
        question: of nothing: losses of a batch, or a gradient, with the student's present parameters.
    """

    def __init__(self, student: nn.Module, question: Callable[[], Answer]) -> None:
        super().__init__()
        self.student, self.question = student, question

    def forward(self) -> Answer:
        return self.question()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """In eval mode, float32, and the attention that has derivatives of every kind; modes are put back.

    The fast path of `nn.MultiheadAttention`, which open_clip's blocks take in eval mode, has no forward mode.
    """
    training = [(each, each.training) for each in module.modules()]
    module.eval()
    device = next(module.parameters()).device.type
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.autocast(device, enabled=False), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for each, mode in training:
            each.training = mode


def learning(student: nn.Module) -> dict[str, nn.Parameter]:
    """The student's parameters that learn, by name."""
    return {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}


def gradient(loss: Float[Tensor, ""], student: nn.Module, *, keep: bool = False) -> Direction:
    """Of a loss over all processes' samples by what learns of the student; the same on every process.

    Args:
        keep: whether the graph is needed again.
    """
    return gradient_by(loss, learning(student), keep=keep)


def gradient_by(loss: Float[Tensor, ""], parameters: Mapping[str, Tensor], *, keep: bool = False) -> Direction:
    """The same by tensors that stand in for the student's parameters."""
    parts: tuple[Tensor | None, ...] = (None,) * len(parameters)
    if loss.requires_grad:
        parts = torch.autograd.grad(loss, [*parameters.values()], retain_graph=keep, allow_unused=True)
    found = [torch.zeros_like(p) if g is None else g for g, p in zip(parts, parameters.values(), strict=True)]
    flat = mean_over_processes(torch.cat([at_least_float32(each.flatten()) for each in found]))
    pieces = flat.split([each.numel() for each in found])
    return {name: piece.view_as(p) for piece, (name, p) in zip(pieces, parameters.items(), strict=True)}


def preconditioned(direction: Direction, student: nn.Module, second_moment: SecondMoment, *, eps: float) -> Direction:
    """The direction as AdamW would step along it: divided by the root of its second moments; as it is before any step.

    The moments' correction for their start is one factor for all parameters, and no weight depends on it.
    """
    parameters = learning(student)
    moments = {name: second_moment(parameters[name]) for name in direction}
    return {
        name: each if (moment := moments[name]) is None else each / (moment.sqrt() + eps)
        for name, each in direction.items()
    }


def gradient_at(
    loss: Callable[[], Float[Tensor, ""]], student: nn.Module, parameters: Mapping[str, Tensor]
) -> Direction:
    """Of a loss by what learns of the student, with other values in place of its parameters' own.

    The gradient is taken before the own ones are put back, as micro-batches are computed a second time in it.

    Args:
        loss: of nothing, over all processes' samples, with the student's present parameters.
        parameters: the values, by name.
    """
    leaves = {name: each.detach().clone().requires_grad_() for name, each in parameters.items()}
    moved = {f"student.{name}": leaf for name, leaf in leaves.items()}
    found: Direction = functional_call(Asked(student, lambda: gradient_by(loss(), leaves)), moved, ())
    return found


def length_of(direction: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """Of all parts as one vector."""
    length: Tensor = torch.stack([each.detach().norm() for each in direction.values()]).norm()
    return length


@torch.no_grad()
def slopes_forward(student: nn.Module, columns: Callable[[], Columns], direction: Direction) -> Columns:
    """d/dε of each loss at the student's parameters + ε · direction, in one pass of forward-mode derivatives.

    Returns:
        Shapes as the losses have them: the slope of every sample's loss of every level.
    """
    parameters = learning(student)
    with forward_ad.dual_level():
        with warnings.catch_warnings():  # of torch about itself, when it first needs forward mode
            warnings.filterwarnings("ignore", r".*torch\.jit\.script.* is deprecated", FutureWarning)
            moved = {
                f"student.{name}": forward_ad.make_dual(parameters[name].detach(), along.to(parameters[name]))
                for name, along in direction.items()
            }
        found = functional_call(Asked(student, columns), moved, ())
        slopes: Columns = {}
        for name, loss in found.items():
            value, tangent = forward_ad.unpack_dual(loss)
            slopes[name] = torch.zeros_like(value) if tangent is None else tangent.clone()
    return slopes


@torch.no_grad()
def slopes_by_difference(
    student: nn.Module, columns: Callable[[], Columns], direction: Direction, *, step: float = _STEP
) -> Columns:
    """The same by a central difference: two forward passes, with an error of the order of the step's square.

    Args:
        step: the length of the parameters' move, as a share of their own length.
    """
    parameters = learning(student)
    move = float(step * length_of(parameters) / length_of(direction).clamp_min(1e-30))

    def at(by: float) -> Columns:
        moved = {
            f"student.{name}": parameters[name].detach() + by * along.to(parameters[name])
            for name, along in direction.items()
        }
        found: Columns = functional_call(Asked(student, columns), moved, ())
        return found

    ahead, behind = at(move), at(-move)
    return {name: (ahead[name] - behind[name]) / (2 * move) for name in ahead}


def norms_of(student: nn.Module, columns: Mapping[str, Tensor]) -> dict[str, float]:
    """The norm of the gradient of each loss's mean by what learns of the student; one backward pass for each."""
    norms = [length_of(gradient(loss.mean(), student, keep=True)) for loss in columns.values()]
    return dict(zip(columns, torch.stack(norms).tolist(), strict=True))

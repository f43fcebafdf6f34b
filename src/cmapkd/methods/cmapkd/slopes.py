"""How fast a step on each level and term lowers a loss on held-out pairs: slopes along its gradient, and norms."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

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
_STEP = 3e-4  # of a difference in float32: shorter ones drown in rounding, longer ones see the curvature


class Counted(nn.Module):
    """A method's losses as they count, as a module: its parameters can then be exchanged for a call.

    Args:
        method: with a student.
        columns: of nothing: the losses of a batch, with the method's present parameters.
    """

    def __init__(self, student: nn.Module, columns: Callable[[], Columns]) -> None:
        super().__init__()
        self.student, self.columns = student, columns

    def forward(self) -> Columns:
        return self.columns()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """In eval mode, float32, and the attention that has derivatives of every kind; modes are put back."""
    training = [(each, each.training) for each in module.modules()]
    module.eval()
    device = next(module.parameters()).device.type
    try:
        with torch.autocast(device, enabled=False), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
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
    parameters = learning(student)
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
        found = functional_call(Counted(student, columns), moved, ())
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
    length = torch.stack([each.norm() for each in direction.values()]).norm()
    own = torch.stack([each.norm() for each in parameters.values()]).norm()
    move = float(step * own / length.clamp_min(1e-30))

    def at(by: float) -> Columns:
        moved = {
            f"student.{name}": parameters[name].detach() + by * along.to(parameters[name])
            for name, along in direction.items()
        }
        found: Columns = functional_call(Counted(student, columns), moved, ())
        return found

    ahead, behind = at(move), at(-move)
    return {name: (ahead[name] - behind[name]) / (2 * move) for name in ahead}


def norms_of(student: nn.Module, columns: Mapping[str, Tensor]) -> dict[str, float]:
    """The norm of the gradient of each loss's mean by what learns of the student; one backward pass for each."""
    norms = [
        torch.stack([each.norm() for each in gradient(loss.mean(), student, keep=True).values()]).norm()
        for loss in columns.values()
    ]
    return dict(zip(columns, torch.stack(norms).tolist(), strict=True))

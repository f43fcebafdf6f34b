"""A learned or fixed weighting on top of a method's terms, and the gradients that some weightings measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmapkd.features import mean_over_processes
from cmapkd.methods.terms import Term
from cmapkd.objectives.common import at_least_float32
from cmapkd.weighting import Weighting


def weighted_terms(
    weighting: Weighting,
    terms: Mapping[str, Term],
    names: tuple[str, ...],
    *,
    shared: Callable[[], Mapping[str, nn.Parameter]] | None,
    generator: torch.Generator,
) -> tuple[dict[str, Term], dict[str, Float[Tensor, ""]]]:
    """One term that counts, the weighted sum named `weighted`, and the others with weight 0 for the log.

    Args:
        terms: of this step, each a mean over all processes.
        names: of all terms that the weighting was made for, in its order; a stage may lack some.
        shared: the layers at which gradients of different terms can be compared; asked only when the weighting measures
            them in this step. None: the method does not train, so nothing is observed.
        generator: what a weighting that draws takes its numbers from, the same in every process.
    Returns:
        The terms, and what is worth logging.
    """
    columns = {name: term.weight * at_least_float32(term.value) for name, term in terms.items()}
    total = torch.stack([*columns.values()]).sum()
    if shared is not None:
        weighting.observe(total.detach())
        if torch.is_grad_enabled() and weighting.wants_gradients:
            measure_gradients(weighting, columns, names, shared())
    losses = torch.stack([columns.get(name, torch.zeros_like(total)) for name in names])[None]
    present = torch.tensor([name in columns for name in names])  # on the CPU, where the question below costs nothing
    context = torch.zeros(1, 1, device=total.device)
    weighted = weighting(losses, context, None if bool(present.all()) else present, generator=generator)
    log = {f"terms/{name}": value for name, value in weighted.log.items()}
    shown = {name: Term(term.value.detach(), 0.0) for name, term in terms.items()}
    return shown | {"weighted": Term(weighted.loss)}, log


def measure_gradients(
    weighting: Weighting,
    columns: Mapping[str, Float[Tensor, ""]],
    names: tuple[str, ...],
    shared: Mapping[str, nn.Parameter],
) -> None:
    """Tells the weighting the norm of each term's gradient at the layers that the terms share.

    Raises:
        ValueError: a term does not depend on these layers.
    """
    learning = {name: weights for name, weights in shared.items() if weights.requires_grad}
    if not learning:  # the student does not learn in this stage
        return
    present = [name for name in names if name in columns]
    gradients = torch.stack([gradient_of(name, columns[name], learning) for name in present])
    norms = mean_over_processes(at_least_float32(gradients)).norm(dim=-1)  # the wrapper takes means of gradients, too
    none = norms.new_zeros(())
    norm_of = dict(zip(present, norms, strict=True))
    losses = torch.stack([columns[name].detach().to(norms.dtype) if name in columns else none for name in names])
    active = torch.tensor([name in columns for name in names]).to(norms.device, non_blocking=True)
    weighting.observe_gradients(losses, torch.stack([norm_of.get(name, none) for name in names]), active)


def gradient_of(name: str, value: Float[Tensor, ""], shared: Mapping[str, nn.Parameter]) -> Float[Tensor, " numbers"]:
    """A term's gradient at the shared layers as one vector [numbers]; the graph stays whole.

    A gradient of zeros is not refused: a term may be at its least, and a batch without pictures has nothing to see.
    Sums with a count are divided together (`divided`), so one that the layers do not change has zeros, too.

    Raises:
        ValueError: the term does not depend on them.
    """
    gradients: tuple[Tensor | None, ...] = (None,)
    if value.requires_grad:
        gradients = torch.autograd.grad(value, [*shared.values()], retain_graph=True, allow_unused=True)
    if all(gradient is None for gradient in gradients):
        raise ValueError(
            f"term {name} has no gradient at {', '.join(shared)}, where the weighting of the terms measures it: leave "
            "the term out of the weighted terms, or choose another term_weighting"
        )
    pairs = zip(gradients, shared.values(), strict=True)
    return torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for g, w in pairs])

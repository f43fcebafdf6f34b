"""Loss terms: what a method returns for a batch, and the terms that a run adds to those of its method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmapkd.data.batches import Extra
from cmapkd.data.types import Batch
from cmapkd.features import gather_rows
from cmapkd.models import DualEncoder
from cmapkd.objectives.common import at_least_float32


class Term(NamedTuple):
    """One part of the loss: its raw value and how much it counts. The trainer sums weight × value.

    Attributes:
        value: a scalar. Without `count` the mean over the whole batch of all processes. With `count` the *sum* over
            this process's part of the batch.
        weight: factor of the value in the loss, no unit.
        count: how many things this process has summed (tokens, boxes, labelled samples), a scalar without gradient.
            `divided` makes the mean over all processes of it, once.

    A tuple, because a wrapper that shards a method looks for tensors in what the method returns.
    """

    value: Tensor
    weight: float = 1.0
    count: Tensor | None = None  # type: ignore[assignment]  # tuples have a method of that name, which nobody needs


def total_loss(terms: Mapping[str, Term]) -> Float[Tensor, ""]:
    """The loss: the sum of weight times value, in float32, over terms that are means already (`divided`)."""
    return torch.stack([term.weight * term.value.float() for term in terms.values()]).sum()


def divided(terms: Mapping[str, Term]) -> dict[str, Term]:
    """The terms with every sum divided by the count of all processes; a sum over nothing is 0.

    The mean over processes of means would weigh a process with few things like one with many. All sums travel in one
    exchange, so processes that have different things to sum meet in the same order. Every process must have the same
    terms with a count.
    """
    counted = [name for name, term in terms.items() if term.count is not None]
    if not counted:
        return dict(terms)
    pairs = [torch.stack(_widest(terms[name])) for name in counted]
    wide = max((pair.dtype for pair in pairs), key=lambda dtype: dtype.itemsize)
    rows = torch.stack([pair.to(wide) for pair in pairs])
    if torch.is_grad_enabled() and not rows.requires_grad:
        rows.requires_grad_()  # a process with nothing to sum must meet the others in the backward pass, too
    totals = gather_rows(rows[None]).sum(0)  # [terms, 2]
    means = {
        name: Term(total / torch.where(number > 0, number, 1.0).detach(), terms[name].weight)
        for name, (total, number) in zip(counted, totals, strict=True)
    }
    return {name: means.get(name, term) for name, term in terms.items()}


def _widest(term: Term) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """A term's sum and count in one type, float32 at least."""
    assert term.count is not None
    total = at_least_float32(term.value)
    return total, term.count.detach().to(device=total.device, dtype=total.dtype, non_blocking=True)


class AuxiliaryTerms(nn.Module, ABC):
    """Terms of the student that a run adds to those of its method, whichever method it is, and their modules."""

    term_names: tuple[str, ...]
    measurements: dict[str, Tensor]
    """What the last step is worth logging besides the terms."""

    @property
    def extras(self) -> Mapping[str, Extra]:
        """What batches must bring for these terms, see `BatchBuilder`."""
        return {}

    @abstractmethod
    def forward(
        self, student: DualEncoder, batch: Batch, *, micro_batch: int | None, wants: Callable[[str], bool]
    ) -> dict[str, Term]:
        """The terms among `term_names` that are wanted; sums with a count, or means over all processes.

        Args:
            micro_batch: samples encoded at once; None: all.
        """

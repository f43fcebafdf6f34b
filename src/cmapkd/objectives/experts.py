"""Several networks that tell the same classes: learning from each other, from a chosen one, and choosing evenly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cmapkd.objectives.common import at_least_float32
from cmapkd.objectives.divergence import check_temperature, row_divergences


def mutual_divergence(
    logits: Sequence[Float[Tensor, "batch classes"]], *, temperature: float = 1.0
) -> Float[Tensor, ""]:
    """KL between every two networks, in both directions, times temperature squared; both sides get a gradient.

    Args:
        logits: of each network, of the same samples and classes.
        temperature: divides all logits; > 0.
    Returns:
        Sum over ordered pairs of networks, batch mean, in nats, >= 0; float32 or wider.
    Raises:
        ValueError: the shapes differ, there are fewer than two networks, or the temperature is not positive.
    Source: Li et al. 2025, arXiv:2507.07015, the first stage of its code.
    """
    shapes = [tuple(each.shape) for each in logits]
    if len(shapes) < 2 or len(set(shapes)) != 1 or len(shapes[0]) != 2:
        raise ValueError(f"expected [batch, classes] of two networks or more, all alike, got {shapes}")
    check_temperature(temperature)
    pairs = [(one, other) for one in range(len(logits)) for other in range(len(logits)) if one != other]
    values = [row_divergences(logits[one], logits[other], temperature=temperature).mean() for one, other in pairs]
    return torch.stack(values).sum()


def routed_divergence(
    student_logits: Float[Tensor, "batch classes"],
    expert_logits: Float[Tensor, "batch experts classes"],
    chosen: Int[Tensor, "batch chosen"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """KL(expert || student) of the experts that are chosen for each sample, times temperature squared.

    Args:
        expert_logits: detached here.
        chosen: places of the experts, one or more of each sample.
        temperature: divides all logits; > 0.
    Returns:
        Mean over samples and chosen experts in nats, >= 0; float32 or wider.
    Raises:
        ValueError: the shapes do not fit, or the temperature is not positive.
    Source: Li et al. 2025, arXiv:2507.07015, section 3 (instance-level routing).
    """
    batch, classes = student_logits.shape
    if expert_logits.shape[::2] != (batch, classes) or chosen.shape[:1] != (batch,) or chosen.ndim != 2:
        raise ValueError(
            f"student_logits has shape {tuple(student_logits.shape)}, expert_logits {tuple(expert_logits.shape)} and "
            f"chosen {tuple(chosen.shape)}: expected [batch, classes], [batch, experts, classes] and [batch, chosen]"
        )
    check_temperature(temperature)
    picked = expert_logits.detach().gather(1, chosen[:, :, None].expand(-1, -1, classes))
    own = student_logits[:, None].expand_as(picked)
    return row_divergences(own, picked, temperature=temperature).mean()


def balance_divergence(probabilities: Float[Tensor, "batch experts"]) -> Float[Tensor, ""]:
    """KL(uniform || mean of the batch), divided by the number of experts, as the published code does.

    Args:
        probabilities: how likely each expert is chosen for each sample; rows sum to 1.
    Returns:
        Nats, >= 0, zero where all experts are as likely on average; float32 or wider.
    Raises:
        ValueError: it is no [batch, experts].
    Source: Li et al. 2025, arXiv:2507.07015, load_balancing_loss of its code.
    """
    if probabilities.ndim != 2:
        raise ValueError(f"probabilities has shape {tuple(probabilities.shape)}: expected [batch, experts]")
    mean = at_least_float32(probabilities).mean(0)
    uniform = torch.full_like(mean, 1 / len(mean))
    return F.kl_div(mean.log(), uniform, reduction="sum") / len(mean)

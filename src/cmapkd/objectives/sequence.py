"""Log-probabilities of whole answers, and losses that prefer one answer to another by them.

A sequence's log-probability is the sum over its tokens. Log-ratios are those of a student less those of a reference,
which is the teacher in LLaVA-MoD and the student's own beginning in DPO.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from cmapkd.objectives.chunks import by_rows
from cmapkd.objectives.common import at_least_float32
from cmapkd.objectives.vocabulary import Head, chunk_of_tokens

PreferenceForm = Literal["kto_pair", "dpo"]


def target_log_probs(
    hidden: Float[Tensor, "rows width"], head: Head, targets: Int[Tensor, " rows"], *, chunk: int | None = None
) -> Float[Tensor, " rows"]:
    """log q of each target under the softmax over all tokens, in nats; float32 or wider.

    Args:
        hidden: final states; row i predicts `targets[i]`.
        head: a `LogitHead`, which makes logits of states.
        chunk: rows whose logits exist at a time; None: 64 MiB of logits, but at least 128 rows.
    Raises:
        ValueError: there is not one target for each row.
    """
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets have shape {tuple(targets.shape)}, but there are {len(hidden)} rows of states")

    def of_rows(states: Tensor, tokens: Tensor) -> Tensor:
        return -F.cross_entropy(at_least_float32(head(states)), tokens.long(), reduction="none")  # type: ignore[operator]

    return by_rows(of_rows, hidden, targets, size=chunk_of_tokens(len(hidden), len(head.weight), chunk))


def sums_by_sample(
    values: Float[Tensor, " rows"], sample: Int[Tensor, " rows"], number: int
) -> Float[Tensor, " number"]:
    """The sum of each sample's values; 0 of one that has none.

    Args:
        sample: whose each value is, from 0 to `number` - 1.
    """
    return torch.zeros(number, dtype=values.dtype, device=values.device).index_add(0, sample, values)


def preference_loss(
    chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"], *, form: PreferenceForm, beta: float
) -> Float[Tensor, ""]:
    """How little the student prefers the chosen answers to the rejected ones, by log-ratios of whole answers.

    With r+ and r- the two log-ratios of a pair, and the means over all pairs,

    | form | loss of a pair | source |
    | --- | --- | --- |
    | dpo | -log sigmoid(beta (r+ - r-)) | Rafailov et al. 2023, arXiv:2305.18290, equation 7 |
    | kto_pair | 1 - (sigmoid(beta (r+ - max(0, mean r-))) + sigmoid(beta (max(0, mean r+) - r-))) / 2 | LLaVA-MoD |

    Both means have a gradient, as in LLaVA-MoD's code. At equal log-ratios of zero, `dpo` is log 2 and `kto_pair` 1/2.

    Args:
        chosen, rejected: log-probabilities of the student less those of the reference, in nats.
        beta: how fast the loss saturates; > 0.
    Returns:
        The mean over pairs, > 0; `kto_pair` < 1.
    Raises:
        ValueError: the shapes differ, there are no pairs, or a setting is out of range.
    Source: LLaVA-MoD, arXiv:2408.15881, section 3.2; the pairwise form of KTO, arXiv:2402.01306.
    """
    if chosen.shape != rejected.shape or chosen.ndim != 1 or not len(chosen):
        raise ValueError(
            f"chosen has shape {tuple(chosen.shape)} and rejected {tuple(rejected.shape)}: give one log-ratio of each "
            "for every pair, and at least one pair"
        )
    if form not in get_args(PreferenceForm):
        raise ValueError(f"there is no preference {form!r}: choose one of {', '.join(get_args(PreferenceForm))}")
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}: it multiplies the log-ratios")
    if form == "dpo":
        return -F.logsigmoid(beta * (chosen - rejected)).mean()
    better = torch.sigmoid(beta * (chosen - rejected.mean().clamp(min=0)))
    worse = torch.sigmoid(beta * (chosen.mean().clamp(min=0) - rejected))
    return 1 - (better + worse).mean() / 2

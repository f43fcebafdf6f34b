"""Which tokens a model writes next: only real ones, and drawn ones by numbers that no other dialogue can change."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cmapkd.data.random import uniforms


def nucleus(
    logits: Float[Tensor, "rows size"], *, temperature: float, top_p: float = 1.0
) -> Float[Tensor, "rows size"]:
    """Probabilities at a temperature, of the likeliest tokens that together have `top_p`; 0 for the others.

    The token that crosses `top_p` is kept, so at least one is. The rest is not divided again by its sum.

    Returns:
        float64.
    """
    p = (logits.double() / temperature).softmax(-1)
    if top_p >= 1:
        return p
    ranked, order = p.sort(dim=-1, descending=True, stable=True)
    dropped = ranked.cumsum(-1) - ranked >= top_p
    return p.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), 0.0)


def drawn(p: Float[Tensor, "rows size"], u: Float[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """One token of each row by the inverse of its distribution function, in the order of ids.

    Args:
        p: weights >= 0, float64; they need not sum to 1.
        u: in [0, 1), float64.
    """
    reached = p.cumsum(-1)
    total = reached[:, -1:].contiguous()
    place = torch.searchsorted(reached, u[:, None] * total, right=True)
    last = torch.searchsorted(reached, total)  # rounding may carry u * total up to the total
    return torch.minimum(place, last)[:, 0]


class KeyedChoice:
    """A logits processor that leaves one token: the likeliest, or one that is drawn by (key, place in the answer).

    A greedy search then takes it. Draws are a pure function of the key, the place and the model's probabilities.

    Args:
        size: real tokens; rows of the head beyond them are never written.
        never: tokens that are never written, as the placeholder of pictures.
        start: tokens before the answer, with padding.
        keys: of each dialogue; None: the likeliest token is taken.
    """

    def __init__(
        self,
        *,
        size: int,
        never: Sequence[int],
        start: int,
        keys: Sequence[int] | None,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> None:
        self.size, self.never, self.start, self.keys = size, list(never), start, keys
        self.temperature, self.top_p = temperature, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        allowed = scores[:, : self.size].float().clone()
        allowed[:, self.never] = -torch.inf
        if self.keys is None:
            chosen = allowed.argmax(-1)
        else:
            place = input_ids.shape[1] - self.start
            u = np.array([uniforms(1, "draw", key, place)[0] for key in self.keys])
            p = nucleus(allowed, temperature=self.temperature, top_p=self.top_p)
            chosen = drawn(p, torch.from_numpy(u).to(p.device))
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)


def until_end(ids: Sequence[int], end_ids: Sequence[int]) -> list[int]:
    """Tokens up to and including the first end token; all of them where there is none."""
    for place, token in enumerate(ids):
        if token in end_ids:
            return list(ids[: place + 1])
    return list(ids)

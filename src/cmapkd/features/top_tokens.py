"""A teacher's likeliest tokens: taken from its logits, stored in few bytes, read at the width that a loss asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cmapkd.models.token_types import LogitHead, TopTokens

ROWS = 128  # of states whose logits exist at a time


@dataclass(frozen=True, slots=True)
class StoredTokens:
    """Likeliest tokens as a file holds them: a row takes k * (bytes of an id and a gap), and 4 for each temperature.

    The rest is stored and not the log-sum-exp. So a small rest is exact, where 1 less the sum of rounded probabilities
    would be noise, and the probabilities that are read sum to 1.

    Attributes:
        ids: Int[rows k], the likeliest first; uint16 where the vocabulary allows it, else int32.
        gaps: Float16 or Float32[rows k], logits less the largest one; <= 0.
        rest: Float32[rows temperatures], log of the probability of all other tokens at each temperature.
        temperatures: that `rest` knows.
    """

    ids: Int[Tensor, "rows k"]
    gaps: Float[Tensor, "rows k"]
    rest: Float[Tensor, "rows temperatures"]
    temperatures: tuple[float, ...]


def top_tokens(logits: Float[Tensor, "rows tokens"], k: int, *, temperature: float = 1.0) -> TopTokens:
    """The k likeliest tokens of each row, at a temperature that divides the logits.

    Raises:
        ValueError: there are fewer tokens, or the temperature is not positive.
    """
    _check(k, logits.shape[-1], (temperature,))
    log_p = _widened(logits).div(temperature).log_softmax(-1)
    likeliest, ids = log_p.topk(k, dim=-1)
    return TopTokens(ids, likeliest, _rest(log_p, ids))


def narrowed(top: TopTokens, k: int) -> TopTokens:
    """The first k of more likeliest tokens; the others join the rest.

    Raises:
        ValueError: fewer are known.
    """
    _check(k, top.ids.shape[-1], (1.0,))
    rest = torch.cat([top.log_p[:, k:], top.rest[:, None]], -1).logsumexp(-1)
    return TopTokens(top.ids[:, :k], top.log_p[:, :k], rest)


def pack(
    logits: Float[Tensor, "rows tokens"],
    k: int,
    *,
    temperatures: Sequence[float] = (1.0,),
    dtype: torch.dtype = torch.float16,
) -> StoredTokens:
    """The k likeliest tokens of each row, to be stored.

    Args:
        temperatures: at which somebody will read them.
        dtype: of the gaps.
    Raises:
        ValueError: there are fewer tokens, or a temperature is not positive.
    """
    _check(k, logits.shape[-1], temperatures)
    logits = _widened(logits)
    likeliest, ids = logits.topk(k, dim=-1)
    gaps = (likeliest - likeliest[:, :1]).clamp(min=torch.finfo(dtype).min).to(dtype)
    rest = torch.stack([_rest((logits / at).log_softmax(-1), ids) for at in temperatures], -1).float()
    kind = torch.uint16 if logits.shape[-1] <= 2**16 else torch.int32
    return StoredTokens(ids.to(kind), gaps, rest, tuple(temperatures))


def pack_states(
    hidden: Float[Tensor, "rows width"],
    head: LogitHead,
    k: int,
    *,
    temperatures: Sequence[float] = (1.0,),
    chunk: int = ROWS,
) -> StoredTokens:
    """`pack` of the logits of final states, `chunk` rows at a time and without gradient."""
    with torch.no_grad():
        parts = [pack(head(rows), k, temperatures=temperatures) for rows in hidden.split(chunk)]
    ids, gaps, rest = (torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "gaps", "rest"))
    return StoredTokens(ids, gaps, rest, tuple(temperatures))


def unpack(stored: StoredTokens, *, temperature: float = 1.0) -> TopTokens:
    """Likeliest tokens as a loss reads them, float32; with the rest they sum to 1 but for rounding.

    Raises:
        ValueError: the rest at this temperature was not stored.
    """
    if temperature not in stored.temperatures:
        raise ValueError(
            f"tokens are stored for the temperatures {stored.temperatures}, not for {temperature}: write the cache "
            "again with the temperature that the method reads"
        )
    rest = stored.rest[:, stored.temperatures.index(temperature)]
    within = stored.gaps.float().div(temperature).log_softmax(-1)
    return TopTokens(stored.ids.long(), within + torch.log(-torch.expm1(rest))[:, None], rest)


def _rest(log_p: Float[Tensor, "rows tokens"], ids: Int[Tensor, "rows k"]) -> Float[Tensor, " rows"]:
    return log_p.scatter(-1, ids, -math.inf).logsumexp(-1)


def _widened(logits: Tensor) -> Tensor:
    return logits.detach().to(torch.promote_types(logits.dtype, torch.float32))


def _check(k: int, num_tokens: int, temperatures: Sequence[float]) -> None:
    if not 1 <= k <= num_tokens:
        raise ValueError(f"k is {k}, but there are {num_tokens} tokens: take 1 to {num_tokens}")
    if not temperatures or min(temperatures) <= 0:
        raise ValueError(f"temperatures must be positive, and at least one, got {tuple(temperatures)}")

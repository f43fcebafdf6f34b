"""How well stored likeliest tokens stand for a teacher: how much is left to the rest, and how much is rounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmapkd.cache.files import check_values
from cmapkd.models.token_types import TopTokens


class TokenFidelity:
    """Collects over batches, for each token of an answer: the probability outside the likeliest tokens, the divergence
    KL(live, stored) on the likeliest tokens and the rest, and whether the likeliest token stays the same.

    Args:
        read: decoded arrays [batch room ...] by field, as the rows of tokens that a loss reads.
    """

    def __init__(self, read: Callable[[Mapping[str, Tensor]], TopTokens]) -> None:
        self.read = read
        self.rows = self.tokens = self.agreeing = 0
        self.tail_sum = self.kl_sum = self.kl_max = 0.0

    @torch.no_grad()
    def add(self, live: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
        """Compares arrays [batch room ...] by field; `live` also has exact log-probabilities `log_p`."""
        self.rows += len(live["tokens"])
        real = torch.arange(live["rest"].shape[1], device=live["rest"].device) < live["tokens"][:, None]
        exact, rest, ids = (live[name][real] for name in ("log_p", "rest", "ids"))
        found = self.read(stored)
        lost = (exact.double().exp() * (exact.double() - found.log_p.double())).sum(-1)
        self.tokens += len(exact)
        self.tail_sum += float(rest.exp().sum())
        self.kl_sum += float(lost.sum())
        self.kl_max = max(self.kl_max, float(lost.max())) if len(lost) else self.kl_max
        likeliest = found.ids.gather(1, found.log_p.argmax(-1, keepdim=True))[:, 0]
        self.agreeing += int((likeliest == ids[:, 0]).sum())

    def plain(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "tokens": self.tokens,
            "agreeing": self.agreeing,
            "tail_sum": round(self.tail_sum, 9),
            "kl_sum": round(self.kl_sum, 12),
            "kl_max": round(self.kl_max, 12),
        }


def check_tokens(path: Path, record: Mapping[str, Any]) -> None:
    """Refuses a record that `TokenFidelity.plain` cannot have written.

    Raises:
        CacheError: names the value.
    """
    check_values(path, record, rows=int, tokens=int, agreeing=int, tail_sum=float, kl_sum=float, kl_max=float)


def summary_of_tokens(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Of all shards together, each token counting alike."""
    rows = tokens = agreeing = 0
    tail = kl = largest = 0.0
    for record in records:
        rows, tokens, agreeing = rows + record["rows"], tokens + record["tokens"], agreeing + record["agreeing"]
        tail, kl, largest = tail + record["tail_sum"], kl + record["kl_sum"], max(largest, record["kl_max"])
    return {
        "rows": rows,
        "tokens": tokens,
        "same_likeliest": agreeing / tokens if tokens else None,
        "tail_mean": tail / tokens if tokens else None,
        "kl_mean": kl / tokens if tokens else None,
        "kl_max": largest if tokens else None,
    }

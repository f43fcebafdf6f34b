"""How well stored likeliest tokens stand for a teacher's distribution: what is left to the rest, and what is rounded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmapkd.cache.files import check_values
from cmapkd.features.top_logits import TopLogits, top_tokens

_FLOOR = math.log(torch.finfo(torch.float32).eps)  # what probabilities that sum to 1, rounded, can still hide


class TokenFidelity:
    """Collects over batches, for each token of an answer: the probability outside the likeliest tokens, the divergence
    of the stored from the live cells (likeliest tokens and the rest), and whether the likeliest token is the same.

    Args:
        temperature, size: of the layout.
    """

    def __init__(self, temperature: float, size: int) -> None:
        self.temperature, self.size = temperature, size
        self.rows = self.tokens = self.agreeing = 0
        self.tail_sum = self.kl_sum = self.kl_max = 0.0

    @torch.no_grad()
    def add(self, live: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
        """Compares arrays [batch room ...] by field."""
        self.rows += len(live["tokens"])
        real = torch.arange(live["lse"].shape[1], device=live["lse"].device) < live["tokens"][:, None]
        wanted, found = (self._cells(arrays, real) for arrays in (live, stored))
        differences = (wanted.exp() * (wanted.clamp(min=_FLOOR) - found.clamp(min=_FLOOR))).sum(-1)
        self.tokens += len(wanted)
        self.tail_sum += float(wanted[:, -1].exp().sum())
        self.kl_sum += float(differences.sum())
        self.kl_max = max(self.kl_max, float(differences.max())) if len(differences) else self.kl_max
        likeliest = stored["ids"][real].gather(1, found[:, :-1].argmax(-1, keepdim=True))[:, 0]
        self.agreeing += int((likeliest == live["ids"][real][:, 0]).sum())

    def _cells(self, arrays: Mapping[str, Tensor], real: Tensor) -> Tensor:
        """Log-probabilities [tokens k+1] of the likeliest tokens and of the rest, float64."""
        found = TopLogits(*(arrays[name][real] for name in TopLogits._fields))
        top = top_tokens(found, found.ids.shape[-1], temperature=self.temperature, size=self.size)
        return torch.cat([top.log_p, top.rest[:, None]], -1).double()

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

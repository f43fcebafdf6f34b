"""How well stored numbers stand for live ones: cosines, and whether the nearest neighbour stays the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cmapkd.cache.files import check_values


class TowerFidelity:
    """Collects both over batches; every number in it goes into the shard's record."""

    def __init__(self) -> None:
        self.rows = 0
        self.queries = 0
        self.agreeing = 0
        self._sums: dict[str, float] = {}
        self._smallest: dict[str, float] = {}

    @torch.no_grad()
    def add(self, live: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
        """Compares arrays [batch ...] by field; ranks the batch's images and texts against each other, both ways."""
        self.rows += len(live["image"])
        for name, array in live.items():
            if not array.is_floating_point() or not array.shape[-1]:  # a tower that is not stored
                continue
            cosines = F.cosine_similarity(array.flatten(1).double(), stored[name].flatten(1).double())
            self._sums[name] = self._sums.get(name, 0.0) + float(cosines.sum())
            self._smallest[name] = min(self._smallest.get(name, 1.0), float(cosines.min()))
        width = live["image"].shape[1]
        if not width or width != live["text"].shape[1]:  # pooled features or tokens, which no head has joined yet
            return
        similarities = [
            F.normalize(side["image"], dim=-1) @ F.normalize(side["text"], dim=-1).T for side in (live, stored)
        ]
        for dim in (0, 1):
            nearest = [similarity.argmax(dim) for similarity in similarities]
            self.agreeing += int((nearest[0] == nearest[1]).sum())
            self.queries += len(nearest[0])

    def plain(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "queries": self.queries,
            "agreeing": self.agreeing,
            "cosine_sum": {name: round(value, 9) for name, value in self._sums.items()},
            "cosine_min": {name: round(value, 9) for name, value in self._smallest.items()},
        }


def check_towers(path: Path, record: Mapping[str, Any]) -> None:
    """Refuses a record that `TowerFidelity.plain` cannot have written.

    Raises:
        CacheError: names the value.
    """
    check_values(path, record, rows=int, queries=int, agreeing=int, cosine_sum=dict, cosine_min=dict)
    for part in ("cosine_sum", "cosine_min"):
        check_values(path, record[part], **dict.fromkeys(record["cosine_sum"], float))


def summary_of_towers(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Of all shards together: mean and smallest cosine by field, share of nearest neighbours that stay the same."""
    rows = queries = agreeing = 0
    sums: dict[str, float] = {}
    smallest: dict[str, float] = {}
    for record in records:
        rows, queries = rows + record["rows"], queries + record["queries"]
        agreeing += record["agreeing"]
        for name, value in record["cosine_sum"].items():
            sums[name] = sums.get(name, 0.0) + value
            smallest[name] = min(smallest.get(name, 1.0), record["cosine_min"][name])
    return {
        "rows": rows,
        "same_nearest": agreeing / queries if queries else None,
        "cosine_mean": {name: value / rows for name, value in sums.items()} if rows else {},
        "cosine_min": smallest,
    }

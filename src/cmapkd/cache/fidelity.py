"""How well stored answers stand for live ones, of either kind of teacher: records of shards, and their sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cmapkd.cache.token_fidelity import check_tokens, summary_of_tokens
from cmapkd.cache.tower_fidelity import check_towers, summary_of_towers

_OF_TOKENS = "kl_sum"  # in the records of teachers that write alone


def check_fidelity(path: Path, record: Mapping[str, Any]) -> None:
    """Refuses a record that no build can have written.

    Raises:
        CacheError: names the value.
    """
    check = check_tokens if _OF_TOKENS in record else check_towers
    check(path, record)


def summary(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of all shards of a cache together."""
    of_tokens = any(_OF_TOKENS in record for record in records)
    return summary_of_tokens(records) if of_tokens else summary_of_towers(records)

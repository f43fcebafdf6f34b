"""Task `generation`: what writing costs each model, and as a ratio to the first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cmapkd.evaluation.generation import WritingCostConfig, writing_costs
from cmapkd.evaluation.subject import Bench, Subject
from cmapkd.evaluation.tasks.base import Column, Task
from cmapkd.models.generative import GenerativeModel


class Generation(Task):
    title = "Cost of writing"
    reads = GenerativeModel
    Settings = WritingCostConfig
    settings: WritingCostConfig
    needs_source = False
    columns = (
        Column("first token, ms", ("prefill_ms", "median"), 2),
        Column("further tokens a second", ("tokens_per_second", "median"), 1),
        Column("visual tokens a picture", ("image_tokens",), 0),
        Column("prompt tokens", ("prompt_tokens",), 0),
        Column("cache, KB a dialogue", ("shown", "kv_kb"), 1),
        Column("peak memory, MB", ("shown", "peak_mb"), 1),
        Column("first token, speed x", ("ratio", "prefill_speed"), 2),
        Column("further tokens, speed x", ("ratio", "decode_speed"), 2),
    )

    def measure(self, subjects: Sequence[Subject], bench: Bench) -> list[dict[str, Any]]:
        models = {subject.name: subject.generative for subject in subjects}
        measured = writing_costs(models, self.settings, device=bench.device, autocast=bench.autocast)
        return [result | {"shown": _shown(result)} for result in measured.values()]


def _shown(result: dict[str, Any]) -> dict[str, float]:
    """The round numbers of the table, in units that people read."""
    shown = {"peak_mb": result["peak_bytes"] / 1e6}
    return shown if result["kv_bytes"] is None else shown | {"kv_kb": result["kv_bytes"] / 1e3}

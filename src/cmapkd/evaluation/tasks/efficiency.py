"""Task `efficiency`: what each model costs, and as a ratio to the first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cmapkd.evaluation.efficiency import EfficiencyConfig, efficiency
from cmapkd.evaluation.subject import Bench, Subject
from cmapkd.evaluation.tasks.base import Column, Task


class Efficiency(Task):
    title = "Cost (M = million; GMACs and ms a sample)"
    Settings = EfficiencyConfig
    settings: EfficiencyConfig
    needs_source = False
    columns = (
        Column("image M", ("shown", "image"), 2),
        Column("text M", ("shown", "text"), 2),
        Column("image GMACs", ("shown", "image_gmacs"), 3),
        Column("text GMACs", ("shown", "text_gmacs"), 3),
        Column("ms/image, 1", ("image", "latency_ms", "1", "median"), 2),
        Column("ms/text, 1", ("text", "latency_ms", "1", "median"), 2),
        Column("image speed x", ("ratio", "image_speed", "1"), 2),
        Column("fp16 MB", ("shown", "fp16_mb")),
        Column("files MB", ("shown", "files_mb"), 2),
    )

    def measure(self, subjects: Sequence[Subject], bench: Bench) -> list[dict[str, Any]]:
        models = {subject.name: subject.dual for subject in subjects}
        measured = efficiency(models, self.settings, device=bench.device)
        return [result | {"shown": _shown(result)} for result in measured.values()]


def _shown(result: dict[str, Any]) -> dict[str, float]:
    """The round numbers of the table, in units that people read."""
    parameters = result["parameters"]
    return {
        "image": parameters["image"] / 1e6,
        "text": parameters["text"] / 1e6,
        "image_gmacs": result["image"]["macs"] / 1e9,
        "text_gmacs": result["text"]["macs"] / 1e9,
        **{f"{kind}_mb": size / 1e6 for kind, size in result["file_bytes"].items() if kind != "fp32"},
    }

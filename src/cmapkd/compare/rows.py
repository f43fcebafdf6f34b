"""Rows of a table and their runs: each run with a name and the digest of its config."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cmapkd.run import RunConfig


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One run folder."""

    config: RunConfig
    digest: str  # of the resolved config: equal configs are one run
    name: str


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: an arm at one value of every axis, with a run for each seed."""

    coordinates: dict[str, str]  # `arm` (where there are arms) and the axes -> name or label
    label: str
    runs: dict[int, PlannedRun]

    @property
    def config(self) -> RunConfig:
        """The config of the first seed; the others differ in the seed alone."""
        return next(iter(self.runs.values())).config


def planned_run(config: RunConfig, seed: int, parts: Iterable[str]) -> PlannedRun:
    """The run of a config with a seed; `parts` begin its name."""
    seeded = config.model_copy(update={"seed": seed})
    digest = config_digest(seeded.plain())
    return PlannedRun(seeded, digest, "-".join(_slug(part) for part in parts)[:80] + f"-seed{seed}-{digest}")


def config_digest(values: Any) -> str:
    """Eight hex digits of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "_", text.replace("=", "")).strip("_.") or "arm"

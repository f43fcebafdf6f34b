"""Rows of a table and their runs: each run with a name and the digest of its config."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmapkd.models import ModelConfig
from cmapkd.run import RunConfig


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One run folder."""

    config: RunConfig
    digest: str  # of the resolved config: equal configs are one run
    name: str
    after: PlannedRun | None = None  # whose student it begins with


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: an arm at one value of every axis, with a run for each seed."""

    coordinates: dict[str, str]  # `arm` (where there are arms) and the axes -> name or label
    label: str
    runs: dict[int, PlannedRun]

    @property
    def start(self) -> RunConfig:
        """Of a chain the config of its first run, which says how the student begins; of other rows `config`."""
        return self.chain(next(iter(self.runs)))[0].config

    def chain(self, seed: int) -> tuple[PlannedRun, ...]:
        """The runs of a seed in their order: most rows have one."""
        runs, run = [], self.runs.get(seed)
        while run is not None:
            runs.append(run)
            run = run.after
        return tuple(reversed(runs))

    @property
    def config(self) -> RunConfig:
        """The config of the first seed; the others differ in the seed, and in what `folds` say of it."""
        return next(iter(self.runs.values())).config


def planned_run(config: RunConfig, seed: int, parts: Iterable[str], *, after: PlannedRun | None = None) -> PlannedRun:
    """The run of a config with a seed; `parts` begin its name.

    Args:
        after: the run whose student it begins with; that run's digest stands in the place of a folder until both are
            known, so equal chains are equal runs wherever they lie.
    """
    update: dict[str, Any] = {"seed": seed}
    if after is not None:
        update["student"] = ModelConfig(name=f"the student of run {after.digest}")
    seeded = config.model_copy(update=update)
    digest = config_digest(seeded.plain())
    return PlannedRun(seeded, digest, "-".join(_slug(part) for part in parts)[:80] + f"-seed{seed}-{digest}", after)


def begun_with(planned: PlannedRun, folder: Path) -> RunConfig:
    """A later run's config, whose student is the one that the run before it left.

    Args:
        folder: of the run before it.
    """
    return planned.config.model_copy(update={"student": ModelConfig(name=str(folder / "student"))})


def config_digest(values: Any) -> str:
    """Eight hex digits of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "_", text.replace("=", "")).strip("_.") or "arm"

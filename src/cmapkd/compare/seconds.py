"""Seconds a step of every arm, by a short run of each alone; kept in seconds.json."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from cmapkd.compare.clock import EqualTimeConfig
from cmapkd.compare.equal_time import BUDGET, EQUAL_STEPS, WINDOW, Seconds, key_of, measuring_config
from cmapkd.compare.plan import Plan
from cmapkd.compare.rows import Row
from cmapkd.config import ConfigError, printable
from cmapkd.config.disk import write_text
from cmapkd.provenance import describe_environment
from cmapkd.run import RunConfig, open_training, run

FILE = "seconds.json"
BUSY = 0.05  # share of its time that a process waits for a processor, above which the machine is called busy
TRIES = 3  # measurements of an arm, until the machine is idle
_WARMUP = (10, 200)  # steps, where an epoch is shorter or longer


def read_seconds(plan: Plan, equal_time: EqualTimeConfig, out: Path | None) -> tuple[Seconds, dict[str, RunConfig]]:
    """The seconds a step that are given or kept, and row -> config of those that must be measured.

    Raises:
        ConfigError: a file of seconds is not there, or holds something else.
    """
    given = equal_time.seconds
    if isinstance(given, dict):
        return Seconds(equal_time, {}), {}
    path = Path(given) if given is not None else None if out is None else out / FILE
    known = _read(path) if path is not None and (given is not None or path.is_file()) else {}
    rows = [row for table in plan.tables for row in table.rows if row.coordinates[BUDGET] == EQUAL_STEPS]
    needed: dict[str, Row] = {}
    for row in rows:
        needed.setdefault(key_of(row.config, equal_time), row)
    missing = {
        row.label.removesuffix(f", {EQUAL_STEPS}"): row.config for key, row in needed.items() if key not in known
    }
    if given is not None and missing:
        raise ConfigError(
            f"equal_time.seconds: {given} has no seconds a step of {'; '.join(missing)}: they are of other "
            "settings, measure_steps or warmup_steps. Leave seconds out to measure here"
        )
    return Seconds(equal_time, {key: known[key] for key in needed if key in known}), missing


def measure_all(plan: Plan, equal_time: EqualTimeConfig, out: Path, console: Console | None) -> Seconds:
    """Measures what is not yet known, one short run after the other, and keeps it in seconds.json.

    Raises:
        ConfigError, RunStopped, Interrupted: as a run does.
    """
    seconds, missing = read_seconds(plan, equal_time, out)
    if isinstance(equal_time.seconds, dict):
        return seconds
    known = dict(seconds.measured or {})
    for label, config in missing.items():
        entry: dict[str, Any] = {}
        for _ in range(TRIES):
            tried = {"row": label, **_measured(config, equal_time, out / "seconds")}
            if not entry or (tried["waited"] or 0) < (entry["waited"] or 0):
                entry = tried
            if not entry["busy"]:
                break
        known[key_of(config, equal_time)] = entry
        _say(console, f"{label}: {entry['seconds']:.4g} s a step" + ", on a BUSY machine" * entry["busy"])
        kept = _read(out / FILE) if (out / FILE).is_file() else {}
        write_seconds(out, kept | known)
    return Seconds(equal_time, known)


def write_seconds(out: Path, measured: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes seconds.json."""
    values = {"measured": measured, "environment": describe_environment()}
    write_text(out / FILE, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _measured(config: RunConfig, equal_time: EqualTimeConfig, folder: Path) -> dict[str, Any]:
    """One short run: seconds a step, and the share of its time that it waited for a processor (None: not known)."""
    warmup = equal_time.warmup_steps
    if warmup is None:
        epoch = -(-len(open_training(config)) // config.training.batch_size)
        warmup = min(max(epoch, _WARMUP[0]), _WARMUP[1])
    warmup = -(-warmup // WINDOW) * WINDOW
    steps = warmup + equal_time.measure_steps
    shutil.rmtree(folder, ignore_errors=True)
    before = waiting_clock()
    run(measuring_config(config, steps=steps), out=folder)
    waited = waited_share(before, waiting_clock())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "seconds": seconds_a_step(lines, warmup=warmup, batch_size=config.training.batch_size),
        "steps": equal_time.measure_steps,
        "warmup_steps": warmup,
        "waited": waited,
        "busy": waited is not None and waited > BUSY,
    }


def seconds_a_step(lines: Iterable[Mapping[str, Any]], *, warmup: int, batch_size: int) -> float:
    """Median seconds a step, after the warm-up, from the lines of a metrics.jsonl.

    Stages with other terms have steps of other lengths: of each kind of steps the median is taken, and each counts by
    its share of the run.

    Args:
        lines: with `step` and `pairs_per_second`, the mean rate since the line before.
    """
    kinds: dict[tuple[str, ...], list[tuple[int, float]]] = {}
    for line in lines:
        terms = tuple(sorted(key for key in line if key.startswith("terms/")))
        kinds.setdefault(terms, []).append((line["step"], batch_size / line["pairs_per_second"]))
    total = sum(map(len, kinds.values()))
    seconds = 0.0
    for times in kinds.values():
        late = [each for step, each in times if step > warmup] or [each for _, each in times]
        seconds += median(late) * len(times) / total
    return seconds


def waiting_clock() -> tuple[int, int] | None:
    """Nanoseconds that this process's main thread has run, and has waited while it could have run (Linux).

    Source: schedstat in the kernel's documentation of the scheduler's statistics.
    """
    try:
        ran, waited, _ = Path("/proc/self/schedstat").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return int(ran), int(waited)


def waited_share(before: tuple[int, int] | None, after: tuple[int, int] | None) -> float | None:
    """Of the time in which a thread could have run, the share in which others did; None where it is not known."""
    if before is None or after is None:
        return None
    ran, waited = after[0] - before[0], after[1] - before[1]
    return waited / (ran + waited) if ran + waited > 0 else 0.0


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        measured: dict[str, dict[str, Any]] = values["measured"]
        if all(each["seconds"] > 0 and isinstance(each["row"], str) for each in measured.values()):
            return measured
        raise ValueError("seconds must be above 0")
    except FileNotFoundError:
        raise ConfigError(f"equal_time.seconds: there is no {path}: name a comparison's {FILE}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is no {FILE} of a comparison ({error!r}): remove it, or name another") from None


def _say(console: Console | None, line: str) -> None:
    if console is not None:
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

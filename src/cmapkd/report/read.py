"""From paths to what their files say. What is missing or damaged becomes a note, and the rest is read all the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cmapkd.config import ConfigError
from cmapkd.export.origin import without_folders
from cmapkd.report.plain import mapping, plain, sequence, shortened, string, whole
from cmapkd.results import is_finished

_MAX_LINES = 200_000  # of a log; more would take minutes to read and shows no more


@dataclass(frozen=True, slots=True)
class RunFolder:
    """What a run left.

    Attributes:
        metrics: of metrics.json; empty where the run was not measured or the file is damaged.
        config, environment: of config.yaml and environment.json, or empty.
        log, baseline_log: lines of metrics.jsonl, of the student and of the baseline trained beside it.
        bad: lines of bad_samples.jsonl.
        notes: what could not be read, in words.
    """

    path: Path
    metrics: dict[str, Any]
    config: dict[str, Any]
    environment: dict[str, Any]
    log: tuple[dict[str, Any], ...]
    baseline_log: tuple[dict[str, Any], ...]
    bad: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        return name_of(self.path)

    @property
    def finished(self) -> bool:
        """Whether it has scores; `finalize` gives them to a run that was stopped, too: see `cut_short`."""
        return bool(self.metrics)

    @property
    def cut_short(self) -> tuple[int, int] | None:
        """The step that the student is of and the steps that the run was to have, where these are more."""
        steps, total = whole(self.metrics, "steps"), whole(self.metrics, "total_steps")
        return None if steps is None or total is None or steps >= total else (steps, total)


@dataclass(frozen=True, slots=True)
class ComparisonFolder:
    """What a comparison left: results.json, empty while it runs; the runs in its folder, and how many of them ended."""

    path: Path
    results: dict[str, Any]
    num_runs: int
    num_finished: int
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        return name_of(self.path)


@dataclass(frozen=True, slots=True)
class ExportFolder:
    """What an export left: `export.json` and `parity.json`."""

    path: Path
    manifest: dict[str, Any]
    parity: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        return name_of(self.path)

    @property
    def form(self) -> str:
        """What `--to` was: stated by all forms but onnx, and told by the folder of the files where it is not."""
        stated = string(self.manifest, "form") or string(self.parity, "library")
        files = [string(each, "file") or "" for each in sequence(self.parity, "files")]
        inside = next((file.partition("/")[0] for file in files if "/" in file), "onnx")
        return stated or inside


@dataclass(frozen=True, slots=True)
class ScoresFile:
    """What `cmapkd evaluate --json` wrote."""

    path: Path
    content: dict[str, Any]

    @property
    def name(self) -> str:
        return name_of(self.path)


@dataclass(frozen=True, slots=True)
class ReportData:
    runs: tuple[RunFolder, ...] = ()
    comparisons: tuple[ComparisonFolder, ...] = ()
    exports: tuple[ExportFolder, ...] = ()
    scores: tuple[ScoresFile, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def title(self) -> str:
        named = [each.name for kind in (self.runs, self.comparisons, self.exports, self.scores) for each in kind]
        return ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")


def name_of(path: Path) -> str:
    """The last part of a path: what a page says of where it lies."""
    return path.name or path.resolve().name or "."


def read_paths(paths: Sequence[Path]) -> ReportData:
    """Reads run folders, comparison folders, export folders and files of scores, in any mixture.

    Raises:
        ConfigError: a path is not there, or is nothing that cmapkd writes.
    """
    found: dict[type, list[Any]] = {kind: [] for kind in (RunFolder, ComparisonFolder, ExportFolder, ScoresFile)}
    for path in dict.fromkeys(paths):
        each = _read(path)
        found[type(each)].append(each)
    runs, comparisons, exports, scores = (tuple(each) for each in found.values())
    notes = tuple(
        f"{each.name}: {note}" for kind in (runs, comparisons, exports) for each in kind for note in each.notes
    )
    return ReportData(runs, comparisons, exports, scores, notes)


def _read(path: Path) -> RunFolder | ComparisonFolder | ExportFolder | ScoresFile:
    if path.is_dir():
        if _has(path, "results.json", "comparison.yaml"):
            return _comparison(path)
        if _has(path, "parity.json", "export.json"):
            return _export(path)
        if _has(path, "config.yaml", "metrics.json", "metrics.jsonl"):
            return _run(path)
        raise ConfigError(
            f"{path} holds no run, comparison or export: it has none of config.yaml, metrics.json, results.json and "
            "parity.json. Name the folder that --out named"
        )
    if not path.exists():
        raise ConfigError(f"there is no {path}")
    notes: list[str] = []
    content = _load(path, json.loads, notes)
    if not mapping(content, "models"):
        why = f" ({notes[0]})" if notes else ""
        raise ConfigError(f"{path} holds no scores of cmapkd evaluate --json{why}: name such a file or a folder")
    return ScoresFile(path, content)


def _has(folder: Path, *names: str) -> bool:
    return any((folder / name).is_file() for name in names)


def _run(path: Path) -> RunFolder:
    notes: list[str] = []
    return RunFolder(
        path,
        metrics=_load(path / "metrics.json", json.loads, notes),
        config=_load(path / "config.yaml", yaml.safe_load, notes),
        environment=_load(path / "environment.json", json.loads, notes),
        log=_lines(path / "metrics.jsonl", notes),
        baseline_log=_lines(path / "baseline" / "metrics.jsonl", notes),
        bad=_lines(path / "bad_samples.jsonl", notes),
        notes=tuple(notes),
    )


def _comparison(path: Path) -> ComparisonFolder:
    notes: list[str] = []
    results = _load(path / "results.json", json.loads, notes)
    folders = sorted(each for each in (path / "runs").glob("*") if each.is_dir()) if (path / "runs").is_dir() else []
    finished = sum(map(is_finished, folders))
    return ComparisonFolder(path, results, len(folders), finished, tuple(notes))


def _export(path: Path) -> ExportFolder:
    notes: list[str] = []
    manifest, parity = (_load(path / name, json.loads, notes) for name in ("export.json", "parity.json"))
    missing = [
        name for name in mapping(manifest, "files") if ".." not in Path(name).parts and not (path / name).is_file()
    ]
    if missing:
        notes.append(f"{len(missing)} of the files that export.json names are not there, the first: {missing[0][:80]}")
    return ExportFolder(path, manifest, parity, tuple(notes))


def _load(path: Path, parse: Callable[[str], Any], notes: list[str]) -> dict[str, Any]:
    """A file's mapping; empty, with a note, where it is damaged, and empty without one where it is not there."""
    try:
        content = plain(parse(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        first = str(error).split("\n", 1)[0].replace(str(path), path.name)
        notes.append(f"{path.name} cannot be read ({first[:200]})")
        return {}
    if not isinstance(content, dict):
        notes.append(f"{path.name} holds a {type(content).__name__} where a mapping belongs")
        return {}
    return mapping(content)


def _lines(path: Path, notes: list[str]) -> tuple[dict[str, Any], ...]:
    """The mappings of a file of JSON lines. A last line cut short is usual after a stop; others are counted."""
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return ()
    except OSError as error:
        notes.append(f"{path.name} cannot be read ({error.strerror})")
        return ()
    if len(texts) > _MAX_LINES:
        notes.append(f"{path.name} has {len(texts):,} lines, of which the first {_MAX_LINES:,} are read")
    lines, damaged = [], 0
    for text in filter(None, texts[:_MAX_LINES]):
        try:
            content = plain(json.loads(text))
        except (ValueError, RecursionError):
            damaged += text is not texts[-1]
            continue
        if isinstance(content, dict):
            lines.append(content)
        else:
            damaged += 1
    if damaged:
        where = f"{path.parent.name}/" * (path.parent.name == "baseline")
        notes.append(f"{damaged} lines of {where}{path.name} are damaged and left out")
    return tuple(lines)


def model_name(config: Any, role: str) -> str | None:
    """The name of a run's model as its config states it; of a local path its last part."""
    name = string(config, role, "name", longest=200) or string(config, role, longest=200)
    return None if name is None else short_name(name)


def short_name(name: str) -> str:
    """A model's or source's name; of a local path its last part, and no secret."""
    try:
        return without_folders(shortened(name, 200))
    except OSError:  # too long for a path, so it is none
        return shortened(name, 200)

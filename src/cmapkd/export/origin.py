"""Where a model came from, as far as its name and its run folder tell: teacher, data, scores; no local paths."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cmapkd.config import redact


@dataclass(frozen=True, slots=True)
class Origin:
    """What is known of a model besides its weights.

    Attributes:
        name: of the model, without folders.
        teachers: whom it was distilled from.
        method, data, seed: of the run.
        scores: the student's on the run's final source, and the name of that source in `scored_on`.
    """

    name: str
    teachers: tuple[str, ...] = ()
    method: str | None = None
    data: str | None = None
    seed: int | None = None
    scores: Mapping[str, Any] | None = None
    scored_on: str | None = None


def origin_of(model: str) -> Origin:
    """What the run folder around a model says; of other models only the name."""
    folder = _run_folder(model)
    name = without_folders(str(folder.resolve()) if folder.is_dir() else model)
    config = _read(folder / "config.yaml", yaml.safe_load)
    if not config:
        return Origin(name)
    metrics = _read(folder / "metrics.json", json.loads)
    teachers = [config.get("teacher"), *_values(config.get("more_teachers"))]
    method, data = config.get("method"), config.get("data")
    return Origin(
        name,
        teachers=tuple(without_folders(_name(each)) for each in teachers if each),
        method=_name(method) if method else None,
        data=without_folders(str(data.get("train"))) if isinstance(data, Mapping) else None,
        seed=config.get("seed"),
        scores=metrics.get("student"),
        scored_on=metrics.get("evaluated_on"),
    )


def teachers_of(model: str) -> tuple[str, ...]:
    """Teachers of a run as its config names them, with their folders, which no exported file may name."""
    config = _read(_run_folder(model) / "config.yaml", yaml.safe_load)
    if not config:
        return () if Path(model).exists() else (model,)
    return tuple(_name(each) for each in [config.get("teacher"), *_values(config.get("more_teachers"))] if each)


def _run_folder(model: str) -> Path:
    """The run folder, where a model is its `student/`."""
    folder = Path(model)
    return folder.parent if folder.name == "student" and (folder.parent / "config.yaml").is_file() else folder


def without_folders(name: str) -> str:
    """A model's or source's name; of a local path in it, only the last part."""
    family, colon, rest = name.partition(":")
    if not colon:
        family, rest = "", name
    if rest.startswith(("/", "~", ".")) or Path(rest.partition("?")[0]).exists():
        rest = Path(rest).name
    return redact(f"{family}{colon}{rest}")


def _name(value: Any) -> str:
    return str(value.get("name")) if isinstance(value, Mapping) else str(value)


def _values(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, Mapping) else list(value or ())


def _read(path: Path, parse: Any) -> dict[str, Any]:
    """A file's content; empty where there is none, or it is damaged: an export does not depend on it."""
    with suppress(OSError, ValueError, yaml.YAMLError, RecursionError):
        content = parse(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    return {}

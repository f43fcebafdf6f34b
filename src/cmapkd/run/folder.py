"""The folder of a run: begun, gone on with, and written whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from cmapkd.config import ConfigError, refuse_secrets, writing
from cmapkd.config.disk import flush, write_text
from cmapkd.models import DualEncoder
from cmapkd.provenance import describe_environment
from cmapkd.run.config import RunConfig

_FIRST_FILES = ("config.yaml", "environment.json", ".config.yaml.writing", ".environment.json.writing")


_MAY_CHANGE = (  # at a resume: who does the work, not what is computed
    "data.workers",
    "data.memory",
    "data.timeout",
    "evaluation.timeout",
    "training.micro_batch",
    "training.local_loss",
    "training.sharding",
    "training.shard_teacher",
)


def prepare_folder(out: Path, config: RunConfig, *, resume: bool, write: bool) -> None:
    """Makes the run folder, or checks that the one there belongs to this config."""
    stored = out / "config.yaml"
    if resume and stored.exists():
        try:
            before = yaml.safe_load(stored.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"{stored} is damaged ({error}): restore it, or start a new run in another folder"
            ) from None
        changed = [
            f"{key} ({pair})" for key, pair in _differences(before, config.plain()).items() if key not in _MAY_CHANGE
        ]
        if changed:
            raise ConfigError(
                f"{out} was started with other settings: {', '.join(changed)}. Resume with the same recipe and "
                "overrides, or start a new run in another folder."
            )
        if write and not (out / "environment.json").exists():  # killed before it was written
            _write_environment(out, config)
        return
    if resume:
        raise ConfigError(f"there is nothing to resume in {out}: it has no config.yaml")
    if not write:
        return
    refuse_secrets(config.plain(), where="recipe")
    # where a run ended before its training began, over a wrong model name for example, there is nothing to keep
    if out.exists() and (not out.is_dir() or any(entry.name not in _FIRST_FILES for entry in out.iterdir())):
        raise ConfigError(f"{out} is not empty: add --resume to go on with the run in it, or name another folder")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    write_yaml(stored, config.plain())
    _write_environment(out, config)


def _write_environment(out: Path, config: RunConfig) -> None:
    write_json(out / "environment.json", {"seed": config.seed, **describe_environment()})


def _differences(before: Any, after: Any, path: str = "") -> dict[str, str]:
    """Dotted keys whose values differ, with both values as text."""
    if isinstance(before, dict) and isinstance(after, dict):
        found: dict[str, str] = {}
        for key in {**before, **after}:
            found |= _differences(before.get(key), after.get(key), f"{path}.{key}" if path else str(key))
        return found
    return {} if before == after else {path: f"was {before!r}, now {after!r}"}


def save_student(student: DualEncoder, folder: Path) -> None:
    """Writes the model folder whole: under another name first."""
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    with writing(folder.parent):
        try:
            student.save(temporary)
            for file in temporary.rglob("*"):
                flush(file)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
            flush(folder.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def write_yaml(path: Path, values: dict[str, Any]) -> None:
    write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def write_json(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=2) + "\n")

"""The folder of a run: begun, gone on with, and written whole."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from cmapkd.config import RESUME, ConfigError, fixed_differences, refuse_secrets, writing
from cmapkd.config.disk import flush, usual_rights, write_text
from cmapkd.models import Model
from cmapkd.models.quiet import quiet
from cmapkd.provenance import describe_environment
from cmapkd.run.config import RunConfig
from cmapkd.run.contents import may_have_moved
from cmapkd.run.lock import LOCK
from cmapkd.training.checkpoint import Progress, read_progress

_LENGTH = ("training.steps", "training.epochs")
_FIRST_FILES = (LOCK, "config.yaml", "environment.json", ".config.yaml.writing", ".environment.json.writing")


def prepare_folder(out: Path, config: RunConfig, *, resume: bool, write: bool, longer: bool = False) -> None:
    """Makes the run folder, or checks that the one there belongs to this config.

    Args:
        longer: the run is prolonged, so that its length may differ.
    """
    stored = out / "config.yaml"
    if resume and stored.exists():
        try:
            before = yaml.safe_load(stored.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"{stored} is damaged ({error}): restore it, or start a new run in another folder"
            ) from None
        stored_contents = (read_progress(out / "checkpoints") or Progress()).contents
        changed = [
            f"{key} ({pair})"
            for key, pair in changed_settings(before, config).items()
            if not (longer and key in _LENGTH)
            and not may_have_moved(key, _at(before, key), _at(config.plain(), key), stored_contents)
        ]
        if changed:
            raise ConfigError(
                f"{out} was started with other settings: {', '.join(changed)}. Resume with the same recipe and "
                "overrides, or start a new run in another folder. docs/reliability.md lists what may change."
            )
        _check_checkpoints_are_there(out)
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
        how = f"{RESUME} in it, or " if stored.is_file() else ""
        raise ConfigError(f"{out} is not empty: {how}name another folder")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    write_yaml(stored, config.plain())
    _write_environment(out, config)


def _check_checkpoints_are_there(out: Path) -> None:
    """Raises:
    ConfigError: the run has a student and no checkpoint any more, so that a resume would begin anew.
    """
    folder = out / "checkpoints"
    if (out / "student").is_dir() and not (folder.is_dir() and any(folder.iterdir())):
        raise ConfigError(
            f"{out} is finished and keeps no checkpoints (training.keep_checkpoints=0), so there is nothing to go on "
            f"with: score its student with cmapkd evaluate {out}, or train anew in another folder"
        )


def write_begun(out: Path, config: RunConfig) -> None:
    """Writes what a run begins with once more, if somebody removed it while the run went on."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    if not (out / "config.yaml").exists():
        write_yaml(out / "config.yaml", config.plain())
    if not (out / "environment.json").exists():
        _write_environment(out, config)


def _write_environment(out: Path, config: RunConfig) -> None:
    write_json(out / "environment.json", {"seed": config.seed, **describe_environment()})


def changed_settings(before: Any, config: RunConfig) -> dict[str, str]:
    """Dotted keys of the settings that a resume may not change and that differ, with both values as text.

    Args:
        before: the plain data of the stored config. A setting that it lacks, because cmapkd had no such setting when
            it was written, has its default.
    """
    with suppress(ConfigError):
        before = RunConfig.from_mapping(before).plain()
    return fixed_differences(config, before, config.plain())


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def save_student(student: Model, folder: Path) -> None:
    """Writes the model folder whole: under another name first."""
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    with writing(folder.parent):
        try:
            with quiet():
                student.save(temporary)
            usual_rights(file for file in temporary.rglob("*") if file.is_file())
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

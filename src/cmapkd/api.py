"""The Python interface: distil in one call, load what came out, or take a method into a loop of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cmapkd.config import apply_overrides, load_mapping, merge_mappings, resumed_by
from cmapkd.freed_memory import keep_freed_memory
from cmapkd.models import Model, load_model
from cmapkd.own_loop import method
from cmapkd.results import RunResult
from cmapkd.run import RunConfig, run

__all__ = ["distill", "load", "method"]


def distill(
    recipe: str | Path | None = None,
    *,
    teacher: str | dict[str, Any] | None = None,
    student: str | dict[str, Any] | None = None,
    data: str | dict[str, Any] | None = None,
    method: str | dict[str, Any] | None = None,
    out: str | Path,
    resume: bool = False,
    extend_to: int | None = None,
    quiet: bool = False,
    overrides: Sequence[str] = (),
    **settings: Any,
) -> RunResult:
    """Trains a student and measures it; the same as `cmapkd distill`.

    As every command does, it asks glibc to keep freed memory in this process: see `cmapkd.freed_memory`.

    Args:
        recipe: a packaged recipe or a YAML file to start from; none starts from the arguments alone.
        teacher, student: models by name, or with their settings; data: a training source by name, or the `data`
            section; method: by name, or with its settings.
        out: run folder.
        resume: go on with an interrupted run in `out`.
        extend_to: go on with the run in `out`, finished or not, to so many steps.
        overrides: `key=value` strings, as on the command line; they win over everything else.
        settings: other sections of the config, for example `training={"steps": 1000}`, `seed=1`.
    Raises:
        ConfigError: a key or a value is wrong.
    """
    keep_freed_memory()
    where = f"recipe {str(recipe)!r}" if recipe is not None else "arguments of distill()"
    given = {"teacher": teacher, "student": student, "method": method, **settings}
    given["data"] = {"train": data} if isinstance(data, str) else data
    values = load_mapping(recipe) if recipe is not None else {}
    values = merge_mappings(values, {key: value for key, value in given.items() if value is not None})
    config = RunConfig.from_mapping(apply_overrides(values, overrides, where=where), where=where)
    with resumed_by(_same_call):
        return run(config, out=Path(out), resume=resume, extend_to=extend_to, console=None if quiet else Console())


def load(model: str | Path) -> Model:
    """A model in eval mode: a run folder, its `student/`, or a name such as `tiny:scenes-teacher`.

    A `DualEncoder` has `embed`, and a `GenerativeModel` has `answer`: `isinstance` tells them apart.

    Raises:
        ValueError: nothing loadable is there.
    """
    return load_model(model) if Path(model).is_dir() else _by_name(str(model))


def _same_call(settings: tuple[str, ...]) -> str:
    changed = f" and overrides={list(settings)!r} beside those given" if settings else ""
    return f"Resume it by the same call with resume=True{changed}."


def _by_name(name: str) -> Model:
    from cmapkd.models import build_model

    return build_model(name)

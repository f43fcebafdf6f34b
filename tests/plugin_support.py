"""Puts the package of tests/plugin on a path as pip would have installed it."""

from __future__ import annotations

import tomllib
from pathlib import Path

PLUGIN = Path(__file__).parent / "plugin"


def install(into: Path, *, source: str | None = None, package: Path = PLUGIN) -> None:
    """Writes the package and its `dist-info` into a folder that is to be on Python's path.

    Args:
        package: the folder with its `pyproject.toml` and its only module.
        source: of the module, in place of the package's own.
    """
    project = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module = project["name"].replace("-", "_")
    info = into / f"{module}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n", encoding="utf-8"
    )
    groups = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(groups), encoding="utf-8")
    text = source if source is not None else (package / f"{module}.py").read_text(encoding="utf-8")
    (into / f"{module}.py").write_text(text, encoding="utf-8")

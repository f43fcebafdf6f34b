"""How an extra of cmapkd is installed here: in a clone by uv, elsewhere by the names of its packages."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[3]
"""The clone that cmapkd runs from, if it does: `src/cmapkd/config/extras.py` lies three folders below."""


def install_advice(extra: str, root: Path = ROOT) -> str:
    """The command that installs an extra.

    It never names `cmapkd` on an index of packages, because whoever has that name there need not be us.

    Args:
        extra: as `pyproject.toml` names it, for example `plots`.
        root: where the clone would be.
    """
    if (root / "pyproject.toml").is_file() and (root / "uv.lock").is_file():
        return f"uv sync --inexact --extra {extra}"
    packages = " ".join(map(repr, _packages(extra)))
    return f"pip install {packages}" if packages else f"install what pyproject.toml names for the extra {extra}"


def need_extra(what: str, extra: str, *packages: str) -> None:
    """Checks that the packages of one of the project's extras are installed, without importing them.

    Args:
        what: the option or name that needs them, for the message.
    Raises:
        ValueError: names those that are missing, and the command that installs them.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ValueError(f"{what} needs {', '.join(missing)}: {install_advice(extra)}")


def _packages(extra: str) -> list[str]:
    """What the extra requires, as the installed cmapkd states it."""
    try:
        stated = requires("cmapkd") or []
    except PackageNotFoundError:
        return []
    split = [each.partition(";") for each in stated]
    return [name.strip() for name, _, marker in split if f"extra == '{extra}'" in marker.replace('"', "'")]

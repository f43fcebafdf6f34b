"""Packages that only some commands need, and the error where one is missing."""

from __future__ import annotations

from importlib.util import find_spec


def need_extra(what: str, extra: str, *packages: str) -> None:
    """Checks that the packages of one of the project's extras are installed, without importing them.

    Args:
        what: the option or name that needs them, for the message.
    Raises:
        ValueError: names those that are missing, and the command that installs them into a clone.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ValueError(f"{what} needs {', '.join(missing)}: uv sync --extra {extra}")

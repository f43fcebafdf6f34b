"""Trained models that ship with cmapkd, each in a folder of its own under `weights/`."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from cmapkd.models.storage import DESCRIPTION

_BEFORE_THE_NAME = {"tiny": "", "tiny_vlm": "tiny-vlm-"}  # in the name of a folder; the longest that fits decides


def packaged_models(family: str = "tiny") -> dict[str, Path]:
    """The folders of a family's trained models, by the name they have after its colon."""
    root = Path(str(resources.files("cmapkd"))) / "weights"
    if not root.is_dir():
        return {}
    before, others = _BEFORE_THE_NAME[family], [each for each in _BEFORE_THE_NAME.values() if each]
    return {
        entry.name.removeprefix(before): entry
        for entry in sorted(root.iterdir())
        if (entry / DESCRIPTION).exists()
        and entry.name.startswith(before)
        and (before or not entry.name.startswith(tuple(others)))
    }


def packaged_folder(name: str) -> str:
    """The folder under `weights/` of a model by its whole name, as `tiny:scenes-teacher`.

    Raises:
        ValueError: models of that family do not ship.
    """
    family, _, rest = name.partition(":")
    if family not in _BEFORE_THE_NAME or not rest:
        raise ValueError(
            f"{name!r} names no model that may ship: write one of {', '.join(_BEFORE_THE_NAME)}, then :NAME"
        )
    return f"{_BEFORE_THE_NAME[family]}{rest}"

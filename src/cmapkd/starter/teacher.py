"""Whether a teacher is of the kind that these recipes train with; no weights are read for it."""

from __future__ import annotations

from pathlib import Path

from cmapkd.config import ConfigError
from cmapkd.models.storage import DESCRIPTION, read_description
from cmapkd.models.vlm_layouts import LAYOUTS

_FAMILIES = ("tiny_vlm", "vlm")  # whose models all write


def check_teacher(name: str) -> None:
    """Refuses a model that writes, as far as its name or its folder says so.

    Raises:
        ConfigError: it writes answers; recipes of `cmapkd init` distil models that embed pictures and texts.
    """
    family, colon, rest = name.partition(":")
    folders = (Path(each) / below for each in (name, rest) if each for below in (".", "student"))
    writes = bool(colon) and family in _FAMILIES
    for folder in folders:
        if (folder / DESCRIPTION).is_file():
            options = read_description(folder).get("options")
            writes |= isinstance(options, dict) and options.get("model_type") in LAYOUTS
    if writes:
        raise ConfigError(
            f"{name} writes answers, and cmapkd init makes recipes for models that embed pictures and texts. Start "
            "from a recipe of models that write, see docs/generative.md"
        )

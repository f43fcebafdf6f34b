"""What a model family offers. Its library is imported when it is asked for: each takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from cmapkd.config import ConfigError, closest
from cmapkd.models.base import Model
from cmapkd.models.config import FAMILIES, ModelConfig

Loader = Callable[[Path], Model]
"""Reads a model folder, of whatever family."""


@runtime_checkable
class Family(Protocol):
    """What a family offers: a module, or any object with these two functions.

    A family of models that can take a teacher's tokenizer has a further argument `teacher: Model | None` of `build`.
    """

    def build(self, rest: str, config: ModelConfig, captions: Iterable[str] | None) -> Model:
        """The model that `rest`, the name after the colon, stands for; float32, on the CPU.

        Args:
            captions: training texts, for a model that learns its vocabulary from them.
        """
        ...

    def load(self, folder: Path, description: dict[str, Any], load_model: Loader) -> Model:
        """The model of a folder that its `save` wrote.

        Args:
            description: what `save` gave to `write_model_folder`.
            load_model: reads a folder inside this one, of whatever family, for a model that is made of others.
        """
        ...


_OF_FOLDERS = {
    name: EntryPoint(name, f"cmapkd.models.{name}", FAMILIES.group) for name in ("joined", "prompted", "adapted")
}
"""Families without names of their own: what methods make of other models."""


def family(name: str) -> Family:
    """The family of that name, imported.

    Raises:
        ValueError: there is none, with the closest that there is.
        ConfigError: another package offers it, and it cannot be imported or is no family.
    """
    if name not in FAMILIES and name not in _OF_FOLDERS:
        raise ValueError(f"unknown model family {name!r}{closest(name, FAMILIES)}; known: {', '.join(FAMILIES)}")
    entry = _OF_FOLDERS.get(name) or FAMILIES[name]
    if isinstance(entry, EntryPoint):  # our own
        own: Family = entry.load()
        return own
    if not isinstance(entry, Family):
        raise ConfigError(
            f"{FAMILIES.group} {name!r} of {FAMILIES.origin(name)} is no model family: it needs the functions "
            "build and load (cmapkd.models.families.Family)"
        )
    return entry

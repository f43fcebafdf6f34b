"""Registries of names: cmapkd's own entries, and those that installed packages add by entry points."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from cmapkd.config.base import ConfigError

T = TypeVar("T")


class PluginWarning(UserWarning):
    """An installed package offers something that cannot be taken. Says which package, and why."""


class Registry(Mapping[str, T], Generic[T]):
    """A read-only mapping from names to classes or functions, in the order: cmapkd's own, then other packages'.

    An entry of another package is imported when it is looked up, so a package that nobody asks for costs nothing.

    Args:
        group: the entry-point group that packages add to, such as `cmapkd.methods`.
        own: cmapkd's own entries. Another package cannot replace them.
        base: the class that every entry must be a subclass of; None: any object will do.
    Raises (on lookup):
        KeyError: no entry has this name.
        ConfigError: the package that offers the name cannot be imported, or offers something else than `base`.
    """

    def __init__(self, group: str, own: Mapping[str, T], *, base: type | None = None) -> None:
        self.group, self.own, self.base = group, dict(own), base
        self._loaded: dict[str, T] = {}

    @cached_property
    def _offered(self) -> dict[str, EntryPoint]:
        """Entry points by name. A name that cmapkd has, or that two packages offer, is warned of."""
        offered: dict[str, EntryPoint] = {}
        for point in sorted(entry_points(group=self.group), key=lambda each: (each.name, _package(each))):
            taken = (
                "cmapkd" if point.name in self.own else _package(offered[point.name]) if point.name in offered else ""
            )
            if taken:
                warnings.warn(
                    f"{_package(point)} offers {point.name!r} in {self.group}, a name that {taken} has: it is left out",
                    PluginWarning,
                    stacklevel=3,
                )
            else:
                offered[point.name] = point
        return offered

    def __getitem__(self, name: str) -> T:
        if name in self.own:
            return self.own[name]
        if name not in self._loaded:
            self._loaded[name] = self._load(self._offered[name])
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        yield from self.own
        yield from self._offered

    def __len__(self) -> int:
        return len(self.own) + len(self._offered)

    def __contains__(self, name: object) -> bool:  # without importing the entry
        return name in self.own or name in self._offered

    def origin(self, name: str) -> str:
        """The package that an entry comes from: `cmapkd`, or a name and version."""
        return "cmapkd" if name in self.own else _package(self._offered[name])

    def _load(self, point: EntryPoint) -> T:
        try:
            entry: T = point.load()
        except Exception as error:  # whatever another package's import raises
            raise ConfigError(
                f"{self.group} {point.name!r} of {_package(point)} cannot be imported "
                f"({type(error).__name__}: {error}): repair or uninstall that package"
            ) from error
        if self.base is not None and not (isinstance(entry, type) and issubclass(entry, self.base)):
            raise ConfigError(
                f"{self.group} {point.name!r} of {_package(point)} is {point.value}, which is no subclass of "
                f"{self.base.__module__}.{self.base.__qualname__}: repair or uninstall that package"
            )
        return entry


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.value

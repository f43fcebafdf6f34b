"""Which split of a data set is meant: `val`, `dev` and `validation` are one."""

from __future__ import annotations

from collections.abc import Sequence

from cmapkd.config import ConfigError, closest

_SAME = ("val", "validation", "dev", "valid")


def pick_split(wanted: str | None, found: Sequence[str], where: str) -> str:
    """The split of `found` that `wanted` names; the only one if nothing is wanted.

    Raises:
        ConfigError: there is no such split, or nothing is wanted and there are several.
    """
    if wanted is None and len(found) == 1:
        return found[0]
    if wanted is None:
        raise ConfigError(
            f"{where} has the splits {', '.join(found)}: say which, as in '@{found[-1] if found else 'train'}'"
        )
    if wanted in found:
        return wanted
    same = [name for name in found if name in _SAME] if wanted in _SAME else []
    if len(same) == 1:
        return same[0]
    raise ConfigError(f"{where} has no split {wanted!r}{closest(wanted, found)}. It has: {', '.join(found)}.")

"""From what a user wrote (a glob, braces, a path) to files, or an error that shows what is there instead."""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from cmapkd.config import ConfigError, closest

MAX_EXPANDED = 1_000_000

_BRACES = re.compile(r"\{([^{}]*)\}")


def find_files(pattern: str, *, suffix: str, what: str) -> tuple[Path, ...]:
    """Files that `pattern` names: a file, a folder (all its `suffix` files), a glob, or braces as in `{000..012}`.

    Globs give sorted names; braces keep their order, and each of their names must exist.

    Raises:
        ConfigError: nothing is there, or a part of the braces is not.
    """
    refuse_url(pattern, what)
    if Path(pattern).expanduser().is_file():
        return (Path(pattern).expanduser(),)
    found: list[Path] = []
    missing: list[str] = []
    expanded = expand_braces(pattern)
    for name in expanded:
        matches = _matches(name, suffix)
        found += matches
        if not matches:
            missing.append(name)
    if missing:
        number = (
            f"{len(missing)} of the {len(expanded)} names in {pattern!r} match no file. First: "
            if len(expanded) > 1
            else ""
        )
        raise ConfigError(f"{what} {number}{missing[0]!r} matches no file. {nearest(missing[0])}")
    return tuple(dict.fromkeys(found))


def refuse_url(text: str, what: str) -> None:
    if "://" in text or text.startswith("pipe:"):
        raise ConfigError(
            f"{what} {text!r} is not on this machine: files are read by random access, so fetch them first, or use "
            "hf:NAME for a set of the Hugging Face hub. Tars may be remote: webdataset:https://..."
        )


def _matches(name: str, suffix: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        return sorted(entry for entry in path.iterdir() if entry.name.endswith(suffix) and entry.is_file())
    if path.is_file():
        return [path]
    matches = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
    return [Path(match) for match in matches if Path(match).is_file()]


def expand_braces(pattern: str) -> list[str]:
    """`a{01..03}{x,y}` to its six names; numbers keep their leading zeros.

    Raises:
        ConfigError: braces that do not close, or more than a million names.
    """
    pieces = _BRACES.split(pattern)
    if any("{" in piece or "}" in piece for piece in pieces[::2]):
        raise ConfigError(
            f"braces in {pattern!r} do not match: write {{000000..000012}} or {{a,b}}, not one in another"
        )
    choices = [[piece] if place % 2 == 0 else list(_alternatives(piece, pattern)) for place, piece in enumerate(pieces)]
    total = 1
    for choice in choices:
        total *= len(choice)
    if total > MAX_EXPANDED:
        raise ConfigError(f"{pattern!r} stands for {total} names, more than {MAX_EXPANDED}")
    return ["".join(parts) for parts in itertools.product(*choices)]


def _alternatives(inside: str, pattern: str) -> Iterator[str]:
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if numbers is None:
        if "," not in inside:
            raise ConfigError(f"{{{inside}}} in {pattern!r} is neither a range {{000..012}} nor alternatives {{a,b}}")
        yield from inside.split(",")
        return
    first, last = int(numbers[1]), int(numbers[2])
    if last < first or last - first >= MAX_EXPANDED:
        raise ConfigError(f"{{{inside}}} in {pattern!r} does not count upwards to at most {MAX_EXPANDED} numbers")
    width = len(numbers[1]) if numbers[1].startswith("0") or len(numbers[1]) == len(numbers[2]) else 0
    yield from (f"{number:0{width}d}" for number in range(first, last + 1))


def nearest(name: str) -> str:
    """A sentence on the deepest folder of `name` that exists, and what is in it."""
    path = Path(name).expanduser()
    folder = next((parent for parent in path.parents if parent.is_dir()), Path())
    entries = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    if not entries:
        return f"The folder {str(folder)!r} is empty."
    parts = path.parts[len(folder.parts) :] or (path.name,)
    shown = ", ".join(entries[:8]) + (f" and {len(entries) - 8} more" if len(entries) > 8 else "")
    return f"The folder {str(folder)!r} holds {shown}{closest(parts[0], [entry.rstrip('/') for entry in entries])}."


def existing_file(name: str, what: str) -> Path:
    """The file `name`.

    Raises:
        ConfigError: there is none.
    """
    refuse_url(name, what)
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(f"{what} {name!r} is not a file. {nearest(name)}")
    return path


def existing_folder(name: str, what: str) -> Path:
    """The folder `name`.

    Raises:
        ConfigError: there is none.
    """
    refuse_url(name, what)
    path = Path(name).expanduser()
    if not path.is_dir():
        raise ConfigError(f"{what} {name!r} is not a folder. {nearest(name)}")
    return path


def short_names(paths: Sequence[Path]) -> list[str]:
    """Each file's name without suffix; where two are alike, with as many of their folders as tell them apart."""
    for depth in range(1, max(len(path.absolute().parts) for path in paths) + 1):
        names = ["/".join((*path.absolute().parts[-depth:-1], path.stem)) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]

"""Prompts and class names of zero-shot classification: named sets, the source's own, or a user's file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from cmapkd.config import ConfigError, closest
from cmapkd.data.classes import parse_classes
from cmapkd.data.types import Source

TEMPLATE_SETS = ("auto", "openai_imagenet", "simple", "photo", "plain", "scenes")
CLASS_NAME_SETS = ("imagenet",)


@dataclass(frozen=True, slots=True)
class ClassPrompts:
    """The classes of a source as texts: `names` by label, and `templates` that each name is put into."""

    names: tuple[str, ...]
    templates: tuple[str, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """Every prompt: all of the first class, then all of the second, ..."""
        return tuple(fill(template, name) for name in self.names for template in self.templates)

    @property
    def of_class(self) -> tuple[tuple[str, ...], ...]:
        """The prompts of each class."""
        return tuple(tuple(fill(template, name) for template in self.templates) for name in self.names)


def get_templates(name: str, source: Source | None = None) -> tuple[str, ...]:
    """Prompts with `{}` where the class name goes.

    Args:
        name: `openai_imagenet` (CLIP's 80), `simple` (its 7 best), both as open_clip ships them; `photo`, `plain`;
            `scenes`, of the built-in world; a text file with a prompt on each line; or `auto`: the source's own
            (its `templates`), else `photo`.
        source: read by `auto` only.
    Raises:
        ConfigError: the name is neither a set nor a file, or a line of the file has no `{}`.
    """
    if name == "auto":
        own: tuple[str, ...] | None = getattr(source, "templates", None)
        return tuple(own) if own else get_templates("photo")
    if name == "photo":
        return ("a photo of a {}.",)
    if name == "plain":
        return ("{}",)
    if name == "scenes":
        from cmapkd.data.scenes.language import TEMPLATES

        return TEMPLATES
    if name in ("openai_imagenet", "simple"):
        import open_clip  # takes seconds

        functions = (
            open_clip.OPENAI_IMAGENET_TEMPLATES if name == "openai_imagenet" else open_clip.SIMPLE_IMAGENET_TEMPLATES
        )
        return tuple(str(function("{}")) for function in functions)
    return _from_file(name)


def get_class_names(name: str | None, source: Source) -> tuple[str, ...] | None:
    """Names of the labels, by number; None where nobody names them.

    Args:
        name: `imagenet` (the 1,000 names of open_clip); a text file with a name on each line; a JSON list,
            `{"0": name, ...}` or another form that `data.classes` reads; None: the source's own.
    Raises:
        ConfigError: the name is neither a set nor a file, or the file is not as described.
        ValueError: the source has another number of classes.
    """
    own = source.class_names
    if name is None:
        return tuple(own) if own is not None else None
    if name == "imagenet":
        import open_clip  # takes seconds

        names = tuple(open_clip.IMAGENET_CLASSNAMES)
    else:
        names = _names_from_file(name)
    if own is not None and len(own) != len(names):
        raise ValueError(
            f"class_names {name} has {len(names)} names, but {source.name} has {len(own)} classes: labels are "
            "positions in the list, so it needs exactly one name for each class."
        )
    return names


def fill(template: str, name: str) -> str:
    """The prompt for one class; other braces in it stay as they are."""
    return template.replace("{}", name)


def _from_file(name: str) -> tuple[str, ...]:
    lines = _lines(name, "templates", TEMPLATE_SETS)
    wrong = [line for line in lines if "{}" not in line]
    if wrong:
        raise ConfigError(
            f"template file {name} has {len(wrong)} of {len(lines)} lines without {{}}, where the class name goes; "
            f"the first: {wrong[0]!r}"
        )
    return tuple(lines)


def _names_from_file(name: str) -> tuple[str, ...]:
    text = "\n".join(_lines(name, "class_names", CLASS_NAME_SETS))
    if Path(name).suffix != ".json":
        return tuple(text.split("\n"))
    try:
        values = json.loads(text)
    except ValueError:
        values = None  # `parse_classes` says what is wrong
    if isinstance(values, dict) and sorted(values) == sorted(map(str, range(len(values)))):
        numbered = [values[str(number)] for number in range(len(values))]
        if all(isinstance(value, str) for value in numbered):  # 10 follows 9 here, where sorted keys put it after 1
            return tuple(numbered)
    return parse_classes(text.encode(), name).names


def _lines(name: str, key: str, known: tuple[str, ...]) -> list[str]:
    """Lines of a file that are not blank, stripped."""
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"{key}: {name!r} is no file and none of {', '.join(known)}{closest(name, known)}")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}: {name} is not readable UTF-8 text: {error}") from None
    if not lines:
        raise ConfigError(f"{key}: {name} is empty")
    return lines

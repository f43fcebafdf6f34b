"""Prompts and class names of zero-shot classification: named sets, the source's own, or a user's file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cmapkd.config import ConfigError, closest
from cmapkd.data.classes import parse_classes
from cmapkd.data.types import Source

TEMPLATE_SETS = ("auto", "openai_imagenet", "simple", "photo", "plain", "scenes", "none")
OWN = "own"  # the source's own texts of its classes
CLASS_NAME_SETS = ("imagenet",)


@dataclass(frozen=True, slots=True)
class ClassPrompts:
    """The classes of a source as texts.

    Attributes:
        names: by label.
        templates: that each name is put into.
        own: by label, texts of a class by itself; empty where there are none. Classes may have unequal numbers.
        sentences: stand besides, for methods that compare pictures with more than the classes.
    Raises:
        ValueError: `own` has not one entry for each name.
    """

    names: tuple[str, ...]
    templates: tuple[str, ...]
    own: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.own and len(self.own) != len(self.names):
            raise ValueError(f"there are texts for {len(self.own)} classes, and {len(self.names)} names of classes")

    @property
    def of_class(self) -> tuple[tuple[str, ...], ...]:
        """By label, every prompt of the class: its name in each template, then its own texts.

        Raises:
            ConfigError: a class has none.
        """
        own = self.own or ((),) * len(self.names)
        prompts = [
            (*(fill(template, name) for template in self.templates), *texts)
            for name, texts in zip(self.names, own, strict=True)
        ]
        if not all(prompts):
            raise ConfigError(
                f"class {self.names[prompts.index(())]!r} has no prompt: with evaluation.templates: none, "
                "evaluation.class_prompts must have a text for every class"
            )
        return tuple(prompts)

    sentences: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """Every prompt: all of the first class, then all of the second, ..."""
        return tuple(text for prompts in self.of_class for text in prompts)


def get_templates(name: str, source: Source | None = None) -> tuple[str, ...]:
    """Prompts with `{}` where the class name goes.

    Args:
        name: `openai_imagenet` (CLIP's 80), `simple` (its 7 best), both as open_clip ships them; `photo`, `plain`;
            `scenes`, of the built-in world; `none`, where classes have texts of their own; a text file with a prompt on
            each line; or `auto`: the source's own (its `templates`), else `photo`.
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
    if name == "none":
        return ()
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


def get_sentences(name: str) -> tuple[str, ...]:
    """The lines of a text file, each a sentence.

    Raises:
        ConfigError: there is no such file, or nothing in it.
    """
    return tuple(_lines(name, "sentences", ("captions", "classes")))


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


def class_prompts(source: Source | None) -> Sequence[Sequence[str]]:
    """A source's own texts of each class by itself, by label; empty where it has none."""
    own: Sequence[Sequence[str]] = getattr(source, "class_prompts", None) or ()
    return own


def get_class_prompts(name: str | None, names: Sequence[str], source: Source | None) -> tuple[tuple[str, ...], ...]:
    """Texts of each class by itself, by label; empty where none are asked for.

    Args:
        name: `own`, the source's own (its `class_prompts`); or a JSON file `{name: [text, ...], ...}` that has every
            class, perhaps with an empty list, and may have others; or None.
        names: of the classes, by label.
        source: read by `own` only.
    Raises:
        ConfigError: the source has none, or the file is not as described or lacks a class.
    """
    if name is None:
        return ()
    if name == OWN:
        own = class_prompts(source)
        if not own or len(own) != len(names):
            told = "the data" if source is None else source.name
            raise ConfigError(
                f"class_prompts: own asks for the source's texts of its {len(names)} classes, and {told} has none: "
                "give a JSON file {name: [text, ...]}"
            )
        return tuple(map(tuple, own))
    text = "\n".join(_lines(name, "class_prompts", (OWN,)))
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter of thousands of brackets within each other
        raise ConfigError(f"class_prompts: {name} is not JSON: {error}") from None
    texts = {key: [each] if isinstance(each, str) else each for key, each in values.items()} if _by_name(values) else {}
    if not texts or not all(isinstance(text, str) and text.strip() for each in texts.values() for text in each):
        raise ConfigError(f"class_prompts: {name} must be {{name: [text, ...]}}, with a name of a class for each list")
    if lacking := [each for each in names if each not in texts]:
        raise ConfigError(
            f"class_prompts: {name} lacks {len(lacking)} of {len(names)} classes, {lacking[0]!r} among them"
            f"{closest(lacking[0], list(texts))}: give each a list of texts, or an empty one"
        )
    return tuple(tuple(texts[each]) for each in names)


def _by_name(values: object) -> bool:
    """Whether it maps names to a text, or to lists."""
    return isinstance(values, dict) and all(isinstance(each, list | str) for each in values.values())


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
    except (ValueError, RecursionError):
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

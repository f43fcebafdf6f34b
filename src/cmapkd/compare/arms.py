"""Arms and axes as they are written in a comparison file and on the command line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Any

from cmapkd.config import ConfigError, apply_overrides

Arm = dict[str, Any] | tuple[str, ...]
"""Settings over the base, as a mapping or as key=value. A mapping may have `then`: settings of later runs."""

THEN = "then"  # key of an arm: its later runs, each of which begins with the student of the one before


def later_tasks(arm: Arm) -> tuple[Arm, ...]:
    """The settings of an arm's later runs, over its own; none of most arms."""
    return tuple(arm.get(THEN, ())) if isinstance(arm, dict) else ()


def first_task(arm: Arm) -> Arm:
    """An arm's own settings, without those of later runs."""
    return {key: value for key, value in arm.items() if key != THEN} if isinstance(arm, dict) else arm


def parse_arm(text: str) -> tuple[str, list[str]]:
    """`name: key=value ...` as a name and its settings.

    Raises:
        ConfigError: there is no name before a colon.
    """
    name, colon, rest = text.partition(":")
    if not colon or not name.strip() or "=" in name:
        raise ConfigError(f"arm {text!r} is not 'name: key=value ...', for example \"no_gram: method.gram_weight=0\"")
    return name.strip(), shlex.split(rest)


def parse_axis(text: str) -> tuple[str, dict[str, Any]]:
    """`key=value,value` as a key and its values by label; commas inside brackets, braces or quotes do not divide.

    Raises:
        ConfigError: not of that form.
    """
    key, equals, rest = text.partition("=")
    labels = [label.strip() for label in _divide(rest)]
    if not equals or not key or not all(labels):
        raise ConfigError(f"axis {text!r} is not key=value,value,..., for example training.steps=150,600")
    _refuse_twice(key, labels)
    values: dict[str, Any] = {}
    for label in labels:
        value: Any = apply_overrides({}, [f"{key}={label}"], where=f"axis {key}")
        for part in key.split("."):
            value = value[part]
        values[label] = value
    return key, values


def _divide(text: str) -> list[str]:
    """`text` at its outermost commas."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        else:
            depth += (character in "[{(") - (character in "]})")
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def plain_arms(value: dict[Any, Any]) -> dict[str, Any]:
    arms: dict[str, Any] = {}
    for name, settings in value.items():
        if settings is None:
            settings = {}
        if isinstance(settings, str):
            settings = shlex.split(settings)
        if not isinstance(settings, dict) and not (
            isinstance(settings, list | tuple) and all(isinstance(setting, str) for setting in settings)
        ):
            raise ValueError(f"arm {name!r} must be a mapping of settings or a list of key=value, got {settings!r}")
        if isinstance(settings, dict) and THEN in settings:
            settings = {**settings, THEN: _later(str(name), settings[THEN])}
        arms[str(name)] = settings
    return arms


def _later(name: str, value: Any) -> list[Any]:
    """The settings of an arm's later runs, each as an arm is written.

    Raises:
        ValueError: they are no list, or one of them is chained itself.
    """
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"arm {name!r}: then is a list with the settings of each later run, got {value!r}")
    later = [*plain_arms({f"{name}, run {number}": each for number, each in enumerate(value, 2)}).values()]
    if any(isinstance(each, dict) and THEN in each for each in later):
        raise ValueError(f"arm {name!r}: a later run has no `then` of its own: put its runs into the same list")
    for each in later:
        keys = [str(key) for key in each] if isinstance(each, dict) else [setting.partition("=")[0] for setting in each]
        if any(key.partition(".")[0] == "student" for key in keys):
            raise ValueError(f"arm {name!r}: a later run begins with the student of the one before: leave student out")
    return later


def labelled_axes(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    axes: dict[str, Any] = {}
    for key, values in value.items():
        if isinstance(values, dict):
            axes[str(key)] = {_label(label): setting for label, setting in values.items()}
            continue
        if not isinstance(values, list | tuple) or not values:
            raise ValueError(f"axis {key!r} must be a list of values or a mapping label: value, got {values!r}")
        labels = [_label(setting) for setting in values]
        _refuse_twice(str(key), labels)
        axes[str(key)] = dict(zip(labels, values, strict=True))
    return axes


def _refuse_twice(key: str, labels: Sequence[str]) -> None:
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ConfigError(
            f"axis {key}: {', '.join(twice)} stands there twice. Values that read alike need labels: "
            f"{key}: {{label: value, ...}}"
        )


def _label(value: Any) -> str:
    """How a value is shown: names and numbers as they are, settings with a name by it."""
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        return str(value["name"])
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return re.sub(r"\s+", " ", str(value))

"""The base of every config, and the error that names what is wrong with one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from cmapkd.config.resumable import models_in


class ConfigError(ValueError):
    """A config that cannot be used. Lists every problem at once; each unknown key comes with the closest known one.

    Attributes:
        problems: one line for each bad key or value, each starting with its dotted path; empty for other errors.
    """

    def __init__(self, message: str, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems


class RunStopped(RuntimeError):
    """A run that cannot go on, for a reason outside of cmapkd; says in words for its user why, and what to do."""


def closest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the nearest of `known`, or an empty string when none is near."""
    matches = difflib.get_close_matches(name, [str(k) for k in known], n=1, cutoff=0.55)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


class Config(BaseModel):
    """A frozen settings object: unknown keys are refused, every field has a type and a description."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    def changed(self, *names: str) -> tuple[str, ...]:
        """Those of these settings that do not have their defaults, so that idle ones can be refused."""
        fields = type(self).model_fields
        return tuple(
            name for name in names if getattr(self, name) != fields[name].get_default(call_default_factory=True)
        )

    @classmethod
    def from_mapping(cls, values: Any, *, where: str = "config") -> Self:
        """Validates plain data.

        Raises:
            ConfigError: with one line for each bad key or value.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            lines = [line for problem in error.errors() for line in _describe(cls, problem)]
            head = f"{where} has {len(lines)} problem{'s'[: len(lines) != 1]}:\n  "
            raise ConfigError(head + "\n  ".join(lines), tuple(lines)) from None


def _describe(root: type[BaseModel], problem: Any) -> list[str]:
    path = ".".join(str(part) for part in problem["loc"])
    inner = problem.get("ctx", {}).get("error")
    if isinstance(inner, ConfigError) and inner.problems:  # a section that was validated by a class of its own
        return [f"{path}.{line}" for line in inner.problems]
    return [_describe_one(root, problem)]


def _describe_one(root: type[BaseModel], problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    path = ".".join(location)
    if problem["type"] == "extra_forbidden":
        owner = _model_at(root, location[:-1])
        known = sorted(owner.model_fields) if owner else []
        return f"{path}: unknown key{closest(location[-1], known)}. Known here: {', '.join(known)}."
    if problem["type"] == "missing":
        return f"{path}: required, but not given."
    if problem["type"] == "value_error":
        message = str(problem["msg"]).removeprefix("Value error, ")
        return f"{path}: {message}" if path else message
    words = f"{_in_words(problem)} (got {problem['input']!r})."
    return f"{path}: {words}" if path else words


_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text",
    "path": "a path",
    "tuple": "a list",
    "list": "a list",
    "dict": "a mapping",
    "model": "a section of keys",
}
_BOUNDS = {"greater_than": ">", "greater_than_equal": ">=", "less_than": "<", "less_than_equal": "<="}


def _in_words(problem: Any) -> str:
    """What pydantic refuses, as a reader of YAML would say it."""
    kind, context = str(problem["type"]), problem.get("ctx", {})
    if kind in _BOUNDS:
        return f"must be {_BOUNDS[kind]} {next(iter(context.values()))}"
    if kind == "literal_error":
        return f"must be {context['expected']}"
    if kind in ("too_short", "too_long"):
        bound = context["min_length" if kind == "too_short" else "max_length"]
        return f"must have {'at least' if kind == 'too_short' else 'at most'} {bound} entries"
    if (first := kind.partition("_")[0]) in _KINDS and kind != "int_from_float":
        return f"must be {_KINDS[first]}"
    return str(problem["msg"])[:1].lower() + str(problem["msg"])[1:]


def _model_at(root: type[BaseModel], path: list[str]) -> type[BaseModel] | None:
    """The config class that owns the keys at `path`, looking through optional, list and union annotations."""
    candidates: list[type[BaseModel]] = [root]
    for key in path:
        fields = [model.model_fields[key].annotation for model in candidates if key in model.model_fields]
        if fields:  # otherwise `key` is a list position or a union's tag: the same candidates go on
            candidates = [model for annotation in fields for model in models_in(annotation)]
    return candidates[0] if candidates else None

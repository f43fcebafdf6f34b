"""Reads `settings.json`: the classes of settings, their sections in a recipe, and each setting in words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "settings.json"


@dataclass(frozen=True, slots=True)
class Setting:
    """One key of a section.

    Attributes:
        kind: its type and range in words.
        default: as YAML would be written; `required` where there is none.
    """

    key: str
    kind: str
    default: str
    about: str
    resumable: bool


class Index:
    """Settings by section. A section is named as in a recipe (`training`, `data.views`), or is one entry of a registry.

    Args:
        values: what `make_index` made.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.classes: dict[str, Any] = values["classes"]
        self.run, self.evaluate, self.compare = values["run"], values["evaluate"], values["compare"]
        self.engine: str = values["engine"]
        self.methods: dict[str, str] = values["methods"]
        self.weightings: dict[str, str] = values["weightings"]
        self.options: dict[str, str] = values["options"]
        self.cards: dict[str, Any] = values["cards"]
        self.families: dict[str, str] = values["families"]
        self.tiny: list[str] = values["tiny"]
        self.kinds: list[str] = values["kinds"]
        self.tasks: dict[str, Any] = values["tasks"]

    @property
    def sections(self) -> dict[str, str]:
        """The class of each section, in the order of the reference."""
        found = {"": self.run, **dict(self._below(self.run, ""))}
        found |= {f"method.{name}": kind for name, kind in self.methods.items()}
        for name, kind in self.methods.items():
            found |= dict(self._below(kind, f"method.{name}."))
        found |= {f"weighting.{name}": kind for name, kind in self.weightings.items()}
        found |= {f"options.{name}": kind for name, kind in self.options.items()}
        found |= {"evaluate": self.evaluate, **dict(self._below(self.evaluate, "evaluate."))}
        found |= {"compare": self.compare, **dict(self._below(self.compare, "compare."))}
        models = ("engine.models.",)  # their settings are those of `student`
        below = {key: kind for key, kind in self._below(self.engine, "engine.") if not key.startswith(models)}
        return found | {"engine": self.engine, **below}

    def about(self, kind: str) -> str:
        return str(self.classes[kind]["about"])

    def settings(self, kind: str) -> list[Setting]:
        """The settings of a class, with those that are sections of their own."""
        return [
            Setting(name, self._words(field), self._default(field), field["about"], field["resumable"])
            for name, field in self.classes[kind]["fields"].items()
            if not (name == "name" and kind in {*self.methods.values(), *self.weightings.values()})
        ]

    def _below(self, kind: str, above: str) -> Iterator[tuple[str, str]]:
        for name, field in self.classes[kind]["fields"].items():
            many = ".*" if "additionalProperties" in json.dumps(field["type"]) else ""
            for inner in dict.fromkeys(references(field["type"])):
                yield f"{above}{name}{many}", inner
                yield from self._below(inner, f"{above}{name}{many}.")

    def _words(self, field: Mapping[str, Any]) -> str:
        if field["registry"]:
            return f"one of the {field['registry']}, by name or with its settings"
        return in_words(field["type"])

    def _default(self, field: Mapping[str, Any]) -> str:
        if field["required"]:
            return "required"
        value = field["default"]
        if isinstance(value, dict) and value and references(field["type"]):
            return "its defaults"
        return "none" if value is None else json.dumps(value, ensure_ascii=False)


@cache
def read_index() -> Index:
    """The index that ships with cmapkd."""
    return Index(json.loads(FILE.read_text(encoding="utf-8")))


def references(schema: Any) -> list[str]:
    """The classes that a type names."""
    if isinstance(schema, dict):
        own = [schema["$ref"].rpartition("/")[2]] if "$ref" in schema else []
        return own + [name for value in schema.values() for name in references(value)]
    return [name for value in schema for name in references(value)] if isinstance(schema, list) else []


_NUMBERS = {"integer": "whole number", "number": "number"}
_RANGES = {
    "minimum": ">=",
    "exclusiveMinimum": ">",
    "maximum": "<=",
    "exclusiveMaximum": "<",
    "multipleOf": "a multiple of",
}


def in_words(schema: Mapping[str, Any]) -> str:
    """A JSON schema as a reader says it: `whole number >= 1, or none`."""
    if "anyOf" in schema:
        return ", or ".join(dict.fromkeys(map(in_words, schema["anyOf"])))
    if "$ref" in schema:
        return "a section"
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return " or ".join('"none"' if value == "none" else str(value) for value in values)  # the word, not null
    kind = schema.get("type", "any value")
    if kind in _NUMBERS:
        given = {sign: schema[key] for key, sign in _RANGES.items() if key in schema}
        bounds = " and ".join(
            f"{sign} {each:,}" if each == int(each) else f"{sign} {each:g}" for sign, each in given.items()
        )
        return f"{_NUMBERS[kind]} {bounds}".rstrip()
    if kind == "array" and "prefixItems" in schema:
        return f"{len(schema['prefixItems'])} x {in_words(schema['prefixItems'][0])}"
    if kind == "array":
        return f"list of {in_words(schema.get('items', {}))}"
    if kind == "object":
        inner = schema.get("additionalProperties")
        return f"names with {in_words(inner)} each" if isinstance(inner, dict) and inner else "a mapping"
    words = {"string": "text", "boolean": "true or false", "null": "none"}
    return "path" if schema.get("format") == "path" else words.get(kind, str(kind))

"""Checks a recipe against `settings.json`: unknown keys, types, ranges and names, with the words of the full check.

It refuses nothing that the classes themselves would take. They are asked after it, as only they know which settings go
together; but they need torch, and a misspelt key should not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import Field, WrapValidator, create_model

from cmapkd.config import Config, ConfigError, closest
from cmapkd.data.kinds import refuse_unknown_kind
from cmapkd.settings.index import Index, read_index

_BOUNDS = {
    "minimum": "ge",
    "exclusiveMinimum": "gt",
    "maximum": "le",
    "exclusiveMaximum": "lt",
    "multipleOf": "multiple_of",
    "minLength": "min_length",
    "minItems": "min_length",
    "maxItems": "max_length",
    "pattern": "pattern",
}
_SOURCES = {("DataConfig", role) for role in ("train", "val", "test")} | {("StreamConfig", "source")}
_ONE = {"methods": "method", "weightings": "weighting"}
_TUPLE: Any = tuple  # of types that are known only here
_DICT: Any = dict
_PLAIN: dict[str, Any] = {"string": str, "integer": int, "number": float, "boolean": bool, "null": None}


def check_recipe(values: Any, *, where: str) -> None:
    """Refuses the mistakes of a recipe that each stand in one key.

    Args:
        values: the recipe as plain data, its bases merged in.
    Raises:
        ConfigError: with one line for each bad key or value, as the full check words it.
    """
    outline = _Outline(read_index())
    outline.of(outline.index.run).from_mapping(values, where=where)


def check_evaluation(values: Any, *, where: str) -> None:
    """The same for the settings of `cmapkd evaluate`, with the names of its tasks.

    Raises:
        ConfigError: with one line for each bad key or value.
    """
    outline = _Outline(read_index())
    outline.of(outline.index.evaluate).from_mapping(values, where=where)
    named = values.get("tasks")
    known = [*outline.index.tasks, *_offered("cmapkd.tasks")]
    for name in named if isinstance(named, list) else ():
        if name not in known:
            raise ConfigError(f"tasks: unknown task {name!r}{closest(str(name), known)}; known: {', '.join(known)}")


def check_source(text: str) -> None:
    """Refuses the name of a data source whose kind nobody reads.

    Raises:
        ConfigError: with the nearest kind.
    """
    refuse_unknown_kind(text, [*read_index().kinds, *_offered("cmapkd.sources")])


class _Outline:
    """Classes of settings, made from the index. They know fields and ranges, and none of the classes' own rules."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.made: dict[tuple[str, bool], type[Config]] = {}

    def of(self, name: str, *, partial: bool = False) -> type[Config]:
        """The class of that name; `partial`: one that may lack what the class requires."""
        if (name, partial) not in self.made:
            fields: dict[str, Any] = {}
            for key, field in self.index.classes[name]["fields"].items():
                fields[key] = self._field({**field, "required": field["required"] and not partial})
                if (name, key) in _SOURCES:
                    fields[key] = (Annotated[fields[key][0], WrapValidator(self._source)], fields[key][1])
            self.made[name, partial] = create_model(name, __base__=Config, **fields)
        return self.made[name, partial]

    def _field(self, field: Mapping[str, Any]) -> tuple[Any, Any]:
        settings = Field(...) if field["required"] else Field(None, validate_default=False)
        if field["registry"]:
            return Annotated[Any, WrapValidator(self._by_name(field["registry"]))], settings
        annotation = self._type(field["type"])
        return (Annotated[annotation, WrapValidator(_mappings_alone)] if field["free"] else annotation), settings

    def _type(self, schema: Mapping[str, Any]) -> Any:
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            made = self.of(name)
            if not self.index.classes[name]["short"]:
                return made
            return Annotated[made, WrapValidator(self._model if name == "ModelConfig" else self._short(name))]
        if "anyOf" in schema:
            return Union[tuple(map(self._type, schema["anyOf"]))]  # noqa: UP007  of a list that is known only here
        if "enum" in schema or "const" in schema:
            return Literal[tuple(schema.get("enum", [schema.get("const")]))]
        bounds = {ours: schema[key] for key, ours in _BOUNDS.items() if key in schema}
        kind = schema.get("type")
        if kind == "array" and "prefixItems" in schema:
            return _TUPLE[tuple(map(self._type, schema["prefixItems"]))]
        made_of: Any
        if kind == "array":
            made_of = _TUPLE[self._type(schema.get("items", {})), ...]
        elif kind == "object":
            inner = schema.get("additionalProperties")
            made_of = _DICT[str, self._type(inner) if isinstance(inner, dict) else Any]
        elif kind == "string" and schema.get("format") == "path":
            made_of = Path
        else:
            made_of = _PLAIN.get(str(kind), Any)
        return Annotated[made_of, Field(**bounds)] if bounds else made_of

    def _short(self, name: str) -> Callable[[Any, Any], Any]:
        """A section that its first key alone may stand for; an override then makes `{name: ...}` of it."""
        first, *_ = fields = self.index.classes[name]["fields"]

        def check(value: Any, handler: Any) -> Any:
            if isinstance(value, dict) and "name" in value and "name" not in fields:
                value = {first: value["name"], **{key: each for key, each in value.items() if key != "name"}}
            return _mappings_alone(value, handler)

        return check

    def _source(self, value: Any, handler: Any) -> Any:
        """A source's name; its options are its opener's to know."""
        checked = handler(value)
        if isinstance(checked, str):
            refuse_unknown_kind(checked, [*self.index.kinds, *_offered("cmapkd.sources")])
        return checked

    def _model(self, value: Any, handler: Any) -> Any:
        """A model's name, or its settings with those of its family."""
        values = value if isinstance(value, dict) else {"name": value}
        checked = _mappings_alone(value, handler)
        name, options = str(values.get("name")), values.get("options")
        family, colon, _ = name.partition(":")
        if not colon or Path(name).exists():
            return checked
        if family not in (known := [*self.index.options, *_offered("cmapkd.models")]):
            raise ValueError(
                f"unknown model family {family!r} in {name!r}{closest(family, known)}; known: {', '.join(known)}"
            )
        if isinstance(options, dict) and family in self.index.options:
            kind = self.of(self.index.options[family], partial=True)
            create_model(family, __base__=Config, options=(kind, ...)).from_mapping({"options": options}, where=name)
        return checked

    def _by_name(self, registry: str) -> Callable[[Any, Any], Any]:
        known: dict[str, str] = getattr(self.index, registry)

        def check(value: Any, _: Any) -> Any:
            values = {"name": value} if isinstance(value, str) else value
            if not isinstance(values, dict) or (registry == "weightings" and "name" not in values):
                return value
            name = str(values.get("name"))
            if name in known:
                moved = self.index.classes[known[name]]["moved"]  # old names, which the class itself still reads
                values = {key: each for key, each in values.items() if key not in moved}
                return self.of(known[name]).from_mapping(values, where=f"{_ONE[registry]} {name}")
            names = [*known, *_offered(f"cmapkd.{registry}")]
            if name not in names:
                raise ConfigError(f"unknown {_ONE[registry]} {name!r}{closest(name, names)}; known: {', '.join(names)}")
            return value

        return check


def _offered(group: str) -> list[str]:
    """Names that installed packages add; none of them is imported."""
    return [point.name for point in sorted(entry_points(group=group), key=lambda point: point.name)]


def _mappings_alone(value: Any, handler: Any) -> Any:
    """What is no mapping may be short for one, in ways that only the class knows."""
    return handler(value) if isinstance(value, dict) else value

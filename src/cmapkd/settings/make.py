"""Writes `settings.json` and docs/settings.md from the config classes: `python -m cmapkd.settings.make`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import BaseModel, create_model

from cmapkd.compare.config import ComparisonConfig
from cmapkd.config import Config
from cmapkd.config.resumable import is_resumable, models_in
from cmapkd.data.open import KINDS
from cmapkd.engine.config import EngineConfig
from cmapkd.evaluation.config import SuiteConfig
from cmapkd.evaluation.tasks import TASKS
from cmapkd.methods import METHODS, MethodConfig
from cmapkd.models import FAMILIES
from cmapkd.models.packaged import packaged_models
from cmapkd.models.tiny import PRESETS
from cmapkd.run import RunConfig
from cmapkd.settings.index import FILE, Index
from cmapkd.settings.page import page
from cmapkd.weighting import WEIGHTINGS, WeightingConfig

_BASES: dict[type[Config], str] = {MethodConfig: "methods", WeightingConfig: "weightings"}
"""Sections whose class a name decides, and the registry of their names."""


def make_index() -> dict[str, Any]:
    """Everything that `Index` reads: cmapkd's own entries alone, as those of other packages differ by installation."""
    methods = {name: METHODS[name] for name in METHODS.own}
    weightings = {name: WEIGHTINGS[name].Config for name in WEIGHTINGS.own}
    options = {name: _options(name) for name in FAMILIES.own}
    roots: list[type[BaseModel]] = [RunConfig, SuiteConfig, ComparisonConfig, EngineConfig, *weightings.values()]
    roots += [*options.values()]
    roots += [kind.Config for kind in methods.values()]
    return {
        "run": RunConfig.__name__,
        "evaluate": SuiteConfig.__name__,
        "compare": ComparisonConfig.__name__,
        "engine": EngineConfig.__name__,
        "methods": {name: kind.Config.__name__ for name, kind in methods.items()},
        "weightings": {name: kind.__name__ for name, kind in weightings.items()},
        "options": {name: kind.__name__ for name, kind in options.items()},
        "cards": {name: asdict(kind.card) for name, kind in methods.items()},
        "families": {name: _about(name) for name in FAMILIES.own},
        "tiny": [*PRESETS, *packaged_models()],
        "kinds": list(KINDS.own),
        "tasks": {name: {"title": kind.title, "alone": kind.alone} for name, kind in TASKS.own.items()},
        "classes": {kind.__name__: _class(kind) for kind in _closure(roots)},
    }


def _about(family: str) -> str:
    """What stands behind a family's colon, as the first line of its module says it."""
    words = (import_module(f"cmapkd.models.{family}_family").__doc__ or "").splitlines()[0]
    return words.partition(": ")[2]


def _options(family: str) -> type[Config]:
    """The class of a family's options: those of its module whose names end so, joined where there are several."""
    module = import_module(f"cmapkd.models.{family}_family")
    kinds = [
        kind
        for name, kind in vars(module).items()
        if name.endswith("Options") and isinstance(kind, type) and issubclass(kind, Config)
    ]
    kinds.sort(key=lambda kind: kind.__module__ != module.__name__)  # the family's own sentence is about all
    if len(kinds) == 1:
        return kinds[0]
    fields: dict[str, Any] = {}
    for kind in kinds:
        for name, field in kind.model_fields.items():
            if not all(name in each.model_fields for each in kinds):
                field = copy(field)
                field.description = f"{field.description} Only {vars(kind)['takers']} take it."
            fields[name] = (field.annotation, field)
    make: Any = create_model  # its types know no bases that are found at run time
    joined: type[Config] = make(
        f"{family.title()}FamilyOptions", __base__=tuple(kinds), __doc__=kinds[0].__doc__, **fields
    )
    return joined


def _closure(roots: Iterable[type[BaseModel]]) -> list[type[BaseModel]]:
    """The classes with all that stand in their fields, by name.

    Raises:
        ValueError: two of them share a name.
    """
    found: dict[str, type[BaseModel]] = {}
    todo = list(roots)
    while todo:
        kind = todo.pop()
        if kind in _BASES or found.get(kind.__name__) is kind:
            continue
        if kind.__name__ in found:
            raise ValueError(f"{kind.__module__} and {found[kind.__name__].__module__} both have {kind.__name__}")
        found[kind.__name__] = kind
        for field in kind.model_fields.values():
            todo += models_in(field.annotation)
    return [found[name] for name in sorted(found)]


def _class(kind: type[BaseModel]) -> dict[str, Any]:
    schema = kind.model_json_schema(mode="validation")
    properties = schema.get("properties", schema.get("$defs", {}).get(kind.__name__, {}).get("properties", {}))
    decorators = kind.__pydantic_decorators__
    free = {
        name
        for validator in decorators.field_validators.values()
        if validator.info.mode == "before"
        for name in validator.info.fields
    }
    moved: dict[str, str] = getattr(kind, "moved", {})
    return {
        "about": (kind.__doc__ or "").strip().splitlines()[0],
        "short": any(validator.info.mode == "before" for validator in decorators.model_validators.values()),
        "moved": sorted(moved),
        "fields": dict(_fields(kind, properties, free)),
    }


def _fields(kind: type[BaseModel], properties: dict[str, Any], free: set[str]) -> Iterator[tuple[str, Any]]:
    for name, field in kind.model_fields.items():
        registry = next((_BASES[base] for base in models_in(field.annotation) if base in _BASES), None)
        yield (
            name,
            {
                "about": field.description or "",
                "type": {} if registry else _plain(properties[name]),
                "required": field.is_required(),
                "default": None if field.is_required() else _default(kind, name),
                "resumable": is_resumable(field),
                "free": name in free,
                "registry": registry,
            },
        )


def _default(kind: type[BaseModel], name: str) -> Any:
    value = kind.model_fields[name].get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return json.loads(json.dumps(value, default=str))


def _plain(schema: Any) -> Any:
    """A type's JSON schema without what the fields say themselves."""
    if isinstance(schema, dict):
        left_out = ("title", "description", "default", "resumable")
        return {key: _plain(value) for key, value in schema.items() if key not in left_out}
    return [_plain(each) for each in schema] if isinstance(schema, list) else schema


def _lines(values: dict[str, Any]) -> str:
    """JSON with a line for each class and card, so that a change of one is a change of its line."""
    parts = []
    for key, value in values.items():
        if isinstance(value, dict) and key in ("classes", "cards"):
            inner = (f"{json.dumps(name)}: {json.dumps(each, ensure_ascii=False)}" for name, each in value.items())
            parts.append(f"{json.dumps(key)}: {{\n" + ",\n".join(inner) + "\n}")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the files are as they would be written")
    parser.add_argument("--docs", type=Path, default=Path("docs/settings.md"), help="the page")
    given = parser.parse_args()
    values = make_index()
    files = {FILE: _lines(values), given.docs: page(Index(values))}
    for path, text in files.items():
        if given.check and (not path.is_file() or path.read_text(encoding="utf-8") != text):
            sys.exit(f"{path} is stale: python -m cmapkd.settings.make")
        if not given.check:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

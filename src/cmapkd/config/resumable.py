"""Which settings of a run may change when it is resumed: those that bear the mark `RESUMABLE` where they are declared.

A setting bears the mark if it only says who does the work, how much of it at once, where it is kept, how often it is
looked at, or when to give up. A setting that changes the weights or the scores bears none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

RESUMABLE: Final[dict[str, Any]] = {"resumable": True}
"""Give a field `json_schema_extra=RESUMABLE`."""

RESUME: Final = "resume the run"
"""The words by which a message advises a resume. The command line and the Python API each add how to do it there."""


@contextmanager
def resumed_by(how: str | Callable[[tuple[str, ...]], str]) -> Iterator[None]:
    """Adds `how`, a sentence of this interface, to an error whose message advises a resume.

    Args:
        how: the sentence; or what makes it of the settings (`key=value`) that the error says the resume needs.
    """
    try:
        yield
    except Exception as error:
        if RESUME in str(error):
            error.add_note(how if isinstance(how, str) else how(tuple(getattr(error, "settings", ()))))
        raise


def is_resumable(field: FieldInfo) -> bool:
    """Whether this setting, with all that is below it, may change at a resume."""
    extra = field.json_schema_extra
    return isinstance(extra, Mapping) and bool(extra.get("resumable"))


def declared(cls: type[BaseModel], above: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting that is no section, with its dotted key; below a mapping of names stands `*` for the name.

    A section that is of a class of its own in each run, such as `method`, shows what all of its classes share.
    """
    for name, field in cls.model_fields.items():
        key = f"{above}{name}"
        sections = list(models_in(field.annotation))
        below = f"{key}.*." if _is_mapping(field.annotation) else f"{key}."
        if not sections or is_resumable(field):
            yield key, field
        for section in sections:
            yield from declared(section, below)


def resumable_keys(cls: type[BaseModel]) -> tuple[str, ...]:
    """Dotted keys of the settings of this class that may change at a resume, in the order of their declaration."""
    return tuple(dict.fromkeys(key for key, field in declared(cls) if is_resumable(field)))


def fixed_differences(config: BaseModel, before: Any, after: Any) -> dict[str, str]:
    """Dotted keys whose values differ and may not, with both values as text.

    Args:
        config: the settings that `after` is the plain data of.
        before, after: plain data.
    """
    return dict(_differences(config, before, after, ""))


def _differences(config: Any, before: Any, after: Any, path: str) -> Iterator[tuple[str, str]]:
    if not (isinstance(before, dict) and isinstance(after, dict)):
        if before != after:
            yield path, f"was {before!r}, now {after!r}"
        return
    fields = type(config).model_fields if isinstance(config, BaseModel) else {}
    for key in {**before, **after}:
        if key not in fields or not is_resumable(fields[key]):
            below = config.get(key) if isinstance(config, Mapping) else getattr(config, str(key), None)
            yield from _differences(below, before.get(key), after.get(key), f"{path}.{key}" if path else str(key))


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The config classes of an annotation, through optionals, lists, mappings and unions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


def _is_mapping(annotation: Any) -> bool:
    return any(isinstance(part, type) and issubclass(part, Mapping) for part in _origins(annotation))


def _origins(annotation: Any) -> Iterator[Any]:
    yield getattr(annotation, "__origin__", annotation)
    for argument in get_args(annotation):
        yield from _origins(argument)

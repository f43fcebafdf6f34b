"""Recipes: YAML files, each a few lines over a `base`, plus `key=value` overrides from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from cmapkd.config.base import Config, ConfigError, closest

C = TypeVar("C", bound=Config)


def list_recipes() -> list[str]:
    """Names of the packaged recipes."""
    folder = resources.files("cmapkd.recipes")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def recipe_summary(name: str) -> str:
    """What a packaged recipe is for: the first sentence of the comment that it begins with."""
    text = (resources.files("cmapkd.recipes") / f"{name}.yaml").read_text(encoding="utf-8")
    comment: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    return " ".join(comment).partition(". ")[0].removesuffix(".")


def load_config(cls: type[C], recipe: str | Path, overrides: Sequence[str] = ()) -> C:
    """Reads a recipe (a packaged name or a YAML file), applies `a.b=c` overrides and validates the whole.

    Raises:
        ConfigError: the recipe is not found, is not YAML, or any key or value is wrong.
    """
    return cls.from_mapping(load_mapping(recipe, overrides), where=f"recipe {str(recipe)!r}")


def load_mapping(recipe: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The recipe's plain values, its bases merged in and `overrides` applied; not yet validated."""
    values: dict[str, Any] = {}
    for layer in _layers(recipe, seen=()):
        values = merge_mappings(values, layer)
    return apply_overrides(values, overrides, where=f"recipe {str(recipe)!r}")


def apply_overrides(values: dict[str, Any], overrides: Sequence[str], *, where: str) -> dict[str, Any]:
    """`values` with `key=value` overrides applied one after the other.

    Raises:
        ConfigError: an override is not `key=value`, or does not fit.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r} is not key=value, for example optim.learning_rate=0.001")
        _refuse_interpolation(override, "override")
        try:
            layer = OmegaConf.to_container(OmegaConf.from_dotlist([override]), resolve=False)
        except (OmegaConfBaseException, YAMLError, TypeError, ValueError) as error:
            raise ConfigError(f"override {override!r} does not fit {where}: {error}") from None
        assert isinstance(layer, dict)
        values = merge_mappings(values, {str(name): value for name, value in layer.items()})
    return values


def merge_mappings(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """`upper` over `lower`, section by section; lists are replaced.

    A section that is only a name (`method: clip_kd`) stands for `{name: clip_kd}` once `upper` sets something in it.
    """
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        if isinstance(value, dict):
            below = {"name": below} if isinstance(below, str) else below
            merged[key] = merge_mappings(below if isinstance(below, dict) else {}, value)
        else:
            merged[key] = value
    return merged


def _layers(recipe: str | Path, seen: tuple[str, ...]) -> list[dict[str, Any]]:
    """The recipe's mapping, preceded by those of its bases."""
    values, place = _read(recipe)
    here = str(Path(place).resolve())
    if here in seen:
        raise ConfigError(f"recipes form a circle: {' -> '.join((*seen, here))}")
    base = values.pop("base", None)
    if base is None:
        return [values]
    if not isinstance(base, str):
        raise ConfigError(f"recipe {place}: base must be one recipe's name or file, got {base!r}")
    beside = Path(place).parent / base
    return [*_layers(beside if beside.suffix and beside.exists() else base, (*seen, here)), values]


def yaml_problem(error: Exception) -> str:
    """What is wrong with a YAML text, and in which line; of other errors their own words."""
    from yaml import MarkedYAMLError

    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        return str(error)
    mark, begins = error.problem_mark, error.context_mark
    if begins is not None and begins.line != mark.line:
        return f"line {begins.line + 1}: {error.problem} {error.context}, seen in line {mark.line + 1}"
    before = ". The cause may stand in the line before" if mark.line else ""
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}{before}"


def _read(recipe: str | Path) -> tuple[dict[str, Any], str]:
    from omegaconf import OmegaConf
    from yaml import YAMLError

    path = Path(recipe)
    if not path.is_file():
        packaged = resources.files("cmapkd.recipes") / f"{recipe}.yaml"
        if path.suffix or not packaged.is_file():
            if path.is_dir():
                raise ConfigError(
                    f"{str(recipe)!r} is a folder, and a recipe is a YAML file. Make one for the pictures in it: "
                    f"cmapkd init {recipe} --out my_recipe.yaml"
                )
            known = list_recipes()
            raise ConfigError(
                f"there is no recipe {str(recipe)!r}{closest(str(recipe), known)}: give a YAML file or one of "
                f"{', '.join(known)}"
            )
        path = Path(str(packaged))
    try:
        text = path.read_text(encoding="utf-8")
        _refuse_interpolation(text, f"recipe {path}")
        values = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (YAMLError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"recipe {path} is not readable YAML: {yaml_problem(error)}") from None
    except AssertionError:  # how OmegaConf says that the file is a number or a truth value
        raise ConfigError(f"recipe {path} must be a mapping of keys, not a single value") from None
    if not isinstance(values, dict):
        raise ConfigError(f"recipe {path} must be a mapping of keys, not {type(values).__name__}")
    return {str(key): value for key, value in values.items()}, str(path)


def _refuse_interpolation(text: str, where: str) -> None:
    """A config is data: `${...}` could read the environment (and put a secret into the run folder)."""
    if "${" in text:
        raise ConfigError(f"{where} uses '${{...}}': configs are plain data, write the value out")

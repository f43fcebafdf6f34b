"""Layers of settings, of a base and of all arms, of one arm, of tuning and of axes, made into whole configs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cmapkd.compare.arms import Arm, first_task
from cmapkd.compare.config import ComparisonConfig
from cmapkd.config import ConfigError, apply_overrides, load_mapping, merge_mappings
from cmapkd.evaluation.run import with_reference
from cmapkd.methods import METHODS
from cmapkd.run import RunConfig

_OURS = {
    "seed": "list the seeds in `seeds`",
    "baseline": "make scratch training an arm (method: contrastive; of models that write, sft)",
}


@dataclass(frozen=True, slots=True)
class Resolver:
    """Makes whole configs of the settings of arms, axes and trials."""

    base: dict[str, Any]
    shared: _Shared

    @classmethod
    def of(cls, comparison: ComparisonConfig) -> Resolver:
        """Over the comparison's base and overrides.

        Raises:
            ConfigError: there is no such base, or an override does not fit it.
        """
        refuse_ours(apply_overrides({}, comparison.overrides, where="overrides"), "overrides")
        base = load_mapping(comparison.base, comparison.overrides) | {"baseline": "none"}
        return cls(base, _Shared.of(comparison.overrides, base))

    def resolve(self, layers: Iterable[dict[str, Any]], *, seed: int, where: str) -> tuple[RunConfig, list[str]]:
        """The config of these layers of settings, later ones over earlier ones.

        Returns:
            the config, and the settings of all arms that its method does not have.
        Raises:
            ConfigError: a key or value is wrong.
        """
        values, without = self.base, []
        for layer in layers:
            values, more = self.shared.over(values, layer)
            without += more
        config = RunConfig.from_mapping(values | {"seed": seed}, where=where)
        if METHODS[config.method.name].uses_teacher or with_reference(config.evaluation) is not None:
            return config, without
        if config.student.inherit is not None and config.student.inherit.name == "teacher":
            assert config.teacher is not None  # else the config had been refused
            what = (
                f"method {config.method.name} is compared without a teacher, so student.inherit cannot be teacher: "
                f"name the model itself, inherit: {config.teacher.name}"
            )
            raise ConfigError(what, (what,))
        return config.without_teachers(), without


class _Shared:
    """Settings of all arms, which an arm that names a section anew (`method: hinton`, `student: tiny:small`) keeps."""

    def __init__(self, settings: dict[str, dict[str, Any]]) -> None:
        self.settings = settings  # as written -> nested

    @classmethod
    def of(cls, overrides: Sequence[str], base: dict[str, Any]) -> _Shared:
        nested = {each: apply_overrides({}, [each], where="overrides") for each in overrides}
        # a later override may have named the section anew itself
        return cls({each: layer for each, layer in nested.items() if not _below_a_name(layer, base)})

    def over(self, values: dict[str, Any], settings: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """`settings` over `values`, where a section that they only name keeps what all arms share.

        Returns:
            the values, and the shared settings that the method named does not have.
        """
        values = merge_mappings(values, settings)
        lost = {each: layer for each, layer in self.settings.items() if _below_a_name(layer, values)}
        foreign = [each for each, layer in lost.items() if _is_foreign(layer, values)]
        for each, layer in lost.items():
            if each not in foreign:
                values = merge_mappings(values, layer)
        return values, foreign


def _is_foreign(layer: dict[str, Any], values: dict[str, Any]) -> bool:
    """Whether `layer` sets what the method that `values` name does not have."""
    name = values.get("method")
    if "method" not in layer or not isinstance(name, str) or name not in METHODS:
        return False  # a name that is wrong is refused later
    return not layer["method"].keys() <= METHODS[name].Config.model_fields.keys()


def _below_a_name(layer: Any, values: Any) -> bool:
    """Whether `layer` sets something in a section of which `values` hold the name alone."""
    if isinstance(values, str):
        return isinstance(layer, dict)
    return (
        isinstance(layer, dict)
        and isinstance(values, dict)
        and any(key in values and _below_a_name(below, values[key]) for key, below in layer.items())
    )


def layers_of(settings: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """One layer for each dotted key, sections before what is in them: method before method.temperature."""
    return [settings_of({key: settings[key]}, where) for key in sorted(settings, key=lambda key: key.count("."))]


def settings_of(arm: Arm, where: str) -> dict[str, Any]:
    """An arm's settings as one nested mapping, without those of its later runs; keys may be dotted."""
    arm, settings = first_task(arm), dict[str, Any]()
    if isinstance(arm, dict):
        for key, value in arm.items():
            for part in reversed(str(key).split(".")):
                value = {part: value}
            settings = merge_mappings(settings, value)
    else:
        settings = apply_overrides({}, arm, where=where)
    refuse_ours(settings, where)
    return settings


def refuse_ours(settings: dict[str, Any], where: str) -> None:
    for key, instead in _OURS.items():
        if key in settings:
            raise ConfigError(f"{where}: a comparison sets {key} itself: {instead}")

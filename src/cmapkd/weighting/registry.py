"""From a name or a mapping in a recipe to a weighting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from cmapkd.config import ConfigError, Registry, closest
from cmapkd.weighting.attention import AttentionWeighting
from cmapkd.weighting.bandit import BanditWeighting
from cmapkd.weighting.base import Weighting, WeightingConfig
from cmapkd.weighting.bilevel import BilevelWeighting
from cmapkd.weighting.controls import DWAWeighting, FAMOWeighting, RLWWeighting, SmallLossWeighting
from cmapkd.weighting.gate import GateWeighting
from cmapkd.weighting.gradient_alignment import GradientAlignmentWeighting
from cmapkd.weighting.gradnorm import GradNormWeighting
from cmapkd.weighting.manual import ManualWeighting
from cmapkd.weighting.policy import PolicyWeighting
from cmapkd.weighting.uncertainty import UncertaintyWeighting
from cmapkd.weighting.uniform import UniformWeighting

WEIGHTINGS: Registry[type[Weighting]] = Registry(
    "cmapkd.weightings",
    {
        "uniform": UniformWeighting,
        "manual": ManualWeighting,
        "uncertainty": UncertaintyWeighting,
        "gradnorm": GradNormWeighting,
        "gate": GateWeighting,
        "attention": AttentionWeighting,
        "policy": PolicyWeighting,
        "gradient_alignment": GradientAlignmentWeighting,
        "bilevel": BilevelWeighting,
        "bandit": BanditWeighting,
        "rlw": RLWWeighting,
        "dwa": DWAWeighting,
        "famo": FAMOWeighting,
        "small_loss": SmallLossWeighting,
    },
    base=Weighting,
)
"""The weightings by name: those here, and those that installed packages offer in the group `cmapkd.weightings`."""


def weighting_config(value: Any) -> WeightingConfig:
    """The settings that a recipe means; for a field validator with mode="before".

    Args:
        value: a name, a mapping with `name` and that weighting's settings, or settings already made.
    Raises:
        ConfigError: the name is missing or unknown, or a setting does not fit.
    """
    if isinstance(value, WeightingConfig):
        return value
    values = {"name": value} if isinstance(value, str) else value
    if not isinstance(values, dict) or "name" not in values:
        raise ConfigError(
            f"a weighting is a name or a mapping with `name` and its settings, got {value!r}; "
            f"known: {', '.join(WEIGHTINGS)}"
        )
    return _kind(str(values["name"])).Config.from_mapping(values, where=f"weighting {values['name']}")


def for_items(config: WeightingConfig, groups: Mapping[str, Sequence[str]]) -> dict[str, WeightingConfig]:
    """One weighting's settings split for several groups of items, where a setting names items of all of them.

    Args:
        groups: items by group, `{"visual": ("P2", ...), "language": ("L1", ...)}`.
    Returns:
        Settings by group; each names only that group's items.
    Raises:
        ConfigError: an item is in no group.
    """
    known = [item for items in groups.values() for item in items]
    by_item = {key: value for key, value in config if isinstance(value, dict | tuple) and _of_names(value)}
    for key, values in by_item.items():
        for item in values:
            if item not in known:
                raise ConfigError(
                    f"{key}.{item}: unknown item{closest(item, known)}; weighed here: {', '.join(known) or 'none'}"
                )
    return {
        group: config.model_copy(update={key: _only(values, items) for key, values in by_item.items()})
        for group, items in groups.items()
    }


def make_weighting(
    config: WeightingConfig, *, items: Sequence[str], context_dim: int, level_widths: Sequence[int] | None = None
) -> Weighting:
    """The weighting that `config` names, for `items` (level or term names) and contexts of width `context_dim`.

    Args:
        level_widths: where the items are levels within a term, the widths of their own vectors, which are the context
            of a weighting that `reads_levels`; None: they are whole terms.

    Raises:
        ConfigError: the name is unknown, a setting by item does not fit the items, or it cannot weigh such items.
        ValueError: there are no items, two of the same name, or no context.
    """
    kind = _kind(config.name)
    if level_widths is not None and kind.reads_gradients:
        raise ConfigError(
            f"weighting {config.name} balances the gradients of whole terms, so it cannot weigh levels: use it as "
            "method.term_weighting, or choose another weighting of levels"
        )
    if level_widths is None and kind.joint:
        raise ConfigError(
            f"weighting {config.name} weighs levels and terms together: use it as method.weighting of cmapkd, which "
            "weighs its terms, too"
        )
    make: Any = kind
    if not kind.reads_levels:
        return cast(Weighting, make(config, items=items, context_dim=context_dim))
    if level_widths is None:
        raise ConfigError(
            f"weighting {config.name} looks at the vectors of levels, which whole terms have none of: use it as "
            "method.weighting of cmapkd, or choose another weighting of terms"
        )
    return cast(Weighting, make(config, items=items, widths=level_widths))


def _of_names(value: Mapping[Any, Any] | tuple[Any, ...]) -> bool:
    return all(isinstance(item, str) for item in value)


def _only(values: Mapping[str, Any] | tuple[str, ...], items: Sequence[str]) -> Any:
    """What a setting says of some of the items."""
    if isinstance(values, tuple):
        return tuple(item for item in items if item in values)
    return {item: values[item] for item in items if item in values}


def _kind(name: str) -> type[Weighting]:
    if name not in WEIGHTINGS:
        raise ConfigError(f"unknown weighting {name!r}{closest(name, WEIGHTINGS)}; known: {', '.join(WEIGHTINGS)}")
    return WEIGHTINGS[name]

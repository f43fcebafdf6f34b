"""Settings of CMAPKD: those that matter, those of the bank, and those of what is off.

What was measured of the defaults: docs/results/cmapkd_parts.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from cmapkd.config import Config, closest
from cmapkd.features import LANGUAGE_LEVELS, VISUAL_LEVELS, Depths, KeyTokensBy, Places
from cmapkd.methods.banked import BankConfig
from cmapkd.methods.card import MethodConfig
from cmapkd.methods.cmapkd.levels import INNER, INTRA, JOINT, LEVELS, PAIRS, prior_by_pair
from cmapkd.weighting import WEIGHTINGS, WeightingConfig, weighting_config

Reading = Literal["teacher", "student", "losses"]


class AblationsConfig(Config):
    """Terms and variants that are off: some showed no gain, others have no measurement. Kept to be measured."""

    bank_within_weight: float = Field(0.0, ge=0, description="Weight of the KL over a bank of the same modality.")
    bank_level_weight: float = Field(
        0.0, ge=0, description="Weight of the KL over a bank of the teacher's vectors of the same inner level."
    )
    bank_level_scale: float = Field(
        14.3, gt=0, description="Logit scale of these cosines, which are taken about the bank's mean."
    )
    bank_pair_weight: float = Field(
        0.0, ge=0, description="Weight of the KL at the coupled inner pairs, over a bank of the other modality's level."
    )
    pyramid_weight: float = Field(0.0, ge=0, description="Weight of the KL between coupled levels of both modalities.")
    coupling: dict[str, float] = Field(default_factory=prior_by_pair, description="What each pair of levels counts.")
    alignment_weight: float = Field(0.0, ge=0, description="Weight of the student's InfoNCE at the coupled pairs.")
    relation_weight: float = Field(0.0, ge=0, description="Weight of the Gram matrices over the batch, by level.")
    layer_relation_weight: float = Field(0.0, ge=0, description="Weight of the cosines between a sample's levels.")
    bridge_dim: int = Field(256, ge=1, description="Width of the space in which levels of both modalities meet.")
    selection_reads: tuple[Reading, ...] = Field(
        ("teacher",),
        min_length=1,
        description="What a gate or policy sees of a sample: embeddings of teacher or student, losses of the levels.",
    )
    projector: Literal["shared", "own"] = Field(
        "shared", description="Of the embeddings to the teacher's width: one map for both modalities, or one each."
    )
    grids: Literal["native"] | dict[str, float] = Field(
        "native", description="native: the student's own grids; or factors of its patch grid by level (P2: 4, ...)."
    )
    top_down: bool = Field(False, description="A feature pyramid network in place of one linear map for each level.")
    depths: Depths = Field(
        "last", description="What an inner level is of its depth group: the last block's output, or the blocks' mean."
    )
    phrase_window: int = Field(3, ge=1, description="Words in a phrase of L2.")
    key_tokens_by: KeyTokensBy = Field("class", description="What makes a token key: see `features.KeyTokens`.")

    @field_validator("coupling")
    @classmethod
    def _pairs_are_known(cls, value: dict[str, float]) -> dict[str, float]:
        return _checked(value, PAIRS)

    @field_validator("selection_reads")
    @classmethod
    def _each_once(cls, value: tuple[Reading, ...]) -> tuple[Reading, ...]:
        if len({*value}) < len(value):
            raise ValueError(f"names something twice: {', '.join(value)}")
        return value


class MovedSettingWarning(UserWarning):
    """A recipe gives a setting under its old name. Says the new one."""


_MOVED = {f"bank_{name.replace('source', 'from')}": f"bank.{name}" for name in BankConfig.model_fields} | {
    name: f"ablations.{name}" for name in AblationsConfig.model_fields
}
"""Where settings stand now that stood beside the others once."""


def _relational_of(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The weight of `relational` and the ablations, where the joint space still is one of the coupled pairs.

    It was one until the term got a weight of its own. An older run folder has every setting but this weight.
    """
    ablations = values.get("ablations")
    coupling = ablations.get("coupling") if isinstance(ablations, dict) else None
    if not isinstance(ablations, dict) or not isinstance(coupling, dict):
        return None
    older = "relational_weight" not in values and AblationsConfig.model_fields.keys() <= ablations.keys()
    if JOINT not in coupling and not older:
        return None
    if "relational_weight" in values:
        raise ValueError(
            f"ablations.coupling.{JOINT} and relational_weight are one setting, and both are given: keep "
            "relational_weight"
        )
    inner = {pair: count for pair, count in coupling.items() if pair != JOINT}
    weight = ablations.get("pyramid_weight", 0.0)
    return {
        "relational_weight": weight * coupling.get(JOINT, 0.0),
        "ablations": {**ablations, "coupling": inner, "pyramid_weight": weight if inner else 0.0},
    }


class CMAPKDConfig(MethodConfig):
    """What each term counts and which levels it reads; a weight of zero switches a computation off."""

    moved: ClassVar[Mapping[str, str]] = _MOVED  # old names that are still read

    task_weight: float = Field(1.0, ge=0, description="Weight of the student's own contrastive loss.")
    interactive_weight: float = Field(2.87, ge=0, description="Weight of InfoNCE against the teacher's other modality.")
    relational_weight: float = Field(1.88, ge=0, description="Weight of the KL between in-batch similarities.")
    bank_weight: float = Field(2.83, ge=0, description="Weight of the KL over a bank of the other modality.")
    visual_weight: float = Field(1.0, ge=0, description="Weight of the visual pyramid within its modality.")
    language_weight: float = Field(1.0, ge=0, description="Weight of the language hierarchy within its modality.")
    visual_levels: dict[str, float] = Field(
        {"P2": 64.0, "P5": 4.0}, description="What each visual level counts before the selection; others are not read."
    )
    language_levels: dict[str, float] = Field(
        {"L1": 64.0, "L2": 64.0, "L3": 64.0, "L4": 1.0}, description="What each language level counts, likewise."
    )
    weighting: SerializeAsAny[WeightingConfig] = Field(
        default_factory=lambda: weighting_config("uniform"), description="Who decides how much each level counts."
    )
    places: Places = Field(
        "dense", description="Where inner levels are compared: every place, the key tokens, or one pooled vector each."
    )
    key_tokens: int = Field(16, ge=1, description="Key tokens of a level, for places: key_tokens.")
    bank: BankConfig = Field(default_factory=BankConfig, description="The bank of teacher embeddings.")
    ablations: AblationsConfig = Field(default_factory=AblationsConfig, description="Terms and variants that are off.")

    @model_validator(mode="before")
    @classmethod
    def _settings_that_moved(cls, values: Any) -> Any:
        """Puts settings under their old names, of recipes and run folders from before they moved, where they belong."""
        if not isinstance(values, dict):
            return values
        kept, moved = {name: value for name, value in values.items() if name not in _MOVED}, []
        for name in (name for name in values if name in _MOVED):
            section, _, setting = _MOVED[name].partition(".")
            inside = kept.get(section) or {}
            if not isinstance(inside, dict):
                return values  # no section of settings: refused for what it is
            if setting in inside:
                raise ValueError(f"{name} and {_MOVED[name]} are one setting, and both are given: keep {_MOVED[name]}")
            kept[section] = {**inside, setting: values[name]}
            moved.append(f"{_MOVED[name]} in place of {name}")
        if (joint := _relational_of(kept)) is not None:
            kept |= joint
            moved.append(f"relational_weight in place of ablations.coupling.{JOINT}")
        if moved:
            warnings.warn(f"settings of cmapkd have moved: write {', '.join(moved)}", MovedSettingWarning, stacklevel=2)
        return kept

    @field_validator("weighting", mode="before")
    @classmethod
    def _selection_by_name(cls, value: Any) -> Any:
        return value if isinstance(value, WeightingConfig) else weighting_config(value)

    @field_validator("visual_levels")
    @classmethod
    def _visual_levels_are_known(cls, value: dict[str, float]) -> dict[str, float]:
        return _checked(value, VISUAL_LEVELS)

    @field_validator("language_levels")
    @classmethod
    def _language_levels_are_known(cls, value: dict[str, float]) -> dict[str, float]:
        return _checked(value, LANGUAGE_LEVELS)

    @model_validator(mode="after")
    def _selection_reads_it(self) -> Self:
        name = self.weighting.name
        if self.ablations.selection_reads != ("teacher",) and not WEIGHTINGS[name].reads_context:
            raise ValueError(
                f"ablations.selection_reads is for weightings that look at such a context, and {name} does not: leave "
                "it out, or take weighting gate or policy"
            )
        return self

    @model_validator(mode="after")
    def _places_fit(self) -> Self:
        ablations = self.ablations
        if self.places != "dense" and (ablations.top_down or ablations.grids != "native"):
            raise ValueError(
                f"places: {self.places} has no grids to resample: leave ablations.top_down and ablations.grids as they "
                "are"
            )
        if self.places == "key_tokens" and ablations.depths == "mean":
            raise ValueError(
                "each block has key tokens of its own, so their mean has none: take ablations.depths: last"
            )
        return self

    @model_validator(mode="after")
    def _something_is_coupled(self) -> Self:
        for name in ("pyramid_weight", "alignment_weight", "bank_pair_weight"):
            if getattr(self.ablations, name) and not self.coupled():
                raise ValueError(
                    f"ablations.{name} counts pairs of levels, and ablations.coupling has none: leave it out, or give "
                    "some, such as {P2-L1: 1, P4-L3: 0.5}"
                )
        return self

    @model_validator(mode="after")
    def _bank_has_levels(self) -> Self:
        if self.bank.source == "cache" and (self.ablations.bank_level_weight or self.ablations.bank_pair_weight):
            raise ValueError(
                "bank.source: cache holds embeddings only: for bank_level_weight and bank_pair_weight take "
                "bank.source: run"
            )
        return self

    def weight_of(self, level: str) -> float:
        """What a level counts within its modality; 0: it is not compared with the teacher's."""
        if level in VISUAL_LEVELS:
            return self.visual_weight and self.visual_levels.get(level, 0.0)
        return self.language_weight and self.language_levels.get(level, 0.0)

    def compared(self) -> tuple[str, ...]:
        """Levels that are compared with the teacher's same level."""
        return tuple(level for level in LEVELS if self.weight_of(level))

    def coupled(self) -> dict[str, float]:
        """What each pair of levels counts where modalities meet; pairs that count nothing are left out."""
        ablations = self.ablations
        wanted = (
            ablations.pyramid_weight
            or ablations.alignment_weight
            or ablations.bank_pair_weight
            or ablations.layer_relation_weight  # compares levels through the bridge, which learns by the pairs
        )
        return {pair: ablations.coupling[pair] for pair in PAIRS if ablations.coupling.get(pair)} if wanted else {}

    def bridged(self) -> tuple[str, ...]:
        """Levels that are mapped into the space which both modalities share."""
        levels = {level for pair in self.coupled() for level in pair.split("-")}
        return tuple(level for level in LEVELS if level in levels or self.ablations.layer_relation_weight)

    def levels_against_bank(self) -> tuple[str, ...]:
        """Inner levels that are compared with a bank of the teacher's."""
        return tuple(level for level in INNER if self.ablations.bank_level_weight and self.weight_of(level))

    def levels_in_bank(self) -> tuple[str, ...]:
        """Levels of which the bank keeps the teacher's vectors."""
        pairs = self.coupled() if self.ablations.bank_pair_weight else ()
        read = {*self.levels_against_bank(), *(level for pair in pairs for level in pair.split("-"))}
        return tuple(level for level in LEVELS if level in read)

    def level_names(self) -> tuple[str, ...]:
        """Every level that some term reads."""
        of_pairs = {level for pair in self.coupled() for level in pair.split("-")}
        everything = self.ablations.relation_weight or self.ablations.layer_relation_weight
        return tuple(level for level in LEVELS if everything or self.weight_of(level) or level in of_pairs)

    def weighed_items(self) -> dict[str, tuple[str, ...]]:
        """Levels, or pairs of levels, that the selection weighs within a term."""
        of_levels = {term: tuple(level for level in levels if self.weight_of(level)) for term, levels in INTRA.items()}
        return {**of_levels, "pyramid": tuple(self.coupled())}

    def term_weights(self) -> dict[str, float]:
        """The terms that count, with their weights."""
        ablations = self.ablations
        weights = {
            "contrastive": self.task_weight,
            "interactive": self.interactive_weight,
            "relational": self.relational_weight,
            "bank": self.bank_weight,
            "bank_within": ablations.bank_within_weight,
            "bank_level": ablations.bank_level_weight if self.levels_against_bank() else 0.0,
            "bank_pair": ablations.bank_pair_weight,
            "visual": self.visual_weight if any(map(self.weight_of, VISUAL_LEVELS)) else 0.0,
            "language": self.language_weight if any(map(self.weight_of, LANGUAGE_LEVELS)) else 0.0,
            "pyramid": ablations.pyramid_weight,
            "alignment": ablations.alignment_weight,
            "bridge": 1.0
            if ablations.pyramid_weight or ablations.bank_pair_weight or ablations.layer_relation_weight
            else 0.0,
            "relation": ablations.relation_weight,
            "layer_relation": ablations.layer_relation_weight,
        }
        return {term: weight for term, weight in weights.items() if weight}


def _checked(weights: dict[str, float], known: tuple[str, ...]) -> dict[str, float]:
    """The weights, once their names are known and none is negative."""
    for name, weight in weights.items():
        if name not in known:
            raise ValueError(f"unknown {name!r}{closest(name, known)}; known: {', '.join(known)}")
        if weight < 0:
            raise ValueError(f"{name} is {weight:g}, weights are not negative")
    return weights

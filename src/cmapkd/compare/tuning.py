"""Budgets of tuning as part of a comparison: trials, their lengths, seeds, and the space of every family."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from cmapkd.compare.space import Space, read_space
from cmapkd.config import Config


class RungConfig(Config):
    """One round of successive halving: how long its trials are, and how many go on."""

    steps: int | None = Field(None, ge=1, description="Optimizer steps of each trial; give this or share.")
    share: float | None = Field(None, gt=0, le=1, description="Fraction of the arm's own length; give this or steps.")
    keep: int = Field(1, ge=1, description="The best so many go on to the next round; 1 in the last: the winner.")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.share is None):
            raise ValueError(f"give steps or share, not {'neither' if self.steps is None else 'both'}")
        return self


class FamilyConfig(Config):
    """Arms that get the settings of one search."""

    arms: tuple[str, ...] = Field(
        (), description="Arms that get the winner's settings; the first is tuned. None: the arm of the family's name."
    )
    space: Space = Field(default_factory=dict, description="Searched by this family beside what all search.")
    trials: int | None = Field(None, ge=1, description="Another number than all have; the tables say so.")

    @field_validator("space", mode="before")
    @classmethod
    def _readable_space(cls, value: Any) -> Any:
        return read_space(value)


class TuningConfig(Config):
    """How the settings of arms are chosen before they are compared, alike for every family of them."""

    winners: str | None = Field(
        None, description="A tuned.yaml of an earlier tuning, whose winners are taken: no trial is run."
    )
    metric: str = Field(
        "retrieval.mean_r@1", description="Dotted path in the student's scores on data.val: what a trial is judged by."
    )
    trials: int = Field(16, ge=1, description="Settings tried for each family; the first is the arm as declared.")
    halving: tuple[RungConfig, ...] | int = Field(
        1,
        description="Rounds of {steps or share, keep}; or a number n: each round keeps one in n and is n times longer.",
    )
    seeds: tuple[int, ...] = Field((), description="Seeds of the trials, none of them the comparison's.")
    draw: int = Field(0, ge=0, description="Seed of the draws from the spaces.")
    at: dict[str, str] = Field(
        default_factory=dict, description="Axis -> value at which trials are run; needed where there are axes."
    )
    space: Space = Field(default_factory=dict, description="Key -> list, {log: [a, b]} or {uniform: [a, b]}; for all.")
    families: dict[str, FamilyConfig] = Field(default_factory=dict, description="Name -> arms and space.")

    @field_validator("space", mode="before")
    @classmethod
    def _readable_space(cls, value: Any) -> Any:
        return read_space(value)

    @field_validator("families", mode="before")
    @classmethod
    def _families_by_name(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
            return {name: {} for name in value}
        return (
            {name: {} if each is None else each for name, each in value.items()} if isinstance(value, dict) else value
        )

    @field_validator("at", mode="before")
    @classmethod
    def _labels(cls, value: Any) -> Any:
        return {str(axis): str(label) for axis, label in value.items()} if isinstance(value, dict) else value

    @field_validator("seeds")
    @classmethod
    def _seeds_once(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value) or min(value, default=0) < 0:
            raise ValueError(f"seeds are whole numbers >= 0, each once; got {', '.join(map(str, value))}")
        return value

    @model_validator(mode="after")
    def _rounds_that_choose(self) -> Self:
        if isinstance(self.halving, int):
            if self.halving < 1:
                raise ValueError(f"halving is 1 for one round at the full length, or more; got {self.halving}")
            return self
        rounds = self.halving
        keeps = [each.keep for each in rounds]
        lengths = [each.steps or each.share or 0 for each in rounds]
        if not rounds or keeps[-1] != 1 or sorted(set(keeps), reverse=True) != keeps:
            raise ValueError(f"rounds of halving keep fewer and fewer, the last one 1; got keep {keeps}")
        if len({each.steps is None for each in rounds}) > 1 or sorted(set(lengths)) != lengths:
            raise ValueError(f"rounds of halving get longer, all in steps or all in share; got {lengths}")
        return self

    @model_validator(mode="after")
    def _something_to_tune(self) -> Self:
        if self.winners is not None:
            return self
        if not self.families:
            raise ValueError("there is nothing to tune: give families, or winners of an earlier tuning")
        if not self.seeds:
            raise ValueError("trials need seeds of their own, which the comparison does not have: seeds: [100]")
        owners: dict[str, str] = {}
        for name in self.families:
            if not self.space_of(name):
                raise ValueError(f"family {name!r} has nothing to search: give it a space, or give all one")
            for arm in self.arms_of(name):
                if arm in owners:
                    raise ValueError(f"arm {arm!r} is in families {owners[arm]!r} and {name!r}: one of them tunes it")
                owners[arm] = name
        return self

    def arms_of(self, family: str) -> tuple[str, ...]:
        """The arms that get the winner's settings; the first is the one that is tuned."""
        return self.families[family].arms or (family,)

    def space_of(self, family: str) -> Space:
        """All that the family searches; its own values of a key go before those of all."""
        return self.space | self.families[family].space

    def trials_of(self, family: str) -> int:
        return self.families[family].trials or self.trials

    def rounds(self, trials: int) -> tuple[RungConfig, ...]:
        """The rounds of a family with so many trials, lengths written out."""
        if not isinstance(self.halving, int):
            return self.halving
        sizes = [trials]
        while self.halving > 1 and sizes[-1] // self.halving > 1:
            sizes.append(sizes[-1] // self.halving)
        keeps = [*sizes[1:], 1]
        shares = [float(self.halving) ** -place for place in range(len(sizes))][::-1]
        return tuple(RungConfig(share=share, keep=keep) for share, keep in zip(shares, keeps, strict=True))

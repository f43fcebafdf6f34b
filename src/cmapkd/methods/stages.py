"""Progressive stages: stretches of a run with terms, levels, trainable parts and a learning rate of their own."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Self

from pydantic import Field, model_serializer, model_validator

from cmapkd.config import Config, ConfigError, closest

ParameterPart = Literal["student", "modules", "weighting"]
PARTS: tuple[ParameterPart, ...] = ("student", "modules", "weighting")


class StageConfig(Config):
    """One stage. What is left out of it costs nothing: no forward, no loss, no gradient."""

    name: str = Field("", description="Shown when the stage begins.")
    share: float | None = Field(None, gt=0, le=1, description="Share of training.steps; or steps, or epochs.")
    steps: int | None = Field(None, ge=1, description="Its length in optimizer steps; then training.steps is left out.")
    epochs: float | None = Field(None, gt=0, description="Its length in passes over the data, likewise.")
    terms: tuple[str, ...] | None = Field(None, description="Loss terms that count; none: all of the method's.")
    levels: tuple[str, ...] | None = Field(None, description="Levels that count (P2 ... L4); none: all.")
    train: tuple[str, ...] = Field(
        PARTS,
        min_length=1,
        description="What learns: student, modules, weighting; or a part of the student that the method names.",
    )
    learning_rate: float | None = Field(None, gt=0, description="Peak rate here; none: optim.learning_rate.")
    data: str | None = Field(
        None, description="The stream of data.more that this stage reads alone; none: all, each by its share."
    )
    sparsity: float | None = Field(
        None, gt=0, lt=1, description="Share of the student's first weights that masks shall have taken out at its end."
    )

    @model_serializer(mode="wrap")
    def _without_default(self, handler: Any) -> dict[str, Any]:
        """A stage without masks, and one that reads all data, is written as it was before there were any."""
        values: dict[str, Any] = handler(self)
        return {key: value for key, value in values.items() if value is not None or key not in ("sparsity", "data")}

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if sum(value is not None for value in (self.share, self.steps, self.epochs)) != 1:
            raise ValueError("a stage has one length: give share, steps or epochs")
        return self

    def wants_term(self, name: str) -> bool:
        return self.terms is None or name in self.terms

    def wants_level(self, name: str) -> bool:
        return self.levels is None or name in self.levels

    def check_names(self, *, terms: Sequence[str], levels: Sequence[str]) -> None:
        """Refuses terms and levels that the method does not have.

        Raises:
            ConfigError: names the nearest that it has.
        """
        for kind, asked, known in (("term", self.terms, terms), ("level", self.levels, levels)):
            for name in asked or ():
                if name not in known:
                    raise ConfigError(
                        f"stage {self.name!r}: the method, as it is set, has no {kind} {name!r}{closest(name, known)}; "
                        f"it has: {', '.join(known) or 'none'}"
                    )


WHOLE_RUN = StageConfig(name="whole", share=1.0)
"""A run without stages: everything counts, everything learns."""


def length_of_stages(stages: Sequence[StageConfig]) -> Literal["share", "steps", "epochs"] | None:
    """How the stages state their lengths; None without stages.

    Raises:
        ValueError: they mix ways, or their shares do not sum to 1.
    """
    if not stages:
        return None
    kinds = {kind for stage in stages for kind in _LENGTHS if getattr(stage, kind) is not None}
    if len(kinds) > 1:
        raise ValueError(f"stages state their lengths in different ways ({', '.join(sorted(kinds))}): use one for all")
    kind = kinds.pop()
    total = sum(stage.share or 0.0 for stage in stages)
    if kind == "share" and abs(total - 1) > 1e-6:
        raise ValueError(f"the shares of the stages sum to {total:g}, not to 1")
    return kind


_LENGTHS: tuple[Literal["share", "steps", "epochs"], ...] = ("share", "steps", "epochs")


def stage_ends(stages: Iterable[StageConfig], *, total: int, steps_per_epoch: int) -> list[int]:
    """Steps done when each stage ends; the last is the run's total. Every stage has at least one step.

    Raises:
        ConfigError: there are fewer steps than stages.
    """
    ends: list[int] = []
    shares = 0.0
    for stage in stages:
        before = ends[-1] if ends else 0
        if stage.share is not None:
            shares += stage.share
            ends.append(max(before + 1, round(shares * total)))
        else:
            ends.append(before + (stage.steps or max(1, round((stage.epochs or 0) * steps_per_epoch))))
    if ends and ends[-1] > total:
        raise ConfigError(f"{total} steps are too few for {len(ends)} stages: raise training.steps")
    return ends


def stream_by_step(stages: Sequence[StageConfig], ends: Sequence[int]) -> Callable[[int], str | None] | None:
    """The stream that each step reads alone, None for all streams; None in place of the function if no stage says.

    Args:
        ends: steps done when each stage ends, see `stage_ends`.
    """
    if all(stage.data is None for stage in stages):
        return None
    return lambda step: stages[bisect_right(ends, step)].data

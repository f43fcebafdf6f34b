"""Methods under which a student becomes smaller: stages with learned masks, each followed by what is left."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, field_validator, model_serializer
from torch import Tensor, nn

from cmapkd.config import Config, ConfigError
from cmapkd.data.types import Batch
from cmapkd.methods.card import MethodConfig
from cmapkd.methods.dual import DualEncoderMethod
from cmapkd.methods.stages import ParameterPart, StageConfig
from cmapkd.methods.step import StepInfo
from cmapkd.methods.terms import Term
from cmapkd.models import DualEncoder, FrozenTeacher
from cmapkd.models.cut import sampled, weights_in
from cmapkd.models.masked import MaskedEncoder, check_prunable
from cmapkd.models.prunable import TowerSizes
from cmapkd.objectives import sparsity_constraint, target_sparsity

TERM = "sparsity"
_SLACK = 0.03  # of all weights; expected and chosen numbers of units differ by rounding


class MasksConfig(Config):
    """Which units go, how many, and how fast that is learned."""

    sparsity: tuple[float, ...] = Field(
        (),
        description="Shares of the first student's weights that are gone after each pair of stages, one with masks and "
        "one without; none: as training.stages say.",
    )
    share: float = Field(0.5, gt=0, lt=1, description="Share of each such pair that its stage with masks has.")
    warmup: float = Field(
        1 / 3, ge=0, le=1, description="Share of a stage with masks after which the whole of its sparsity is asked for."
    )
    rate: float = Field(0.02, gt=0, description="Learning rate of masks and multipliers, whatever the schedule says.")
    strength: float = Field(10.0, ge=0, description="What both multipliers begin with.")
    choice: Literal["learned", "random"] = Field(
        "learned", description="random: units are drawn at random when the stage begins, for comparison."
    )

    @field_validator("sparsity")
    @classmethod
    def _rising(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not before < after for before, after in zip((0.0, *value), (*value, 1.0), strict=True)):
            raise ValueError(f"{[*value]} must rise, between 0 and 1: each counts from the student as the run begins")
        return value


class PruningConfig(MethodConfig):
    """Settings of a method whose student may become smaller."""

    masks: MasksConfig | None = Field(None, description="How the student becomes smaller; none: it keeps its size.")

    @model_serializer(mode="wrap")
    def _without_default(self, handler: Any) -> dict[str, Any]:
        """A method without masks is written as it was before there were any."""
        values: dict[str, Any] = handler(self)
        return values if self.masks is not None else {key: value for key, value in values.items() if key != "masks"}


class PruningMethod(DualEncoderMethod):
    """A method whose terms need nothing of the student but its embeddings, so that it may become smaller meanwhile.

    A stage that states a `sparsity` trains a `MaskedEncoder`, with the constraint as one more term; the next one begins
    with the smaller student. Sparsity counts from the student as the run begins, in entries of its layers' matrices.
    """

    prunes: ClassVar[bool] = True

    def __init__(
        self, config: PruningConfig, *, student: DualEncoder, teacher: FrozenTeacher | None = None, **more: Any
    ) -> None:
        super().__init__(config, student=student, teacher=teacher, **more)
        self.masks_config = config.masks or MasksConfig()
        if self.masks_config.sparsity:
            check_prunable(student)
        self.num_weights = weights_in(student.prunable)
        self.constraint: _Multipliers | None = None
        self._start = 0.0  # sparsity as the stage begins

    @staticmethod
    def part_of(name: str) -> ParameterPart:
        return "modules" if name.startswith("student.masks.") else DualEncoderMethod.part_of(name)

    def own_rate(self, name: str) -> float | None:
        return self.masks_config.rate if name.startswith(("student.masks.", "constraint.")) else None

    @property
    def default_stages(self) -> tuple[StageConfig, ...]:
        config = self.masks_config
        stages: list[StageConfig] = []
        for number, sparsity in enumerate(config.sparsity, 1):
            pair = 1 / len(config.sparsity)
            stages += [
                StageConfig(name=f"masks {number}", share=config.share * pair, sparsity=sparsity),
                StageConfig(name=f"smaller {number}", share=(1 - config.share) * pair),
            ]
        return tuple(stages)

    def check_stages(self, stages: Sequence[StageConfig]) -> None:
        super().check_stages(stages)
        targets = [stage.sparsity for stage in stages if stage.sparsity is not None]
        if self.masks_config.sparsity and not targets:
            raise ConfigError(
                "masks.sparsity is for the method's own stages, and training.stages state none: add sparsity to those "
                "that shall have masks, or leave training.stages out"
            )
        if not targets:
            return
        check_prunable(self.student)
        if any(after <= before for before, after in pairwise(targets)):
            raise ConfigError(f"the stages' sparsities {targets} must rise: each counts from the first student")
        if stages[-1].sparsity is not None:
            raise ConfigError(
                f"stage {stages[-1].name!r} is the last and has masks: add one without sparsity, in which the smaller "
                "student learns to do without what is gone"
            )
        if self.auxiliary is not None:
            raise ConfigError("heads read the student's levels, whose width changes under masks: leave heads out")

    def why_not_again(self, stages: Sequence[StageConfig]) -> str | None:
        if any(stage.sparsity is not None for stage in stages):
            return "its masks are multiplied into weights that exist for a forward pass alone"
        return super().why_not_again(stages)

    def check_stage(self, stage: StageConfig) -> None:
        super().check_stage(stage)
        if self._masks_in(stage) and "modules" not in stage.train:
            raise ConfigError(f"stage {stage.name!r} has masks, which are modules: add modules to train")

    def _something_learns(self, stage: StageConfig) -> bool:
        return self._masks_in(stage) or super()._something_learns(stage)  # masks are not there yet

    def _masks_in(self, stage: StageConfig) -> bool:
        return stage.sparsity is not None and self.masks_config.choice == "learned"

    @property
    def structure(self) -> dict[str, Any]:
        towers = self._full.prunable
        if not towers:
            return {}
        sizes = {tower: parts.sizes.plain() for tower, parts in towers.items()}
        return {"sizes": sizes, "masked": self.constraint is not None, "start": self._start}

    def restructure(self, structure: Mapping[str, Any]) -> None:
        if not structure:
            return
        sizes = {tower: TowerSizes.read(values) for tower, values in structure["sizes"].items()}
        if sizes != {tower: parts.sizes for tower, parts in self.student.prunable.items()}:
            learning = {name: parameter.requires_grad for name, parameter in self.student.named_parameters()}
            self.student = self.student.resized(sizes).to(self.device)
            for name, parameter in self.student.named_parameters():  # `train_parts` has frozen some for the whole run
                parameter.requires_grad_(learning[name])
        if structure["masked"]:
            self._mask()
        self._start = structure["start"]

    def reshape(self, stage: StageConfig) -> None:
        if self.constraint is not None and stage.sparsity is None:
            self.let_all_learn()
            self._shrink()
        elif self.constraint is None and stage.sparsity is not None:
            self.let_all_learn()
            present, allowed = weights_in(self.student.prunable), self.num_weights * (1 - stage.sparsity)
            if self.masks_config.choice == "learned":
                self._start = 1 - present / self.num_weights
                self._mask()
            elif present > allowed:  # else this stage was interrupted, and has done it
                self.student = sampled(self.student, allowed, self.step.generator("units"))

    def forward(self, batch: Batch, step: StepInfo | None = None) -> dict[str, Term]:
        student = self.student
        if not isinstance(student, MaskedEncoder):
            return super().forward(batch, step)
        if self.training:
            student.draw((step or self.step).generator("gates"))
        terms = super().forward(batch, step)
        assert self.constraint is not None
        assert self.stage.sparsity is not None
        target = target_sparsity(
            self._start, self.stage.sparsity, progress=self.step.progress, warmup=self.masks_config.warmup
        )
        expected = 1 - student.expected_weights() / self.num_weights
        terms[TERM] = Term(self.constraint(expected, target))
        self.measurements |= {
            "masks/sparsity": expected.detach(),
            "masks/target": torch.tensor(target),
            "masks/linear": self.constraint.linear.detach().clone(),
            "masks/quadratic": self.constraint.quadratic.detach().clone(),
        }
        return terms

    @torch.no_grad()
    def after_step(self, step: StepInfo | None = None) -> None:
        super().after_step(step)
        if isinstance(self.student, MaskedEncoder):
            self.student.after_step()

    @property
    def _full(self) -> DualEncoder:
        """The student without its masks."""
        return self.student.model if isinstance(self.student, MaskedEncoder) else self.student

    def _shrink(self) -> None:
        assert isinstance(self.student, MaskedEncoder)
        self.student, self.constraint, self.measurements = self.student.shrunk(), None, {}
        asked, reached = self.stage.sparsity, 1 - weights_in(self.student.prunable) / self.num_weights
        if asked is not None and reached < asked - _SLACK:
            warnings.warn(
                f"the masks of stage {self.stage.name!r} took out {100 * reached:.0f} % of the student's weights and "
                f"not {100 * asked:.0f} %: make the stage longer, or raise masks.rate",
                stacklevel=2,
            )

    def _mask(self) -> None:
        self.student = MaskedEncoder(self.student)
        self.constraint = _Multipliers(self.masks_config.strength).to(self.device)


class _Multipliers(nn.Module):
    """What a missing part of the sparsity costs, and that rises as long as something is missing."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.linear, self.quadratic = (nn.Parameter(torch.tensor(start)) for _ in range(2))

    def forward(self, sparsity: Float[Tensor, ""], target: float) -> Float[Tensor, ""]:
        return sparsity_constraint(sparsity, target, linear=self.linear, quadratic=self.quadratic)

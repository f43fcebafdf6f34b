"""Which parameters of a method learn: in the whole run, and in each of its stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cmapkd.config import ConfigError, closest
from cmapkd.methods.stages import PARTS, WHOLE_RUN, ParameterPart, StageConfig
from cmapkd.models import Model


class Learning(nn.Module):
    """What a `Method` knows of freezing. Frozen parameters get no gradient, no decay and no graph.

    The statistics of a batch norm whose weights are frozen stay as they are.
    """

    student: Model
    stage: StageConfig

    def __init__(self) -> None:
        super().__init__()
        self.stage = WHOLE_RUN
        self._learning: frozenset[str] | None = None  # names of what learns when no stage freezes anything
        self._momenta: dict[str, float | None] = {}  # of the batch norms, before any stage

    @property
    def student_parts(self) -> Mapping[str, frozenset[str]]:
        """Parts of the student that a run or a stage may train without the rest: names of their parameters."""
        return self.student.parts

    @staticmethod
    def part_of(name: str) -> ParameterPart:
        """Which part a parameter belongs to: parts have learning rates of their own, and stages say which learn."""
        return "student" if name.startswith("student.") else "weighting" if name.startswith("weighting") else "modules"

    def train_only(self, parts: Sequence[str]) -> None:
        """Freezes every parameter of the student outside of these parts, for the whole run; before any stage.

        Raises:
            ConfigError: a part that the student does not have, or nothing of the student would learn.
        """
        known = self.student_parts
        for part in parts:
            if part not in known:
                raise ConfigError(
                    f"training.train_parts has {part!r}{closest(part, known)}, which is no part of "
                    f"{self.student.name}; it has: {', '.join(known)}"
                )
        kept = frozenset().union(*(known[part] for part in parts))
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name in kept)
        if not any(parameter.requires_grad for parameter in self.student.parameters()):
            raise ConfigError(
                f"training.train_parts is {', '.join(parts)}, where {self.student.name} has nothing that learns: name "
                f"other parts of {', '.join(known)}"
            )
        self._freeze_statistics()

    def check_learning(self) -> None:
        """Refuses, before the first step, terms that only frozen parameters could change.

        Raises:
            ConfigError: names them.
        """

    def check_stages(self, stages: Sequence[StageConfig]) -> None:
        """Refuses stages that this method cannot train in, before the first step.

        Raises:
            ConfigError: names the stage, and what is wrong with it.
        """
        for stage in stages:
            self.check_stage(stage)

    def check_stage(self, stage: StageConfig) -> None:
        """Refuses a stage whose `train` names an unknown part, or in which nothing learns.

        Raises:
            ConfigError: says which, with the nearest known name.
        """
        known = (*PARTS, *self.student_parts)
        for part in stage.train:
            if part not in known:
                raise ConfigError(
                    f"stage {stage.name!r}: train has {part!r}{closest(part, known)}; what can learn here: "
                    f"{', '.join(known)}"
                )
        if not self._something_learns(stage):
            raise ConfigError(f"stage {stage.name!r}: nothing learns, this run has no {' or '.join(stage.train)}")

    def enter(self, stage: StageConfig) -> None:
        """Begins a stage: from now on only its terms and levels count, and only its parts learn."""
        if self._learning is None:  # once, before any stage has frozen anything
            self._learning = frozenset(name for name, parameter in self.named_parameters() if parameter.requires_grad)
            self._momenta = {name: norm.momentum for name, norm in self._batch_norms()}
        self.stage = stage
        learning = self._learning & self.learning_in(stage)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in learning)
        for name, norm in self._batch_norms():
            norm.momentum = self._momenta[name]
            if f"{name}.weight" in self._learning and not norm.weight.requires_grad:
                norm.momentum = 0.0

    def let_all_learn(self) -> None:
        """Undoes what the last stage has frozen, and forgets its names: for methods that exchange modules."""
        if self._learning is not None:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(name in self._learning)
            for name, norm in self._batch_norms():
                norm.momentum = self._momenta[name]
        self._learning = None

    def _freeze_statistics(self) -> None:
        """Batch norms of the student whose weights do not learn keep their running statistics."""
        for norm in self.student.modules():
            if isinstance(norm, _BatchNorm) and norm.weight is not None and not norm.weight.requires_grad:
                norm.momentum = 0.0

    def _something_learns(self, stage: StageConfig) -> bool:
        learning = self.learning_in(stage)
        return any(parameter.requires_grad and name in learning for name, parameter in self.named_parameters())

    def learning_in(self, stage: StageConfig) -> frozenset[str]:
        """Names of the parameters that belong to what the stage trains."""
        parts = self.student_parts
        named = {f"student.{name}" for part in stage.train if part in parts for name in parts[part]}
        return frozenset(
            name for name, _ in self.named_parameters() if name in named or self.part_of(name) in stage.train
        )

    def _batch_norms(self) -> list[tuple[str, _BatchNorm]]:
        return [(name, module) for name, module in self.named_modules() if isinstance(module, _BatchNorm)]

"""`Method`: the contract with what the trainer calls on top. A method's author reads contract.py instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.data.batches import Extra
from cmapkd.data.types import Batch
from cmapkd.features import gather_rows, own_place
from cmapkd.methods.card import MethodConfig
from cmapkd.methods.contract import MethodContract
from cmapkd.methods.stages import StageConfig
from cmapkd.methods.step import StepInfo
from cmapkd.methods.term_weights import weighted_terms
from cmapkd.methods.terms import AuxiliaryTerms, Term, divided
from cmapkd.models import FrozenTeacher, Model, MomentumTeacher, Teacher
from cmapkd.objectives.chunks import split_rows
from cmapkd.weighting import Weighting, WeightingConfig, make_weighting


class Method(MethodContract):
    """A method as the trainer sees it: terms of a batch, stages, auxiliary terms, and a weighting of the terms."""

    def __init__(
        self,
        config: MethodConfig,
        *,
        student: Model,
        teacher: FrozenTeacher | None = None,
        more_teachers: Sequence[FrozenTeacher] = (),
    ) -> None:
        super().__init__(config, student=student, teacher=teacher, more_teachers=more_teachers)
        self.micro_batch: int | None = None  # pairs encoded at once, in this process; None: all of its batch
        self.local_loss = False  # each process computes its own rows of in-batch losses, see `_losses_by_rows`
        self.auxiliary: AuxiliaryTerms | None = None
        self.weighting_of_terms: Weighting | None = None
        self.second_moment: Callable[[nn.Parameter], Tensor | None] = _no_moment  # of the optimizer, once it stepped

    @property
    def extras(self) -> Mapping[str, Extra]:
        """What batches must bring for the terms, and for those that the run adds."""
        return {**super().extras, **(self.auxiliary.extras if self.auxiliary is not None else {})}

    @property
    def steady_in_run(self) -> bool:
        """Whether it is `steady`, and no terms that the run adds learn where a sample has something for them alone."""
        return self.steady and self.auxiliary is None

    @torch.no_grad()
    def after_step(self, step: StepInfo | None = None) -> None:
        """Called after every optimizer step: puts back what must stay in a range, and moves momentum teachers.

        Args:
            step: as `forward` got it; none: as its last call said.
        """
        done = step or self.step
        self.student.after_step()
        for teacher in self.teachers.values():
            if isinstance(teacher, MomentumTeacher):
                teacher.update(self.student, done.step, done.total)

    def why_whole(self, stages: Sequence[StageConfig]) -> str | None:
        """Why every process must hold this method whole (`training.sharding: none`); None: it can be shared out."""
        if self.auxiliary is not None:
            return "heads learn with the student, and are not shared out in this version: leave heads out"
        if self.weighting_of_terms is not None and self.weighting_of_terms.reads_gradients:
            return (
                "method.term_weighting measures gradients at the student's weights, of which every process has a share "
                "only: choose another weighting"
            )
        if any(stage.sparsity is not None for stage in stages):
            return "stages with masks end with a smaller student, whose weights are not shared out anew in this version"
        return None

    def forward(self, batch: Batch, step: StepInfo | None = None) -> dict[str, Term]:
        """The terms of the batch that the stage wants, each a mean over all processes.

        Args:
            step: where the run stands; none: as the last call said, for a method in a loop of one's own.
        """
        self.step = step or self.step
        with self._losses_by_rows():
            terms = self.terms_in_run(batch)
        if self.auxiliary is not None:
            terms |= self.auxiliary(self.student, batch, micro_batch=self.micro_batch, wants=self.stage.wants_term)
            self.measurements |= self.auxiliary.measurements
        terms = divided(terms)
        if self.weighting_of_terms is None or not terms:
            return terms
        shared = self.shared_parameters if self.training else None
        generator = self.step.generator("weighting of terms")
        terms, log = weighted_terms(
            self.weighting_of_terms, terms, self.all_term_names, shared=shared, generator=generator
        )
        self.measurements |= log
        return terms

    def terms_in_run(self, batch: Batch) -> dict[str, Term]:
        """The method's own terms of the batch that the stage wants, and those that its settings add to them."""
        return {name: term for name, term in self.terms(batch).items() if self.stage.wants_term(name)}

    @property
    def teacher(self) -> Teacher | None:
        """The first of `teachers`, and the only one of most methods; None where there is none."""
        return next(iter(self.teachers.values()), None)

    @teacher.setter
    def teacher(self, teacher: Teacher) -> None:
        self.teachers[teacher.role] = teacher  # a cached one in place of the live one

    @property
    def could_read_answers(self) -> bool:
        """Whether a teacher answers live although a run could store its answers."""
        live = (isinstance(teacher, FrozenTeacher) and not teacher.from_disk for teacher in self.teachers.values())
        return self.not_cached is None and any(live)

    def check_teachers(self) -> None:
        """Refuses a momentum teacher that would never move, or never be checkpointed.

        Raises:
            ValueError: it is a submodule and not among `teachers`, or the other way round.
        """
        modules = {id(module) for module in self.modules() if isinstance(module, MomentumTeacher)}
        known = {id(teacher) for teacher in self.teachers.values() if isinstance(teacher, MomentumTeacher)}
        if modules != known:
            raise ValueError(
                f"{type(self).__name__} has {len(modules)} momentum teachers as submodules and {len(known)} in "
                "`teachers`: each must be both, or it would not move, or not be in checkpoints"
            )

    @property
    def all_term_names(self) -> tuple[str, ...]:
        """The method's own terms and those that the run adds."""
        return self.term_names + (self.auxiliary.term_names if self.auxiliary is not None else ())

    def check_stage(self, stage: StageConfig) -> None:
        """Also refuses a stage that names terms or levels this method does not have."""
        if stage.sparsity is not None and not self.prunes:
            raise ConfigError(f"stage {stage.name!r}: this method has no masks, leave sparsity out")
        stage.check_names(terms=self.all_term_names, levels=self.level_names)
        super().check_stage(stage)

    def wants(self, name: str, weight: float | None = None) -> bool:
        """Whether the term is worth computing: its weight is not zero and the stage has it.

        Args:
            weight: None: that of `weights`, or 1 of a term that is not in there.
        """
        counts = self.weights.get(name, 1.0) if weight is None else weight
        return counts != 0 and self.stage.wants_term(name)

    def weighted(self, values: Mapping[str, Tensor]) -> dict[str, Term]:
        """The terms with these values, each with its weight, in the order of `weights`."""
        return {name: Term(values[name], weight) for name, weight in self.weights.items() if name in values}

    def weigh_terms(self, config: WeightingConfig) -> None:
        """Puts a learned or fixed weighting on top of the terms' own weights, whichever the method."""
        self.weighting_of_terms = make_weighting(config, items=self.all_term_names, context_dim=1)

    def shared_parameters(self) -> Mapping[str, nn.Parameter]:
        """The layers, by name, at which gradients of different terms can be compared."""
        raise ValueError(f"{type(self).__name__} does not say at which layers gradients of its terms can be compared")

    @property
    def device(self) -> torch.device:
        """Where the student is."""
        return self.student.device

    def _losses_by_rows(self) -> AbstractContextManager[None]:
        """In-batch losses row by row, each process its own, with the values and gradients of all rows on each."""
        rank, world_size = own_place()
        return split_rows(rank, world_size, gather_rows) if self.local_loss and world_size > 1 else nullcontext()


def _no_moment(_parameter: nn.Parameter) -> None:
    """Of a method that no optimizer steps."""

"""The contract: what the author of a method states. `base.py` adds what the trainer calls.

A method over image-text models subclasses `DualEncoderMethod` (dual.py), which encodes for it. docs/extending.md shows
one. Neighbours: terms.py (`Term`), step.py (`StepInfo`), card.py (settings), learning.py (what a stage freezes).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor

from cmapkd.data.batches import Answers, Extra
from cmapkd.data.types import Batch
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.learning import Learning
from cmapkd.methods.stages import StageConfig
from cmapkd.methods.step import StepInfo
from cmapkd.methods.targets import Survey
from cmapkd.methods.terms import Term
from cmapkd.models import DualEncoder, FrozenTeacher, Model, Teacher


class MethodContract(Learning, ABC):
    """A student, its teachers, and the terms that tie them.

    The student and a method's own modules are submodules: trained, checkpointed and wrapped for distributed training.
    A frozen teacher is no submodule. A momentum teacher is one: its weights are checkpointed and never optimised.
    """

    card: ClassVar[MethodCard]
    Config: ClassVar[type[MethodConfig]]
    uses_teacher: ClassVar[bool] = True
    not_cached: str | None = None
    """Why the teacher cannot answer from a cache; None where it can."""
    reads: ClassVar[type[Model]] = DualEncoder  # type: ignore[type-abstract]
    """The contract that the student must keep."""
    learns_from: ClassVar[type[Model] | None] = None
    """The contract that its teachers must keep; None: that of the student."""
    scratch: ClassVar[str] = "contrastive"
    """The method without teacher that its students are compared with."""
    in_batch: ClassVar[bool] = True
    """Whether terms compare the samples of a batch with each other, so that they read all processes' samples."""
    several_teachers: ClassVar[bool] = False
    """Whether it takes more than one: `more_teachers` is then an argument of its `__init__`."""
    pictures_alone: ClassVar[bool] = False
    """Whether further teachers may have an image tower alone."""
    label_free: ClassVar[str | None] = None
    """The setting with which it needs no labels; None: there is none."""
    prunes: ClassVar[bool] = False
    """Whether stages may state a `sparsity`."""
    weights: Mapping[str, float] = MappingProxyType({})
    """What each term counts, by name, where that is the same in every step. A term of weight 0 is none of the method's.
    A method sets them in its `__init__`; or it says `term_names` itself."""
    measurements: dict[str, Tensor]
    """What the last step is worth logging besides its terms: learned weights, their entropy."""
    step: StepInfo
    """Where the run stands; its `generator` is the only source of random numbers for terms."""

    def __init__(
        self,
        config: MethodConfig,  # noqa: ARG002  kept by the methods, each with its own type
        *,
        student: Model,
        teacher: FrozenTeacher | None = None,
        more_teachers: Sequence[FrozenTeacher] = (),
    ) -> None:
        super().__init__()
        if self.uses_teacher and teacher is None:
            raise ValueError(f"method {type(self).__name__} distils from a teacher: name one with teacher=...")
        self.student = student
        given = (teacher, *more_teachers)
        self.teachers: dict[str, Teacher] = {frozen.role: frozen for frozen in given if frozen is not None}
        self.step = StepInfo()
        self.measurements = {}

    @property
    def term_names(self) -> tuple[str, ...]:
        """The terms that `terms` returns in a run without stages."""
        return tuple(name for name, weight in self.weights.items() if weight)

    @abstractmethod
    def terms(self, batch: Batch) -> dict[str, Term]:
        """The loss terms of the batch, by name. Terms that the stage leaves out may be computed, but need not.

        `batch` holds this process's samples. What `DualEncoderMethod` makes of it (`encode_student`, `encode_teacher`,
        `encode_both`, `labels`) has the rows of all processes' samples, in the order of the processes. So a term is
        a mean over all of them, and the same number on each process. A method whose terms read other rows says so.

        Random numbers come from `self.step.generator(name)`, never from the process's own generator.
        """

    @property
    def steady(self) -> bool:
        """Whether all steps of a stage have gradients to the same parameters, in every process and with any data.

        Several processes then look for parameters without gradient once a stage, and not in every step.
        """
        return False

    @property
    def level_names(self) -> tuple[str, ...]:
        """The levels that the terms read, by the names that stages and weightings use; embeddings are no level."""
        return ()

    @property
    def text_pools(self) -> Mapping[str, int]:
        """Further texts that batches must bring: how many of each sample, by pool (`synthetic` captions, ...)."""
        return {}

    @property
    def more_views(self) -> Mapping[str, int]:
        """Further views that batches must bring: how many of each sample, by a name in `data.more_views`."""
        return {}

    @property
    def streams(self) -> tuple[str, ...]:
        """Streams that the terms tell apart by name, and that the data must have, see `data.more`."""
        return ()

    @property
    def equal_streams(self) -> bool:
        """Whether every process must have as many samples of a stream as any other."""
        return False

    @property
    def needs_labels(self) -> bool:
        """Whether it cannot train where no sample has a label."""
        return False

    @property
    def extras(self) -> Mapping[str, Extra]:
        """What batches must bring besides views and captions, by name. Add to `super().extras`."""
        return {}

    @property
    def held_out_every(self) -> int | None:
        """In how many steps it reads `Batch.held_out` once, counted from the first; None: never."""
        return None

    @property
    def held_out_whole(self) -> bool:
        """Whether it reads all held-out pairs each time, the same ones, in place of as many as a batch has."""
        return False

    @property
    def needs_held_out(self) -> bool:
        """Whether it cannot train where the data name no held-out pairs."""
        return False

    def why_not_again(self, stages: Sequence[StageConfig]) -> str | None:  # noqa: ARG002  for methods with other weights
        """Why the student's blocks cannot compute again in the backward pass; None: they can.

        Args:
            stages: of the run.
        """
        return "it exchanges the student's weights to measure directions" if self.needs_held_out else None

    @property
    def why_not_longer(self) -> str | None:
        """Why a run cannot be prolonged, whatever its stages; None: it can."""
        return None

    def answers(self, role: str, stored: Answers) -> Answers:  # noqa: ARG002  for experiments that change some of them
        """What the run reads in place of a teacher's stored answers; as a rule, these."""
        return stored

    @property
    def prepares(self) -> bool:
        """Whether `prepare` builds something, for which the run makes a pass over the training data."""
        return False

    def prepare(self, survey: Survey) -> None:
        """Called once, before the first step and never at a resume: builds targets from the teachers' answers.

        Results are buffers, which checkpoints hold. Their sizes are known when the method is built, or told by
        `structure`. All processes build them, and then take those of the first one.

        Args:
            survey: gives a teacher's answers to the training data, from the cache or live.
        Raises:
            ConfigError: the data do not have what is built, with what to do.
        """

    @property
    def default_stages(self) -> tuple[StageConfig, ...]:
        """The stages of a run whose recipe names none, by shares of its steps; none: the run is one piece."""
        return ()

    def own_rate(self, name: str) -> float | None:  # noqa: ARG002  for methods with parameters that are no weights
        """The rate at which a parameter learns whatever the schedule says, without momentum; None: like its part."""
        return None

    @property
    def structure(self) -> dict[str, Any]:
        """What the run has made of its modules' sizes, as plain data: with it a checkpoint's tensors fit again."""
        return {}

    def restructure(self, structure: Mapping[str, Any]) -> None:
        """Gives a new method the structure that `structure` returned."""

    def reshape(self, stage: StageConfig) -> None:
        """Called before a stage is entered: a method may put other modules in place of its own, a smaller student.

        If the method has other parameters afterwards, the trainer makes a new wrapper, optimizer and average.
        """

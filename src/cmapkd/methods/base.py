"""What a distillation method is: named loss terms of a batch, and everything with weights that is not the student."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Int
from pydantic import Field, SerializeAsAny, field_validator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cmapkd.config import Config, ConfigError, closest
from cmapkd.data.batches import Extra
from cmapkd.data.types import Batch
from cmapkd.features import KeyTokens, gather_features, gather_rows, mean_over_processes, own_place
from cmapkd.methods.micro_batches import (
    Rows,
    encode_again,
    join_features,
    join_rows,
    micro_batches,
    with_levels_on,
    without_levels,
)
from cmapkd.methods.stages import PARTS, WHOLE, Part, StageConfig
from cmapkd.models import DualEncoder, Features, FrozenTeacher, Needs, TowerFeatures
from cmapkd.models.reach import Tower, example_output, last_matrix_behind
from cmapkd.objectives import contrastive_loss, sigmoid_loss
from cmapkd.objectives.chunks import rows_shared
from cmapkd.objectives.common import at_least_float32
from cmapkd.weighting import Weighting, WeightingConfig, make_weighting, weighting_config

Detail = Literal["global", "pooled", "key_tokens", "dense"]
"""How finely a teacher is read: its embeddings; also one vector for each level; also a few key tokens of each; also
levels place by place. Each can be had from those after it."""


LABELS = "labels"
"""Under which a batch brings its samples' labels, see `data.labels.LabelReader`."""

_TOWERS: tuple[Tower, Tower] = ("image", "text")


class Term(NamedTuple):
    """One part of the loss: its raw value (a batch mean) and how much it counts. The trainer sums weight × value.

    A tuple, because a wrapper that shards a method looks for tensors in what it returns.
    """

    value: Tensor
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class MethodCard:
    """What a reader must know before trusting a method."""

    title: str
    paper: str
    equations: tuple[str, ...]
    needs: str
    trainable: str
    departures: tuple[str, ...]
    checked_against: str


class MethodConfig(Config):
    """Base of every method's settings. In a recipe they stand beside the method's name."""

    name: str = Field("", description="The method's name in METHODS.")
    term_weighting: SerializeAsAny[WeightingConfig] | None = Field(
        None, description="A weighting of the method's terms, on top of their weights; none: these alone."
    )

    @property
    def reads_classes(self) -> bool:
        """Whether the method, as it is set, is told the classes of the training source: their names and prompts."""
        return False

    @property
    def reads_captions(self) -> bool:
        """Whether the method, as it is set, reads the samples' captions: without, pictures that have none will do."""
        return True

    @field_validator("term_weighting", mode="before")
    @classmethod
    def _weighting_by_name(cls, value: Any) -> Any:
        return None if value is None else weighting_config(value)


class TermsBeside(nn.Module, ABC):
    """Terms of the student that a run adds to those of its method, whichever that is, and the modules they need."""

    term_names: tuple[str, ...]
    measurements: dict[str, Tensor]
    """What the last step is worth logging besides the terms."""

    @property
    def extras(self) -> Mapping[str, Extra]:
        """What batches must bring for these terms, see `BatchBuilder`."""
        return {}

    @abstractmethod
    def forward(
        self, student: DualEncoder, batch: Batch, *, micro_batch: int | None, wants: Callable[[str], bool]
    ) -> dict[str, Term]:
        """The terms among `term_names` that are wanted, each of the whole batch over all processes.

        Args:
            micro_batch: samples encoded at once; None: all.
        """


class Method(nn.Module, ABC):
    """A student, its frozen teachers, one for most methods, and the terms that tie them.

    The student and a method's own modules are submodules: trained, checkpointed and wrapped for distributed training.
    A teacher is none of these.
    """

    card: ClassVar[MethodCard]
    Config: ClassVar[type[MethodConfig]]
    uses_teacher: ClassVar[bool] = True
    not_cached: ClassVar[str | None] = None
    """Why the teacher cannot answer from a cache; None where it can."""
    several_teachers: ClassVar[bool] = False
    """Whether it takes more than one: `more_teachers` is then an argument of its `__init__`."""
    prunes: ClassVar[bool] = False
    """Whether stages may state a `sparsity`."""
    measurements: dict[str, Tensor]
    """What the last step is worth logging besides its terms: learned weights, their entropy."""

    def __init__(
        self,
        config: MethodConfig,  # noqa: ARG002  kept by the methods, each with its own type
        *,
        student: DualEncoder,
        teacher: FrozenTeacher | None = None,
        more_teachers: Sequence[FrozenTeacher] = (),
    ) -> None:
        super().__init__()
        if self.uses_teacher and teacher is None:
            raise ValueError(f"method {type(self).__name__} distils from a teacher: name one with teacher=...")
        self.student = student
        self.teachers = {each.role: each for each in (teacher, *more_teachers) if each is not None}
        self.stage = WHOLE
        self.progress = 0.0  # share of the stage's steps that are done, for what changes within one
        self.measurements = {}
        self.micro_batch: int | None = None  # pairs encoded at once, in this process; None: all of its batch
        self.local_loss = False  # of several processes each compares its own rows with all others, see `_losses_shared`
        self.beside: TermsBeside | None = None
        self.weighting_of_terms: Weighting | None = None
        self._learning: frozenset[str] | None = None  # what learns where every part does
        self._shared: tuple[Needs, tuple[str, ...]] | None = None  # names of layers, and what they are below of
        self._momenta: dict[str, float | None] = {}  # of the batch norms, likewise

    @property
    def teacher(self) -> FrozenTeacher | None:
        """The first of `teachers`, and the only one of most methods; None where there is none."""
        return next(iter(self.teachers.values()), None)

    @teacher.setter
    def teacher(self, teacher: FrozenTeacher) -> None:
        self.teachers[teacher.role] = teacher  # a cached one in place of the live one

    @property
    def text_pools(self) -> tuple[str, ...]:
        """Further texts that batches must bring of each sample, one of each pool: `synthetic` captions."""
        return ()

    @property
    @abstractmethod
    def term_names(self) -> tuple[str, ...]:
        """The terms that `terms` returns in a run without stages."""

    @property
    def all_term_names(self) -> tuple[str, ...]:
        """The method's own terms and those that the run adds."""
        return self.term_names + (self.beside.term_names if self.beside is not None else ())

    @property
    def extras(self) -> Mapping[str, Extra]:
        """What batches must bring besides views and captions: what the terms read, and those that the run adds."""
        return self.beside.extras if self.beside is not None else {}

    def labels(self, batch: Batch) -> Int[Tensor, " batch"]:
        """The labels of all processes' samples, -1 where there is none; for a method with `LABELS` in its extras."""
        labels: Tensor = batch.extra[LABELS]
        return gather_rows(labels.to(self._device))

    @property
    def level_names(self) -> tuple[str, ...]:
        """The levels that the terms read, by the names that stages and weightings use; embeddings are no level."""
        return ()

    @staticmethod
    def part_of(name: str) -> Part:
        """Which part a parameter belongs to: parts have learning rates of their own, and stages say which learn."""
        return "student" if name.startswith("student.") else "weighting" if name.startswith("weighting") else "modules"

    def own_rate(self, name: str) -> float | None:  # noqa: ARG002  for methods with parameters that are no weights
        """The rate at which a parameter learns whatever the schedule says, without momentum; None: like its part."""
        return None

    @property
    def student_parts(self) -> Mapping[str, frozenset[str]]:
        """Parts of the student that a stage may train without the rest, by name: the names of their parameters."""
        return {}

    @property
    def default_stages(self) -> tuple[StageConfig, ...]:
        """The stages of a run whose recipe names none, by shares of its steps; none: it is one piece."""
        return ()

    def check_stages(self, stages: Sequence[StageConfig]) -> None:
        """Refuses stages that this method cannot train in, before the first step.

        Raises:
            ConfigError: names the stage, and what is wrong with it.
        """
        for stage in stages:
            self.check_stage(stage)

    def check_stage(self, stage: StageConfig) -> None:
        """Refuses a stage that names terms or levels this method does not have, or in which nothing learns.

        Raises:
            ConfigError: says which, with the nearest known name.
        """
        if stage.sparsity is not None and not self.prunes:
            raise ConfigError(f"stage {stage.name!r}: this method has no masks, leave sparsity out")
        stage.check_names(terms=self.all_term_names, levels=self.level_names)
        known = (*PARTS, *self.student_parts)
        for part in stage.train:
            if part not in known:
                raise ConfigError(
                    f"stage {stage.name!r}: train has {part!r}{closest(part, known)}; what can learn here: "
                    f"{', '.join(known)}"
                )
        if not self._something_learns(stage):
            raise ConfigError(f"stage {stage.name!r}: nothing learns, this run has no {' or '.join(stage.train)}")

    @property
    def structure(self) -> dict[str, Any]:
        """What the run has made of its modules' sizes, as plain data: with it a checkpoint's tensors fit again."""
        return {}

    def restructure(self, structure: Mapping[str, Any]) -> None:
        """Gives a new method the structure that `structure` returned."""

    def reshape(self, stage: StageConfig) -> None:
        """Called before a stage is entered: a method may put other modules in place of its own, a smaller student.

        What then has other parameters gets another wrapper, optimizer and average, which begin anew.
        """

    def _let_all_learn(self) -> None:
        """Undoes what the last stage has frozen, and forgets its names: for those who exchange modules."""
        if self._learning is not None:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(name in self._learning)
            for name, norm in self._batch_norms():
                norm.momentum = self._momenta[name]
        self._learning, self._shared = None, None

    def enter(self, stage: StageConfig) -> None:
        """Begins a stage: from now on only its terms and levels count, and only its parts learn."""
        if self._learning is None:  # once, before any stage has frozen anything
            self._learning = frozenset(name for name, parameter in self.named_parameters() if parameter.requires_grad)
            self._momenta = {name: module.momentum for name, module in self._batch_norms()}
        self.stage = stage
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in self._learning and self._learns_in(stage, name))
        for name, norm in self._batch_norms():  # one that does not learn keeps its statistics, too
            rests = f"{name}.weight" in self._learning and not norm.weight.requires_grad
            norm.momentum = 0.0 if rests else self._momenta[name]

    def _something_learns(self, stage: StageConfig) -> bool:
        return any(self._learns_in(stage, name) for name, _ in self.named_parameters())

    def _learns_in(self, stage: StageConfig, name: str) -> bool:
        parts = self.student_parts
        inner = name.removeprefix("student.")
        return self.part_of(name) in stage.train or (
            inner != name and any(inner in parts[part] for part in stage.train if part in parts)
        )

    def _batch_norms(self) -> list[tuple[str, _BatchNorm]]:
        return [(name, module) for name, module in self.named_modules() if isinstance(module, _BatchNorm)]

    @property
    def student_needs(self) -> Needs:
        """Levels of the student that the terms read."""
        return Needs()

    @property
    def teacher_needs(self) -> Needs:
        """Levels of the first teacher that the terms read; it computes and a cache stores no others."""
        return Needs()

    @property
    def teacher_detail(self) -> Detail:
        """How finely the terms read the teacher, which is what a cache must hold."""
        needs = self.teacher_needs
        return "dense" if needs.image_levels or needs.text_levels else "global"

    @property
    def key_tokens(self) -> KeyTokens | None:
        """Which tokens the terms read where the detail is `key_tokens`."""
        return None

    @abstractmethod
    def terms(self, batch: Batch) -> dict[str, Term]:
        """The loss terms of the batch, by name. What the stage leaves out may be computed, but need not."""

    def forward(self, batch: Batch) -> dict[str, Term]:
        with self._losses_shared():
            terms = {name: term for name, term in self.terms(batch).items() if self.stage.wants_term(name)}
        if self.beside is not None:
            terms |= self.beside(self.student, batch, micro_batch=self.micro_batch, wants=self.stage.wants_term)
            self.measurements |= self.beside.measurements
        return self._weighted(terms) if self.weighting_of_terms is not None and terms else terms

    def _losses_shared(self) -> AbstractContextManager[None]:
        """In-batch losses row by row, each process its own, with the values and gradients of all rows on each."""
        rank, world_size = own_place()
        return rows_shared(rank, world_size, gather_rows) if self.local_loss and world_size > 1 else nullcontext()

    def weigh_terms(self, config: WeightingConfig) -> None:
        """Puts a learned or fixed weighting on top of the terms' own weights, for every method alike."""
        self.weighting_of_terms = make_weighting(config, items=self.all_term_names, context_dim=1)

    def _weighted(self, terms: dict[str, Term]) -> dict[str, Term]:
        """One term that counts, the weighted sum, and the others for the log; a batch is one sample here."""
        assert self.weighting_of_terms is not None
        columns = {name: term.weight * at_least_float32(term.value) for name, term in terms.items()}
        total = torch.stack([*columns.values()]).sum()
        if self.training:
            self.weighting_of_terms.observe(total.detach())
            if torch.is_grad_enabled() and self.weighting_of_terms.due:
                self._measure_gradients(columns)
        losses = torch.stack([columns.get(name, torch.zeros_like(total)) for name in self.all_term_names])[None]
        active = torch.tensor([name in columns for name in self.all_term_names])
        context = torch.zeros(1, 1, device=total.device)
        weighted = self.weighting_of_terms(losses, context, None if bool(active.all()) else active)
        self.measurements |= {f"terms/{name}": value for name, value in weighted.log.items()}
        return {name: Term(term.value.detach(), 0.0) for name, term in terms.items()} | {
            "weighted": Term(weighted.loss)
        }

    def _measure_gradients(self, columns: Mapping[str, Tensor]) -> None:
        """Tells the weighting how strongly each term pulls at the layers that the terms share.

        Raises:
            ValueError: a term does not depend on them.
        """
        assert self.weighting_of_terms is not None
        shared = {name: weights for name, weights in self.shared_parameters().items() if weights.requires_grad}
        if not shared:  # the student does not learn in this stage
            return
        names = [name for name in self.all_term_names if name in columns]
        pulls = torch.stack([self._pull(name, columns[name], shared) for name in names])
        norms = mean_over_processes(at_least_float32(pulls)).norm(dim=-1)  # gradients are means, too, once wrapped
        active = torch.tensor([name in columns for name in self.all_term_names], device=norms.device)
        losses, found = norms.new_zeros(len(active)), norms.new_zeros(len(active))
        losses[active] = torch.stack([columns[name].detach() for name in names]).to(norms.dtype)
        found[active] = norms
        self.weighting_of_terms.observe_gradients(losses, found, active)

    @staticmethod
    def _pull(name: str, value: Tensor, shared: Mapping[str, nn.Parameter]) -> Tensor:
        """A term's gradient at the shared layers, as one vector; the graph stays whole."""
        gradients: tuple[Tensor | None, ...] = (None,)
        if value.requires_grad:
            gradients = torch.autograd.grad(value, [*shared.values()], retain_graph=True, allow_unused=True)
        if all(gradient is None for gradient in gradients):
            raise ValueError(
                f"term {name} has no gradient at {', '.join(shared)}, where the weighting of the terms measures it: "
                "leave it out of the weighted terms, or choose another term_weighting"
            )
        pairs = zip(gradients, shared.values(), strict=True)
        return torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for g, w in pairs])

    def shared_parameters(self) -> Mapping[str, nn.Parameter]:
        """The layers, by name, at which gradients of different terms can be compared: one of each tower.

        Here the last layer below everything that the terms of this stage read of the tower: below its embedding, or
        below the first of its levels that they read.
        """
        needs = self.student_needs
        if self._shared is None or self._shared[0] != needs:
            read = [partial(example_output, self.student, tower, self._first(tower, needs)) for tower in _TOWERS]
            self._shared = needs, tuple(last_matrix_behind(self.student, output) for output in read)
        parameters = dict(self.student.named_parameters())
        return {name: parameters[name] for name in self._shared[1]}

    def _first(self, tower: Tower, needs: Needs) -> str | None:
        """The shallowest level of those needed."""
        known, needed = (
            (self.student.image_levels, needs.image_levels)
            if tower == "image"
            else (self.student.text_levels, needs.text_levels)
        )
        return next((level.name for level in known if level.name in needed), None)

    def wants(self, name: str, weight: float = 1.0) -> bool:
        """Whether the term is worth computing: its weight is not zero and the stage has it."""
        return weight != 0 and self.stage.wants_term(name)

    @torch.no_grad()
    def after_step(self) -> None:
        """Called after every optimizer step: puts back what must stay in a range."""
        self.student.clamp_logit_scale()

    def encode_student(self, batch: Batch) -> Features:
        """The student's features; embeddings are those of the whole batch, over all processes."""
        parts = micro_batches(batch, self.micro_batch)
        return gather_features(join_features(encode_again(self._encode_student, parts, model=self)))

    def encode_teacher(self, batch: Batch) -> Features:
        """The teacher's features, likewise, without gradient."""
        parts = micro_batches(batch, self.micro_batch)
        return gather_features(join_features([self._encode_teacher(part) for part in parts]))

    def encode_teachers(self, batch: Batch) -> dict[str, Features]:
        """Every teacher's embeddings by role, likewise; levels are those of the first alone."""
        parts = micro_batches(batch, self.micro_batch)
        return {
            role: gather_features(join_features([self._encode_teacher(part, role) for part in parts]))
            for role in self.teachers
        }

    def encode_changed_images(self, batch: Batch, change: Callable[[Batch, Tensor], Tensor]) -> Tensor:
        """The student's embeddings of its pictures as the method changes them; of the whole batch, over all processes.

        Args:
            change: of a part of the batch and its pixels [batch 3 height width], as the student's model reads them, to
                the pixels it shall see. A pure function of the part's samples: the backward pass may repeat it.
        """

        def encode(part: Batch, _number: int) -> Tensor:
            pixels = part.inputs["student"].images.to(self._device, non_blocking=True)
            tower: TowerFeatures = self.student.encode_image(change(part, pixels))
            return tower.embedding

        parts = micro_batches(batch, self.micro_batch)
        return gather_rows(torch.cat(encode_again(encode, parts, model=self)))

    def encode_both(
        self, batch: Batch, read: Callable[[Batch, Features, Features], Rows]
    ) -> tuple[Features, Features, Rows]:
        """Student's and teacher's embeddings, and what the terms need of their levels; of all processes' samples.

        With micro-batches no level of the student outlives its micro-batch. The teacher's do on the host of a GPU,
        where they take none of its memory; on a CPU, and from a cache, the backward pass asks the teacher again.

        Args:
            read: of a part of the batch and both models' features of it, named tensors with one row for each sample,
                none of which depends on another sample.
        """
        parts = micro_batches(batch, self.micro_batch)
        answers: list[Features] = []
        if len(parts) > 1 and self._keeps_answers:
            answers = [with_levels_on(self._encode_teacher(part), "cpu") for part in parts]

        def encode(part: Batch, number: int) -> tuple[Features, Features, Rows]:
            teacher = with_levels_on(answers[number], self._device) if answers else self._encode_teacher(part)
            student = self._encode_student(part)
            return without_levels(student), without_levels(teacher), read(part, student, teacher)

        encoded = encode_again(encode, parts, model=self)
        student = gather_features(join_features([features for features, _, _ in encoded]))
        teacher = gather_features(join_features([features for _, features, _ in encoded]))
        rows = join_rows([rows for _, _, rows in encoded])
        return student, teacher, {name: gather_rows(values) for name, values in rows.items()}

    @property
    def _keeps_answers(self) -> bool:
        """Whether a micro-batch's teacher levels wait for the backward pass: asking again costs more than keeping."""
        return self._device.type != "cpu" and self.teacher is not None and not self.teacher.from_disk

    def _encode_student(self, part: Batch, _number: int = 0) -> Features:
        features: Features = self.student(part.inputs["student"].to(self._device, True), self.student_needs)
        return features

    def _encode_teacher(self, part: Batch, role: str = "teacher") -> Features:
        needs = self.teacher_needs if role == "teacher" else None
        return self.teachers[role](part.to(self._device, non_blocking=True), needs)

    @property
    def _device(self) -> torch.device:
        return self.student.log_logit_scale.device


def task_loss(student: Features) -> Tensor:
    """The loss the student would be trained with alone: SigLIP's where it has a logit bias, else CLIP's."""
    image, text, scale = student.image.embedding, student.text.embedding, student.logit_scale
    if student.logit_bias is not None:
        return sigmoid_loss(image, text, logit_scale=scale, logit_bias=student.logit_bias)
    return contrastive_loss(image, text, logit_scale=scale)

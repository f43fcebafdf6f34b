"""Methods over models that write: how student and teachers are read, and how sums over tokens become terms."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.data.dialogues import ChatInput
from cmapkd.data.types import Batch
from cmapkd.features.top_tokens import ROWS as TOP_ROWS
from cmapkd.features.top_tokens import narrowed, top_tokens
from cmapkd.features.visual_rows import per_picture
from cmapkd.methods.base import Method
from cmapkd.methods.behind_terms import Made, SharedMatrix, check_terms_learn
from cmapkd.methods.card import MethodConfig
from cmapkd.methods.micro_batches import encode_checkpointed, micro_batches
from cmapkd.methods.rollouts import ROLLED, OnPolicyConfig, roll_out
from cmapkd.methods.stages import WHOLE_RUN, StageConfig
from cmapkd.methods.terms import Term
from cmapkd.models import FrozenTeacher, Model
from cmapkd.models.generative import GenerativeModel
from cmapkd.models.shared_vocabulary import check_same_vocabulary, cut_head, kept_of, picked_head
from cmapkd.models.token_types import LogitHead, Rows, TokenFeatures, TokenNeeds, TopTokens
from cmapkd.objectives.tokens import TokenDivergence
from cmapkd.objectives.vocabulary import token_losses

Reduction = Literal["token_mean", "sample_mean", "batch_sum"]


class GenerativeConfig(MethodConfig):
    """What every method over models that write can be told."""

    reduction: Reduction = Field(
        "token_mean",
        description="token_mean: every answer token counts alike; sample_mean: every dialogue; batch_sum: the sum over "
        "tokens, divided by the samples of the batch.",
    )


class TopRequest(NamedTuple):
    """The `number` likeliest tokens of each row, at a temperature."""

    number: int
    temperature: float


class Counted(NamedTuple):
    """A sum over the rows of a part of the batch, and what it is to be divided by."""

    total: Float[Tensor, ""]
    number: Float[Tensor, ""]

    @classmethod
    def of(cls, total: Float[Tensor, ""], number: int) -> Self:
        """Of so many things that were counted on the host."""
        return cls(total, total.detach().new_full((), number))


class Weighed(NamedTuple):
    """The weight of each row in a sum, None where each is 1; and what the sum is to be divided by."""

    rows: Float[Tensor, " rows"] | None
    number: Float[Tensor, ""]


class GenerativeMethod(Method):
    """A method whose student and teachers are `GenerativeModel`s, and whose terms are sums over rows.

    A term is a sum and a count for each part of the batch. The sums of all micro-batches and processes are divided once
    by all counts. So neither padding, micro-batches nor the number of processes changes a loss.
    """

    reads: ClassVar[type[Model]] = GenerativeModel  # type: ignore[type-abstract]
    scratch: ClassVar[str] = "sft"
    in_batch: ClassVar[bool] = False
    of_teacher: ClassVar[frozenset[str]] = frozenset({"distillation"})
    """The terms that read a teacher; it is not asked where the stage wants none of them."""
    config: GenerativeConfig
    student: GenerativeModel
    kept: Tensor | None = None
    """Of each of the student's tokens the id that it has in the teacher, whose vocabulary it is cut out of."""
    num_tokens: int | None = None
    """How many tokens student and first teacher have in common, where one has more; None: all."""

    def __init__(
        self,
        config: GenerativeConfig,
        *,
        student: GenerativeModel,
        teacher: FrozenTeacher | None = None,
        more_teachers: Sequence[FrozenTeacher] = (),
    ) -> None:
        super().__init__(config, student=student, teacher=teacher, more_teachers=more_teachers)
        self.config = config
        self._shared_matrix = SharedMatrix()
        if teacher is not None and self.compares_tokens:
            self.relate(teacher.model)

    def relate(self, teacher: GenerativeModel) -> None:
        """Finds the tokens that student and teacher have in common.

        Raises:
            ConfigError: their tokens differ.
        """
        kept = kept_of(teacher.vocabulary, self.student.vocabulary)
        if kept is not None:
            if self.on_policy is not None:
                raise ConfigError(
                    "the student's vocabulary is cut out of the teacher's, whose ids are others, and on_policy lets "
                    "the teacher read the student's own ids: leave on_policy out, or the option vocabulary: texts"
                )
            self.kept = torch.tensor(kept, dtype=torch.long)
            self.not_cached = (
                "the student's vocabulary is a part of the teacher's, and a cache holds the teacher's likeliest tokens "
                "of all: method.alignment=bytes (token_kd) can read one"
            )
            return
        common = check_same_vocabulary(teacher.vocabulary, self.student.vocabulary)
        differ = common < max(teacher.vocabulary.size, self.student.vocabulary.size)
        self.num_tokens = common if differ else None

    @property
    def made_of(self) -> Mapping[str, Made]:
        """What terms are made of, by name, where that is not the logits: so much must learn, or they train nothing."""
        return {}

    def check_stages(self, stages: Sequence[StageConfig]) -> None:
        super().check_stages(stages)
        made = {name: what for name, what in self.made_of.items() if self.weights.get(name, 1.0)}
        check_terms_learn(self, made, stages or (WHOLE_RUN,))

    @property
    def compares_tokens(self) -> bool:
        """Whether next-token distributions of student and teacher are compared, so that they need one vocabulary."""
        return self.uses_teacher

    @property
    def student_needs(self) -> TokenNeeds:
        """What the terms read of the student."""
        return TokenNeeds()

    @property
    def teacher_needs(self) -> TokenNeeds:
        """What the terms read of the first teacher."""
        return TokenNeeds()

    @property
    def teacher_top(self) -> TopRequest | None:
        """What the terms read of the teacher's distributions, where that is not all; a cache stores no more."""
        return None

    @property
    def on_policy(self) -> OnPolicyConfig | None:
        """How the student's own answers take the place of given ones; None: they never do."""
        return None

    @abstractmethod
    def sums(self, part: Batch, student: TokenFeatures, teacher: TokenFeatures | None) -> dict[str, Counted]:
        """The terms of a part of the batch that the stage wants, each with its count.

        A pure function of the part, the modules and `self.step`: the backward pass may repeat it.
        """

    def terms(self, batch: Batch) -> dict[str, Term]:
        batch = self._rolled_out(batch)
        parts = micro_batches(batch, self.micro_batch)
        # kept between the passes: a few rows of states, where the backward pass would ask the teacher again
        answered: dict[int, TokenFeatures | None] = {}
        return self.summed(encode_checkpointed(partial(self._sums, answered), parts, model=self))

    def summed(self, counted: Sequence[Mapping[str, Counted]]) -> dict[str, Term]:
        """Terms of what `sums` gave of each part of the batch."""
        terms = {}
        for name, weight in self.weights.items():
            if name in counted[0]:
                totals, counts = zip(*(each[name] for each in counted), strict=True)
                terms[name] = Term(torch.stack(totals).sum(), weight, torch.stack(counts).sum())
        return terms

    def _sums(self, answered: dict[int, TokenFeatures | None], part: Batch, number: int) -> dict[str, Counted]:
        student: TokenFeatures = self.student(part.inputs["student"].to(self.device, True), self.student_needs)
        if number not in answered:
            asked = any(self.wants(name) for name in self.of_teacher & {*self.term_names})
            answered[number] = self.read_teacher(part) if asked else None
        return self.sums(part, student, answered[number])

    def dialogues(self, part: Batch, reads: str = "student") -> ChatInput:
        """What a model is given of a part of the batch, where it is; `reads`: a teacher's `reads`, or the student."""
        found = part.inputs[reads]
        assert isinstance(found, ChatInput)
        return found

    def visual_counts(self, part: Batch) -> tuple[list[int], list[int]]:
        """Visual tokens of each dialogue of a part, as the student and the first teacher read it."""
        first = next(iter(self.teachers.values()))
        own, theirs = (per_picture(self.dialogues(part, reads)) for reads in ("student", first.reads))
        return own, theirs

    def read_teacher(self, part: Batch, role: str | None = None) -> TokenFeatures | None:
        """A teacher's features of a part of the batch, without gradient; None where there is no teacher.

        Args:
            role: of the teacher; None: the first.
        """
        if not self.teachers:
            return None
        first = next(iter(self.teachers))
        teacher: Any = self.teachers[role or first]
        needs = self.teacher_needs if teacher.role == first else TokenNeeds()
        features: Any = teacher(part.only(teacher.reads).to(self.device, non_blocking=True), needs)
        assert isinstance(features, TokenFeatures)
        return features

    def losses(
        self,
        student: TokenFeatures,
        hard: Weighed,
        *,
        teacher: TokenFeatures | None = None,
        divergence: TokenDivergence | None = None,
        soft: Weighed | None = None,
    ) -> dict[str, Counted]:
        """The terms over the answers' tokens that the stage wants: `answers`, a cross-entropy over all tokens that the
        student has, and `distillation`, a divergence over those that it has in common with the teacher.

        Args:
            hard, soft: weights and counts of the two.
            teacher: None where the stage does not want `distillation`.
        Raises:
            ValueError: the models have answers of different lengths.
        """
        counts = {"answers": hard.number} | ({} if soft is None else {"distillation": soft.number})
        wanted = {name: self.weights[name] for name in counts if self.wants(name)}
        rows, head = student.hidden["answer"].values, student.head
        assert head is not None
        # a second pass costs less where the first one is repeated, or where the terms are divided by other numbers
        once = self.micro_batch is None and (soft is None or soft is hard)
        compared = self.shared(head) if "distillation" in wanted else head
        sums: dict[str, Tensor | None] = {}
        if "distillation" in wanted:
            assert teacher is not None
            assert soft is not None
            self._check_lengths(student, teacher)
            declared = wanted.get("answers", 0.0) if compared is head else 0.0, wanted["distillation"]
            losses = token_losses(
                rows,
                compared,
                student.targets,
                teacher=self.answered(teacher),
                divergence=divergence,
                row_weights=_of_both(hard.rows, soft.rows, student.targets),
                declared=declared if once else None,
            )
            sums = {"answers": losses.ce, "distillation": losses.kd}
        if "answers" in wanted and (compared is not head or not sums):
            whole = (1.0, 0.0) if once else None
            sums["answers"] = token_losses(rows, head, student.targets, row_weights=hard.rows, declared=whole).ce
        return {name: Counted(total, counts[name]) for name in wanted if (total := sums[name]) is not None}

    def _check_lengths(self, student: TokenFeatures, teacher: TokenFeatures) -> None:
        if self.kept is not None:
            own = self.kept.to(student.targets.device)[student.targets]
            if not torch.equal(own, teacher.targets.to(own)):
                raise ValueError(
                    "an answer has tokens of the teacher that were cut out of the student's vocabulary, so both read "
                    "it in different tokens. Cut it with all training texts, or set method.alignment=bytes (token_kd)"
                )
            return
        if len(teacher.targets) != len(student.targets):
            raise ValueError(
                f"the answers of a batch have {len(student.targets)} tokens of the student and {len(teacher.targets)} "
                "of the teacher: both must have one vocabulary and one end of a turn (cmapkd doctor compares them)"
            )

    def answered(self, teacher: TokenFeatures) -> Any:
        """What `token_losses` reads of a teacher: its states and head, or as many likeliest tokens as are asked for."""
        asked = self.teacher_top
        if teacher.top is not None:
            return teacher.top if asked is None else narrowed(teacher.top, min(asked.number, teacher.top.ids.shape[-1]))
        states, head = teacher.hidden["answer"].values, self.teacher_head(teacher)
        if asked is None:
            return states, head
        with torch.no_grad():
            parts = [
                top_tokens(head(rows), min(asked.number, len(head.weight)), temperature=asked.temperature)
                for rows in states.split(TOP_ROWS)
            ]
        return TopTokens(*(torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "log_p", "rest")))

    def divergence_at(
        self,
        student: TokenFeatures,
        rows: Rows,
        teacher: TokenFeatures,
        states: Float[Tensor, "rows width"],
        *,
        divergence: TokenDivergence,
        weights: Float[Tensor, " rows"] | None = None,
    ) -> Float[Tensor, ""]:
        """The divergence between what both models predict behind other tokens than answers: a sum over rows.

        Args:
            rows: the student's final states there.
            states: the teacher's, in the same order.
            divergence: one that asks for no target.
        """
        assert student.head is not None
        losses = token_losses(
            rows.values,
            self.shared(student.head),
            torch.zeros_like(rows.sample),  # of a cross-entropy that nobody reads
            teacher=(states, self.teacher_head(teacher)),
            divergence=divergence,
            row_weights=weights,
            declared=(0.0, 1.0) if self.micro_batch is None else None,
        )
        assert losses.kd is not None
        return losses.kd

    def teacher_head(self, teacher: TokenFeatures) -> LogitHead:
        """The teacher's head over the tokens that both models have, in the student's order."""
        assert teacher.head is not None
        if self.kept is None:
            return self.shared(teacher.head)
        return picked_head(teacher.head, self.kept.to(teacher.head.weight.device))

    def shared(self, head: LogitHead) -> LogitHead:
        """A head over the tokens that student and teacher have in common."""
        return head if self.num_tokens is None else cut_head(head, self.num_tokens)

    def weigh(self, part: Batch, rows: Rows, *, wanted: Bool[Tensor, " samples"] | None = None) -> Weighed:
        """The weight of each row in a sum, and what `reduction` divides the sum by, in this part.

        Args:
            rows: whose `sample` says which row belongs to which sample of the part.
            wanted: samples that count; None: all. The weight of the others' rows is 0.
        """
        size, reduction, owners = len(part), self.config.reduction, rows.sample
        dtype = torch.promote_types(rows.values.dtype, torch.float32)
        counts = torch.ones(size, dtype=dtype, device=owners.device) if wanted is None else wanted.to(dtype)
        lengths = torch.zeros_like(counts).index_add_(0, owners, torch.ones_like(owners, dtype=dtype))
        if reduction == "sample_mean":
            counts = counts * (lengths > 0)
            return Weighed((counts / lengths.clamp(min=1))[owners], counts.sum())
        number = counts.sum() if reduction == "batch_sum" else (counts * lengths).sum()
        return Weighed(None if wanted is None else counts[owners], number)

    def given(self, part: Batch) -> Bool[Tensor, " samples"] | None:
        """Which samples of a part have the answer that the data give; None: all."""
        rolled: Tensor | None = part.extra.get(ROLLED)
        return None if rolled is None else ~rolled.to(self.device, non_blocking=True)

    def why_whole(self, stages: Sequence[StageConfig]) -> str | None:
        if self.on_policy is not None:
            return (
                "method.on_policy writes answers of different lengths in every process, and shared weights would be "
                "gathered for each token, by all processes at once: leave on_policy out"
            )
        return super().why_whole(stages)

    def shared_parameters(self) -> Mapping[str, nn.Parameter]:
        """The last matrix of weights below what any term of the stage is made of first; mostly the final states."""
        return self._shared_matrix.of(self.student, [what for name, what in self.made_of.items() if self.wants(name)])

    def _rolled_out(self, batch: Batch) -> Batch:
        """The batch, with the student's own answers in the place of some, where the method learns on its policy."""
        if self.on_policy is None or not self.training:
            return batch
        teachers: dict[str, Any] = {
            role: each.model for role, each in self.teachers.items() if each.reads == role and role in batch.inputs
        }
        batch, measured = roll_out(
            batch,
            self.student,
            teachers,
            self.on_policy,
            step=self.step,
            common=self.num_tokens,
            at_once=self.micro_batch,
        )
        self.measurements |= measured
        return batch


def _of_both(hard: Tensor | None, soft: Tensor | None, like: Tensor) -> Float[Tensor, "2 rows"] | Tensor | None:
    """Weights of the rows in two sums as `token_losses` reads them."""
    if hard is soft:
        return hard
    known = next(each for each in (hard, soft) if each is not None)
    ones = torch.ones_like(like, dtype=known.dtype)
    return torch.stack([ones if each is None else each for each in (hard, soft)])

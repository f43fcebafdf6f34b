"""ALBEF's momentum distillation for dual encoders (Li et al., NeurIPS 2021, arXiv:2107.07651): its contrastive part.

The teacher is a moving average of the student. Its embeddings of the batch and of a queue are the candidates, and its
softmax softens the targets. Departures and how it was checked: the card below and docs/methods/albef.md.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from cmapkd.data.types import Batch
from cmapkd.features import BankStore, EmbeddingBank, gather_rows, sample_keys
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.dual import DualEncoderMethod
from cmapkd.methods.in_batch import embeddings_of
from cmapkd.methods.terms import Term
from cmapkd.models import DualEncoder, Features, FrozenTeacher, MomentumTeacher
from cmapkd.objectives import soft_contrast


class AlbefConfig(MethodConfig):
    """How much the momentum teacher is believed, how slowly it moves, and how many earlier pairs are candidates."""

    alpha: float = Field(
        0.4,
        ge=0,
        le=1,
        description="Share of the soft target, the momentum teacher's softmax; the pair itself has the rest.",
    )
    alpha_warmup: float = Field(
        1 / 30,
        ge=0,
        le=1,
        description="Share of the run over which alpha rises from 0 in a line. Published: the first of 30 epochs.",
    )
    momentum: float = Field(
        0.995, ge=0, lt=1, description="Weight of the past in the momentum teacher's weights, at each step."
    )
    queue: int = Field(
        65_536, ge=0, description="Earlier pairs whose momentum embeddings are candidates, too; 0: the batch alone."
    )
    queue_store: BankStore = Field("fp32", description="Type of the queue's numbers.")


class Albef(DualEncoderMethod):
    """Images and texts find their pair among a momentum teacher's embeddings, which say what else would fit."""

    Config: ClassVar[type[MethodConfig]] = AlbefConfig
    uses_teacher: ClassVar[bool] = False
    steady = True
    card: ClassVar[MethodCard] = MethodCard(
        title="ALBEF: contrastive learning with momentum distillation (its part for dual encoders)",
        paper="Li et al., NeurIPS 2021, arXiv:2107.07651",
        equations=(
            "v', t' are unit embeddings of the momentum teacher; K_v, K_t its images and texts of [the batch | queue]",
            "p(a, K) = σ(s a Kᵀ), s the student's logit scale; targets get no gradient",
            "L_contrastive = 1/2 [CE(p(v, K_t), own pair) + CE(p(t, K_v), own pair)]",
            "L_distill = 1/2 [KL(p(v', K_t) ‖ p(v, K_t)) + KL(p(t', K_v) ‖ p(t, K_v))]",
            "L = (1 - a) L_contrastive + a L_distill, a from 0 to alpha over the first alpha_warmup of the run",
            "after each step: teacher = momentum teacher + (1 - momentum) student",
        ),
        needs="student embeddings and logit scale; no teacher but the student's own average",
        trainable="the student",
        departures=(
            "The contrastive part alone: dual encoders have no fusion encoder for ALBEF's matching and masked language "
            "losses.",
            "KL instead of the soft cross-entropy: the same gradient, and zero where the student is its teacher.",
            "The queue starts empty, published with random directions. Entries of the sample itself are no candidates.",
            "The queue need not be a multiple of the batch.",
            "alpha rises over a share of the run in place of an epoch.",
            "The scale stays in CLIP's range of 1 to 100; published: a temperature from 0.001 to 0.5.",
            "A logit bias (SigLIP) is in no softmax, so it does not learn.",
        ),
        checked_against="the published contrastive lines run on random features: value and gradients, "
        "tests/methods/fixtures/albef.json",
    )

    def __init__(self, config: AlbefConfig, *, student: DualEncoder, teacher: FrozenTeacher | None = None) -> None:
        super().__init__(config, student=student, teacher=teacher)
        self.config = config
        self.momentum = MomentumTeacher(student, decay=config.momentum)
        self.teachers[self.momentum.role] = self.momentum
        self.queue = EmbeddingBank(config.queue, student.embed_dim, store=config.queue_store) if config.queue else None

    @property
    def term_names(self) -> tuple[str, ...]:
        config = self.config
        counted = {"contrastive": config.alpha < 1 or config.alpha_warmup > 0, "distill": config.alpha > 0}
        return tuple(name for name, counts in counted.items() if counts)

    def terms(self, batch: Batch) -> dict[str, Term]:
        """Both parts of the mixed target, with their shares in this step; of all processes' samples."""
        student, teacher = self.encode_student(batch), self.encode_teacher(batch)
        keys = self._keys(batch, student)
        known = None if self.queue is None else self.queue.references(keys)
        parts = soft_contrast(
            *embeddings_of(student),
            *embeddings_of(teacher),
            logit_scale=student.logit_scale,
            queue=None if known is None else (known.image, known.text),
            exclude=None if known is None else known.exclude,
            pictures=student.pictures,
        )
        if self.queue is not None and self.training:
            self.queue.push(*embeddings_of(teacher), keys)
        share = self.share
        terms = {"contrastive": Term(parts.hard, 1 - share), "distill": Term(parts.soft, share)}
        return {name: terms[name] for name in self.term_names if self.wants(name)}

    @property
    def share(self) -> float:
        """Of the soft target in this step, in [0, alpha]."""
        steps = self.config.alpha_warmup * self.step.total
        return self.config.alpha * (min(1.0, self.step.step / steps) if steps else 1.0)

    def _keys(self, batch: Batch, student: Features) -> Int[Tensor, " batch"]:
        """What names the samples in the queue: their pictures where these are told apart, else their ids."""
        if student.pictures is not None:
            return student.pictures & torch.iinfo(torch.int64).max  # the queue's keys are >= 0
        return gather_rows(sample_keys(batch.ids).to(self.device, non_blocking=True))

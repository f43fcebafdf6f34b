"""MobileCLIP's multi-modal reinforced training (Vasu et al., CVPR 2024, arXiv:2311.17049; MobileCLIP2, 2508.20691).

Several teachers, whose in-batch probabilities are averaged, and a synthetic caption for each real one. What the
published data set stores is here a cache: docs/methods/mobileclip.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from jaxtyping import Float
from pydantic import Field, field_validator
from torch import Tensor

from cmapkd.config import ConfigError
from cmapkd.data.types import Batch
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.dual import DualEncoderMethod, task_loss
from cmapkd.methods.in_batch import embeddings_of
from cmapkd.methods.terms import Term
from cmapkd.models import DualEncoder, Features, FrozenTeacher
from cmapkd.objectives import ensemble_divergence

SYNTHETIC = "synthetic"


class MobileCLIPConfig(MethodConfig):
    """What each term counts, how sharp the teachers are, and whether synthetic captions are read."""

    task_weight: float = Field(0.25, ge=0, description="Weight of the student's own contrastive loss.")
    distill_weight: float = Field(0.75, ge=0, description="Weight of the KL from the teachers' mean probabilities.")
    teacher_scales: float | tuple[float, ...] | None = Field(
        None, description="Logit scale of the teachers, one for all or one each; none: each teacher's own."
    )
    synthetic: bool = Field(
        False, description="Sum the loss over the caption and a synthetic one of the same picture; the data has them."
    )

    @field_validator("teacher_scales")
    @classmethod
    def _scales_are_positive(cls, value: float | tuple[float, ...] | None) -> float | tuple[float, ...] | None:
        given = value if isinstance(value, tuple) else () if value is None else (value,)
        if any(scale <= 0 for scale in given):
            raise ValueError(f"a logit scale multiplies cosines and is positive, got {value}")
        return value


class MobileCLIP(DualEncoderMethod):
    """The student imitates the mean of several teachers' softmaxes over the batch, with real and synthetic captions."""

    Config: ClassVar[type[MethodConfig]] = MobileCLIPConfig
    several_teachers: ClassVar[bool] = True
    steady = True
    card: ClassVar[MethodCard] = MethodCard(
        title="MobileCLIP: multi-modal reinforced training with an ensemble of teachers and synthetic captions",
        paper="Vasu et al., CVPR 2024, arXiv:2311.17049; MobileCLIP2: Faghri et al., TMLR 2025, arXiv:2508.20691",
        equations=(
            "P(t) = 1/K Σ_k σ(s_k v_k t_kᵀ), Q(t) = 1/K Σ_k σ(s_k t_k v_kᵀ) over K teachers",
            "L_KD(t) = 1/2 [KL(P(t) ‖ σ(s_S v_S t_Sᵀ)) + KL(Q(t) ‖ σ(s_S t_S v_Sᵀ))]",
            "l(t) = task_weight L_contrastive(t) + distill_weight L_KD(t)",
            "L = l(captions), plus l(synthetic captions) where they are read",
        ),
        needs="embeddings of all models and their logit scales; of one or more teachers; synthetic captions if asked",
        trainable="the student",
        departures=(
            "KL in place of the soft cross-entropy: the same gradient, and zero where the student is the mean.",
            "A teacher's scale is its own unless it is given (published: 100 for each of MobileCLIP's teachers, 70 and "
            "60 for MobileCLIP2's).",
            "Weights are the published 0.25 and 0.75 of MobileCLIP-B on DataCompDR-1B; 0 and 1 is what the other "
            "published runs use.",
            "With several processes both softmaxes are computed; the published code without local loss transposes one.",
        ),
        checked_against="DRClipLoss rebuilt from the published patch, run on random embeddings: values and gradients, "
        "tests/methods/fixtures/mobileclip.json; with one teacher hinton, exactly",
    )

    def __init__(
        self,
        config: MobileCLIPConfig,
        *,
        student: DualEncoder,
        teacher: FrozenTeacher | None = None,
        more_teachers: Sequence[FrozenTeacher] = (),
    ) -> None:
        super().__init__(config, student=student, teacher=teacher, more_teachers=more_teachers)
        self.config = config
        scales = config.teacher_scales
        if isinstance(scales, tuple) and len(scales) != len(self.teachers):
            raise ConfigError(
                f"method.teacher_scales has {len(scales)} numbers for the {len(self.teachers)} teachers "
                f"{', '.join(self.teachers)}: give one for each, in this order, or one number for all"
            )

    @property
    def text_pools(self) -> Mapping[str, int]:
        return {SYNTHETIC: 1} if self.config.synthetic else {}

    @property
    def term_names(self) -> tuple[str, ...]:
        return tuple(name for _, name, _ in self._planned())

    def terms(self, batch: Batch) -> dict[str, Term]:
        wanted = [(pool, name, weight) for pool, name, weight in self._planned() if self.wants(name, weight)]
        student = self.encode_student(batch)
        teachers = self.encode_teachers(batch) if any(name.startswith("similarity") for _, name, _ in wanted) else {}
        terms: dict[str, Term] = {}
        for pool, name, weight in wanted:
            of_student = student.with_texts(pool) if pool else student
            if name.startswith("contrastive"):
                terms[name] = Term(task_loss(of_student), weight)
            else:
                of_teachers = {
                    role: features.with_texts(pool) if pool else features for role, features in teachers.items()
                }
                terms[name] = Term(self._similarity(of_student, of_teachers), weight)
        return terms

    def _planned(self) -> list[tuple[str, str, float]]:
        """Pool of the texts (none: the captions), name and weight of each term that counts."""
        weights = {"contrastive": self.config.task_weight, "similarity": self.config.distill_weight}
        return [
            (pool, f"{name}_{pool}" if pool else name, weight)
            for pool in ("", *self.text_pools)
            for name, weight in weights.items()
            if weight
        ]

    def _similarity(self, student: Features, teachers: Mapping[str, Features]) -> Float[Tensor, ""]:
        scales = self.config.teacher_scales
        if scales is None:
            of_teachers: list[Tensor | float] = [features.logit_scale for features in teachers.values()]
        else:
            of_teachers = [*scales] if isinstance(scales, tuple) else [scales] * len(teachers)
        return ensemble_divergence(
            *embeddings_of(student),
            [embeddings_of(teacher) for teacher in teachers.values()],
            student_scale=student.logit_scale,
            teacher_scales=of_teachers,
        )

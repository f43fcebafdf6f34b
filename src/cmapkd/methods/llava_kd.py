"""LLaVA-KD (Cai et al., ICCV 2025, arXiv:2410.16236): answers, visual tokens and their relations, in three stages.

The teacher's next-token distributions are followed behind visual tokens, too. Departures: docs/methods/llava_kd.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from cmapkd.data.types import Batch
from cmapkd.features.visual_rows import beside, by_pictures, check_visual_tokens
from cmapkd.methods.behind_terms import Made, mixers_of
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.generative import Counted, GenerativeConfig, GenerativeMethod
from cmapkd.methods.stages import StageConfig
from cmapkd.models import FrozenTeacher
from cmapkd.models.generative import GenerativeModel
from cmapkd.models.token_types import TokenFeatures, TokenNeeds, Where
from cmapkd.objectives.relation import token_relation_distance
from cmapkd.objectives.tokens import TokenDivergence

PRE_TRAINING, FINE_TUNING = 558, 665  # thousands of samples that each stage of the paper reads once


class LlavaKDConfig(GenerativeConfig):
    """Which divergence, where relations are read, and what each term counts."""

    form: Literal["three_stages", "one_stage"] = Field(
        "three_stages",
        description="three_stages: distilled pre-training, fine-tuning without teacher, distilled fine-tuning, where "
        "the recipe names no stages; one_stage: all terms and all parts from the first step on.",
    )
    divergence: Literal["forward", "reverse", "jsd", "skew_forward", "skew_reverse", "tv"] = Field(
        "forward", description="Between next-token distributions, behind tokens of answers and behind visual ones."
    )
    skew: float = Field(0.1, gt=0, lt=1, description="skew_*: how much of the first distribution is in the mixture.")
    beta: float = Field(0.5, ge=0, le=1, description="jsd: weight of the teacher in the mixture.")
    relation_level: Literal["language", "projector"] = Field(
        "language",
        description="Of which visual tokens cosines are compared. language: final states, as the paper says; "
        "projector: as the language model is fed with them, as the released code computes.",
    )
    answers_weight: float = Field(1.0, ge=0, description="Weight of the cross-entropy with the answers of the data.")
    distill_weight: float = Field(1.0, ge=0, description="Weight of the divergence behind tokens of answers.")
    visual_weight: float = Field(1.0, ge=0, description="Weight of the divergence behind visual tokens.")
    relation_weight: float = Field(0.5, ge=0, description="Weight of the distance of cosines among visual tokens.")

    @model_validator(mode="after")
    def _settings_are_read(self) -> LlavaKDConfig:
        for name, readers in (("beta", ("jsd",)), ("skew", ("skew_forward", "skew_reverse"))):
            if self.divergence not in readers and self.changed(name):
                raise ValueError(f"{name} is read by divergence {' and '.join(readers)} alone: leave it out")
        if not (self.visual_weight or self.relation_weight):
            raise ValueError(
                "visual_weight and relation_weight are 0, and what is left is token_kd: set method: token_kd, whose "
                "teacher can answer from a cache"
            )
        if not self.answers_weight and self.form == "three_stages":
            raise ValueError(
                "answers_weight is 0, and the second of the three stages learns from answers alone: give it a weight, "
                "or set form: one_stage"
            )
        return self


class LlavaKD(GenerativeMethod):
    """Divergences behind answers and behind visual tokens, and relations among visual tokens."""

    Config: ClassVar[type[MethodConfig]] = LlavaKDConfig
    of_teacher: ClassVar[frozenset[str]] = frozenset({"distillation", "visual", "relation"})
    card: ClassVar[MethodCard] = MethodCard(
        title="LLaVA-KD: answers, visual tokens and their relations, in three stages",
        paper="Cai et al. 2025 (ICCV), arXiv:2410.16236",
        equations=(
            "p, q = softmax of the teacher's and the student's logits at temperature 1; N answer tokens, K visual ones",
            "L_res = (1/N) Σ_n KL(p_n ‖ q_n); L_vis = (1/K) Σ_k KL(p_k ‖ q_k)",
            "R = N(v) N(v)ᵀ of a picture's visual tokens v; L_rel = mean over pictures of 1 − cos(vec R_S, vec R_T)",
            "L = CE + L_res + L_vis + 0.5 L_rel in distilled pre-training, where the projector learns",
            "L = CE in fine-tuning, and as before in distilled fine-tuning; projector and language model learn in both",
        ),
        needs="final states of answers and visual tokens of both models, which must have one vocabulary, and as many "
        "visual tokens or square grids of them; widths, depths and prompts may differ; no cache",
        trainable="projector in the first stage, projector and language model in the others; not the vision tower",
        departures=(
            "The repository has no training code. Weights and trained parts could not be checked in the paper.",
            "The stages take 30, 35 and 35 percent of the steps, as 558, 665 and 665 thousand samples are.",
            "Sums over tokens are divided once, over all micro-batches and processes.",
            "Rows of a head that belong to no token are cut off in both models before any softmax.",
            "Where grids of visual tokens differ in size, the teacher's states are averaged to the student's.",
        ),
        checked_against="the sums in plain loops, with gradients; the released divergences and cosines "
        "(tests/methods/fixtures/llava_kd.json)",
    )
    not_cached: str | None = (
        "its terms read the teacher's states at visual tokens, and a cache holds next-token distributions of answers"
    )
    config: LlavaKDConfig

    def __init__(
        self, config: LlavaKDConfig, *, student: GenerativeModel, teacher: FrozenTeacher | None = None
    ) -> None:
        super().__init__(config, student=student, teacher=teacher)
        self.config = config
        self.weights = {
            "answers": config.answers_weight,
            "distillation": config.distill_weight,
            "visual": config.visual_weight,
            "relation": config.relation_weight,
        }
        self.divergence = TokenDivergence(config.divergence, beta=config.beta, lam=config.skew)
        assert teacher is not None
        check_visual_tokens(student, teacher.model)

    @property
    def default_stages(self) -> tuple[StageConfig, ...]:
        if self.config.form == "one_stage":
            return ()
        projector = ("projector", "weighting")
        models = (*projector, "embeddings", "language", "head", "adapters", *mixers_of(self.student_parts))
        whole = PRE_TRAINING + 2 * FINE_TUNING
        first, other = round(PRE_TRAINING / whole, 2), round(FINE_TUNING / whole, 2)
        return (
            StageConfig(name="distilled pre-training", share=first, train=projector),
            StageConfig(name="fine-tuning", share=other, terms=("answers",), train=models),
            StageConfig(name="distilled fine-tuning", share=other, train=models),
        )

    @property
    def made_of(self) -> Mapping[str, Made]:
        return {"relation": "projected" if self.config.relation_level == "projector" else "states"}

    @property
    def student_needs(self) -> TokenNeeds:
        """Visual tokens where the stage compares them."""
        relation = self.wants("relation")
        projected = relation and self.config.relation_level == "projector"
        visual = self.wants("visual") or (relation and not projected)
        where: tuple[Where, ...] = ("answer", "visual") if visual else ("answer",)
        return TokenNeeds(frozenset(where), projected=projected)

    @property
    def teacher_needs(self) -> TokenNeeds:
        return self.student_needs

    def sums(self, part: Batch, student: TokenFeatures, teacher: TokenFeatures | None) -> dict[str, Counted]:
        weighed = self.weigh(part, student.hidden["answer"])
        counted = self.losses(student, weighed, teacher=teacher, divergence=self.divergence, soft=weighed)
        if teacher is None:
            return counted
        if self.wants("visual"):
            rows = student.hidden["visual"]
            number = self.weigh(part, rows)
            states = beside(teacher.hidden["visual"], *self.visual_counts(part))
            total = self.divergence_at(student, rows, teacher, states, divergence=self.divergence, weights=number.rows)
            counted["visual"] = Counted(total, number.number)
        if self.wants("relation"):
            counted["relation"] = self._relation(part, student, teacher)
        return counted

    def _relation(self, part: Batch, student: TokenFeatures, teacher: TokenFeatures) -> Counted:
        if self.config.relation_level == "projector":
            own, theirs = student.projected, teacher.projected
            assert own is not None
            assert theirs is not None
        else:
            own, theirs = student.hidden["visual"], teacher.hidden["visual"]
        counts, others = self.visual_counts(part)
        tables = by_pictures(own.values, beside(theirs, counts, others), counts)
        total = own.values.sum() * 0 + sum(token_relation_distance(*pair).sum() for pair in tables)
        return Counted.of(total, sum(map(bool, counts)))

"""PromptKD (Li et al., CVPR 2024, arXiv:2403.02781): unsupervised distillation into visual prompts of a frozen student.

The teacher's class vectors are the classifier of both models. What is saved is a dual encoder: the prompted image tower
behind its projector, beside the teacher's text tower. Departures: the card below and docs/methods/promptkd.md.
"""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field
from torch import Tensor

from cmapkd.data.templates import ClassPrompts
from cmapkd.data.types import Batch
from cmapkd.methods.card import ClassesConfig, MethodCard, MethodConfig
from cmapkd.methods.dual import PictureMethod
from cmapkd.methods.step import StepInfo
from cmapkd.methods.terms import Term
from cmapkd.models import DualEncoder, Features, FrozenTeacher, TowerFeatures
from cmapkd.models.joined import JoinedEncoder
from cmapkd.models.prompts import make_prompts
from cmapkd.models.texts import frozen_class_vectors
from cmapkd.objectives import kl_divergence, similarities


class PromptKDConfig(ClassesConfig):
    """How many prompts, how deep, and how soft."""

    distill_weight: float = Field(
        1000.0, gt=0, description="Weight of the KL divided by the number of classes; published: 1000, or 200."
    )
    temperature: float = Field(1.0, gt=0, description="Divides both models' logits on top of their own logit scales.")
    prompts: int = Field(4, ge=0, description="Learned tokens in a block that has some; 0: only the projector learns.")
    prompt_depth: int | None = Field(
        None, ge=1, description="Blocks with prompts of their own, from the first; none: 9, or all of fewer."
    )


class PromptKD(PictureMethod):
    """The frozen student's prompts and projector learn the teacher's class probabilities from pictures alone."""

    Config: ClassVar[type[MethodConfig]] = PromptKDConfig
    steady = True
    card: ClassVar[MethodCard] = MethodCard(
        title="PromptKD: unsupervised prompt distillation",
        paper="Li et al., CVPR 2024, arXiv:2403.02781",
        equations=(
            "W: unit vectors of the classes' prompts by the teacher's text tower, of both models",
            "u = N(P(f_S(x; prompts))), P: linear, batch norm, ReLU, linear",
            "Z_S = s_S u Wᵀ, Z_T = s_T v_T Wᵀ",
            "L = distill_weight T² 1/(B C) Σ_i KL(σ(Z_T,i/T) ‖ σ(Z_S,i/T))",
        ),
        needs="pictures and the names of the classes; no captions, no labels. The student's image tower is a plain ViT",
        trainable="the prompts and the projector; the student is frozen, its text tower is not used",
        departures=(
            "The teacher is taken as it is: its own prompts, tuned on base classes before, are not part of the method.",
            "Class vectors are the mean over the evaluation's templates, not of one tuned prompt.",
            "The first block's prompts join in front of that block, the published ones before the norm in front of it.",
            "The projector's batch norm sees the whole batch, whatever the micro-batches and processes.",
            "AdamW with this toolkit's schedule in place of SGD; no teacher's text tower in every step.",
        ),
        checked_against="the published loss line and projector class run on random inputs: values, gradients, running "
        "statistics, tests/methods/fixtures/promptkd.json",
    )

    class_vectors: Tensor

    def __init__(
        self,
        config: PromptKDConfig,
        *,
        student: DualEncoder,
        teacher: FrozenTeacher | None = None,
        classes: ClassPrompts | None = None,
    ) -> None:
        super().__init__(config, student=student, teacher=teacher)
        assert teacher is not None
        assert classes is not None
        self.config, self.weights = config, {"classes": config.distill_weight}
        self.register_buffer("class_vectors", frozen_class_vectors(teacher, classes))
        student.requires_grad_(False)
        prompts = make_prompts(student, depth=config.prompt_depth, count=config.prompts) if config.prompts else None
        self.student = JoinedEncoder(student, teacher, projector="two_layer", prompts=prompts)

    @property
    def prompted(self) -> JoinedEncoder:
        """The student with what is trained of it."""
        assert isinstance(self.student, JoinedEncoder)
        return self.student

    def train(self, mode: bool = True) -> Self:
        """The frozen student stays in eval mode: nothing of it changes, not even statistics, and it drops nothing."""
        super().train(mode)
        self.prompted.image.eval()
        return self

    def after_step(self, step: StepInfo | None = None) -> None:
        """Nothing: the logit scale is the student's own, and frozen."""

    def _encode_student(self, part: Batch, _number: int = 0) -> Features:
        """The student's embedding before its projector, whose batch norm wants the whole batch."""
        images = self.student_pixels(part)
        scale = self.prompted.log_logit_scale.exp().reshape(())
        nothing = TowerFeatures(scale.new_empty(len(images), 0))
        return Features(self.prompted.before_projector(images), nothing, scale)

    def terms(self, batch: Batch) -> dict[str, Term]:
        student, teacher = self.encode_student(batch), self.encode_teacher(batch)
        projected = self.prompted.project(student.image.embedding)
        logits = similarities(projected, self.class_vectors, student.logit_scale)
        soft = similarities(teacher.image.embedding, self.class_vectors, teacher.logit_scale)
        divergence = kl_divergence(logits, soft, temperature=self.config.temperature)
        return self.weighted({"classes": divergence / len(self.class_vectors)})

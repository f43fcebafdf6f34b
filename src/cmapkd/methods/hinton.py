"""Knowledge distillation of in-batch similarity logits (Hinton et al. 2015, arXiv:1503.02531).

For a dual encoder the "classes" of an image are the texts of the batch, and the other way round: the reading that
open_clip's own distillation takes (there with temperature 1 and weight 1).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from cmapkd.data.types import Batch
from cmapkd.methods.base import Method, MethodCard, MethodConfig, Term, task_loss
from cmapkd.models import DualEncoder, FrozenTeacher
from cmapkd.objectives import similarity_divergence


class HintonConfig(MethodConfig):
    """How soft the distributions are, and what each term counts."""

    temperature: float = Field(1.0, gt=0, description="Divides both models' logits on top of their own logit scales.")
    distill_weight: float = Field(1.0, ge=0, description="Weight of the KL divergence, in both directions.")
    task_weight: float = Field(1.0, ge=0, description="Weight of the student's own contrastive loss.")


class Hinton(Method):
    """The teacher's softmax over the batch, each image over texts and each text over images."""

    Config: ClassVar[type[MethodConfig]] = HintonConfig
    card: ClassVar[MethodCard] = MethodCard(
        title="Knowledge distillation of in-batch similarities",
        paper="Hinton et al. 2015, arXiv:1503.02531, section 2; in-batch form as open_clip's DistillClipLoss",
        equations=(
            "Z_S = s_S v_S t_Sᵀ, Z_T = s_T v_T t_Tᵀ",
            "L_KD = T²/2 [KL(σ(Z_T/T) ‖ σ(Z_S/T)) + KL(σ(Z_Tᵀ/T) ‖ σ(Z_Sᵀ/T))]",
            "L = task_weight L_contrastive + distill_weight L_KD",
        ),
        needs="embeddings and logit scales of both models; widths may differ",
        trainable="the student",
        departures=(
            "KL instead of open_clip's soft cross-entropy: the same gradient, and zero at agreement.",
            "Hard and soft terms weigh 1 : 1 at temperature 1, as in open_clip; the paper only says that the hard term "
            "should count considerably less.",
        ),
        checked_against="the formula written out; open_clip's DistillClipLoss (gradient, and value up to the teacher's "
        "entropy)",
    )

    def __init__(self, config: HintonConfig, *, student: DualEncoder, teacher: FrozenTeacher | None = None) -> None:
        super().__init__(config, student=student, teacher=teacher)
        self.config = config

    @property
    def term_names(self) -> tuple[str, ...]:
        return ("contrastive", "similarity")

    def terms(self, batch: Batch) -> dict[str, Term]:
        student, teacher = self.encode_student(batch), self.encode_teacher(batch)
        return {
            "contrastive": Term(task_loss(student), self.config.task_weight),
            "similarity": Term(
                similarity_divergence(
                    student.image.embedding,
                    student.text.embedding,
                    teacher.image.embedding,
                    teacher.text.embedding,
                    student_scale=student.logit_scale,
                    teacher_scale=teacher.logit_scale,
                    temperature=self.config.temperature,
                ),
                self.config.distill_weight,
            ),
        }

"""Knowledge distillation of softened distributions (Hinton et al. 2015, arXiv:1503.02531), in two readings.

What the "classes" are is the choice of a form. `in_batch`: for an image the texts of the batch, and the other way
round, the reading that open_clip's own distillation takes (there with temperature 1 and weight 1). `classes`: the
classes of the training source, each a vector that the text tower makes of its prompts.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from cmapkd.config import ConfigError
from cmapkd.data.labels import LabelReader
from cmapkd.data.templates import ClassPrompts
from cmapkd.data.types import Batch
from cmapkd.features.closed_form import class_means
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.dual import DualEncoderMethod, task_loss
from cmapkd.methods.in_batch import similarity_loss
from cmapkd.methods.targets import Answered, Survey
from cmapkd.methods.terms import Term
from cmapkd.models import DualEncoder, FrozenTeacher, LevelRequest
from cmapkd.models.joined import JoinedEncoder
from cmapkd.models.texts import LearnedClassVectors, frozen_class_vectors
from cmapkd.objectives import kl_divergence, labelled_cross_entropy, similarities

IMAGES_PER_CLASS = 100
"""Of each class, images whose mean is its vector: as many as in CLIP-Embed-KD (arXiv:2404.06170)."""


class HintonConfig(MethodConfig):
    """What is softened, how much, and what each term counts."""

    form: Literal["in_batch", "classes"] = Field(
        "in_batch", description="What images are matched with: the texts of the batch (and they with images); classes."
    )
    temperature: float = Field(1.0, gt=0, description="Divides both models' logits on top of their own logit scales.")
    distill_weight: float = Field(1.0, ge=0, description="Weight of the KL divergence; in_batch: in both directions.")
    task_weight: float = Field(
        1.0, ge=0, description="Weight of the student's own loss; in_batch: contrastive; classes: CE with the labels."
    )
    class_vectors: Literal["own", "teacher", "image_means"] = Field(
        "own",
        description="classes: what the student's images are matched with. own: vectors of its own text tower, the "
        "teacher has its own; teacher: the teacher's; image_means: the mean teacher embedding of labelled images.",
    )
    prompts_at_once: int | None = Field(
        1, ge=1, description="classes, own: templates drawn in each step for the student's vectors; none: all."
    )
    label_share: float = Field(
        1.0, ge=0, le=1, description="classes: share of the samples whose label is read; the others are unlabelled."
    )

    @property
    def reads_classes(self) -> bool:
        return self.form == "classes"

    @property
    def reads_captions(self) -> bool:
        return self.form == "in_batch"

    @property
    def of_images(self) -> bool:
        """Whether class vectors are means of the teacher's embeddings of images."""
        return self.reads_classes and self.class_vectors == "image_means"


class Hinton(DualEncoderMethod):
    """The teacher's softmax over the batch, each image over texts and each text over images; or over classes."""

    Config: ClassVar[type[MethodConfig]] = HintonConfig
    steady = True
    card: ClassVar[MethodCard] = MethodCard(
        title="Knowledge distillation of in-batch similarities, or of classes",
        paper="Hinton et al. 2015, arXiv:1503.02531, section 2; in-batch form as open_clip's DistillClipLoss",
        equations=(
            "in_batch: Z_S = s_S v_S t_Sᵀ, Z_T = s_T v_T t_Tᵀ",
            "L_KD = T²/2 [KL(σ(Z_T/T) ‖ σ(Z_S/T)) + KL(σ(Z_Tᵀ/T) ‖ σ(Z_Sᵀ/T))]",
            "L = task_weight L_contrastive + distill_weight L_KD",
            "classes: Z_S = s_S v_S W_Sᵀ, Z_T = s_T v_T W_Tᵀ, W the unit vectors of the classes' prompts",
            "L_KD = T² KL(σ(Z_T/T) ‖ σ(Z_S/T)), batch mean; L = task_weight CE(Z_S, y) + distill_weight L_KD",
            "image_means: W_S = W_T = N(mean of N(v_T) over up to 100 labelled images of a class); of its prompts "
            "where it has none",
        ),
        needs="embeddings and logit scales of both models; widths may differ. classes: names of the classes, and "
        "labels where there are any",
        trainable="the student; with class_vectors: teacher or image_means its image tower, and a linear map where the "
        "widths differ",
        departures=(
            "KL instead of open_clip's soft cross-entropy: the same gradient, and zero at agreement.",
            "Hard and soft terms weigh 1 : 1 at temperature 1, as in open_clip; the paper only says that the hard term "
            "should count considerably less, and mdistiller takes 0.1 : 0.9 at temperature 4.",
            "classes: logits are cosines times each model's own logit scale, not outputs of a linear layer.",
            "classes: the cross-entropy is the mean over the labelled samples of the batch, the soft term over all.",
        ),
        checked_against="the formula written out; open_clip's DistillClipLoss (gradient, and value up to the teacher's "
        "entropy); mdistiller's kd_loss (values and gradients, tests/methods/fixtures/hinton.json)",
    )

    class_vectors: Tensor  # the teacher's

    def __init__(
        self,
        config: HintonConfig,
        *,
        student: DualEncoder,
        teacher: FrozenTeacher | None = None,
        classes: ClassPrompts | None = None,
    ) -> None:
        super().__init__(config, student=student, teacher=teacher)
        self.config = config
        hard, soft = ("contrastive", "similarity") if config.form == "in_batch" else ("labels", "classes")
        self.weights = {hard: config.task_weight, soft: config.distill_weight}
        self.own_vectors: LearnedClassVectors | None = None
        if config.form == "in_batch":
            return
        assert teacher is not None
        assert classes is not None
        self.register_buffer("class_vectors", frozen_class_vectors(teacher, classes))
        if config.class_vectors == "own":
            self.own_vectors = LearnedClassVectors(classes, student, at_once=config.prompts_at_once)
        else:
            self.student = JoinedEncoder.at_width(student, teacher)
            self.student.freeze_unused(scale=False)
        if config.of_images or config.task_weight:
            self.label_reader = LabelReader(config.label_share, len(classes.names))

    @property
    def prepares(self) -> bool:
        return self.config.of_images

    def prepare(self, survey: Survey) -> None:
        """Takes the mean of up to `IMAGES_PER_CLASS` unit image embeddings of each class."""
        answers = Answered.joined(survey(towers=("image",)))
        units = F.normalize(answers.image, dim=-1)
        means, counts = class_means(units, answers.labels, len(self.class_vectors), most=IMAGES_PER_CLASS)
        if not bool(counts.any()):
            raise ConfigError(
                "class_vectors: image_means takes the means of labelled training images, and no label is read: take a "
                "data.train with labels, raise method.label_share, or set class_vectors: teacher"
            )
        # a class without images keeps the vector of its prompts
        self.class_vectors.copy_(torch.where(counts[:, None] > 0, F.normalize(means, dim=-1), self.class_vectors))

    @property
    def student_needs(self) -> LevelRequest:
        return LevelRequest() if self.config.form == "in_batch" else LevelRequest(towers=("image",))

    @property
    def teacher_needs(self) -> LevelRequest:
        return self.student_needs

    def terms(self, batch: Batch) -> dict[str, Term]:
        return self._of_texts(batch) if self.config.form == "in_batch" else self._of_classes(batch)

    def _of_texts(self, batch: Batch) -> dict[str, Term]:
        student = self.encode_student(batch)
        values: dict[str, Tensor] = {}
        if self.wants("contrastive"):
            values["contrastive"] = task_loss(student)
        if self.wants("similarity"):
            teacher, temperature = self.encode_teacher(batch), self.config.temperature
            values["similarity"] = similarity_loss(student, teacher, temperature=temperature)
        return self.weighted(values)

    def _of_classes(self, batch: Batch) -> dict[str, Term]:
        student, vectors = self.encode_student(batch), self.class_vectors
        if self.own_vectors is not None:
            vectors = self.own_vectors(self.student, self.step.generator("prompts"))
        logits = similarities(student.image.embedding, vectors, student.logit_scale)
        values: dict[str, Tensor] = {}
        if self.wants("labels"):
            values["labels"] = labelled_cross_entropy(logits, self.labels(batch))
        if self.wants("classes"):
            teacher = self.encode_teacher(batch)
            soft = similarities(teacher.image.embedding, self.class_vectors, teacher.logit_scale)
            values["classes"] = kl_divergence(logits, soft, temperature=self.config.temperature)
        return self.weighted(values)

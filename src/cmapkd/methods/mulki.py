"""MulKI, a reconstruction (Zhang et al. 2024, arXiv:2411.06764): a task is learned under two teachers, by its own data.

The teachers are the model before all tasks and the one before this task. What is from the paper and what is ours: the
card below and docs/methods/mulki.md. Its mean of weights is `training.mean_every`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from cmapkd.data.labels import LabelReader
from cmapkd.data.templates import ClassPrompts
from cmapkd.data.types import Batch
from cmapkd.features.closed_form import class_means
from cmapkd.methods.by_classes import check_kept_width, check_several, check_shown, check_unadapted
from cmapkd.methods.card import ClassesConfig, MethodCard, MethodConfig
from cmapkd.methods.dual import PictureMethod
from cmapkd.methods.targets import Answered, Survey
from cmapkd.methods.terms import Term
from cmapkd.models import DualEncoder, FrozenTeacher, MomentumTeacher
from cmapkd.models.texts import LearnedClassVectors, class_vectors
from cmapkd.objectives import labelled_cross_entropy, similarities
from cmapkd.objectives.prototype_relations import (
    moved_prototypes,
    prototype_alignment,
    relations_of,
    sample_divergences,
)

PREVIOUS = "previous"  # the role of the student as this run began


class MulkiConfig(ClassesConfig):
    """What each term counts, and how the teachers share it."""

    task_weight: float = Field(1.0, ge=0, description="Weight of the cross-entropy with the task's labels.")
    prototype_weight: float = Field(
        1.0, ge=0, description="Weight of the cross-entropies of each class's mean picture with its text."
    )
    relation_weight: float = Field(1.0, ge=0, description="Weight of the four KL of relations to prototypes.")
    temperature: float = Field(2.0, gt=0, description="Divides all models' logits in the KL.")
    teachers: Literal["both", "initial", "previous"] = Field(
        "both",
        description="initial: the recipe's teacher, the model before all tasks; previous: the student as this run "
        "began; both: each sample divides its weight between them.",
    )
    teacher_weights: Literal["adaptive", "equal"] = Field(
        "adaptive",
        description="adaptive: softmax of both teachers' probability of the right class; equal: a half each.",
    )
    momentum: float = Field(
        0.9, ge=0, le=1, description="Weight of the past in the student's mean pictures, after each step."
    )
    prompts_at_once: int | None = Field(
        None,
        ge=1,
        description="Templates drawn in each step for the student's vectors of the classes; none: all, for data of few "
        "classes.",
    )


class Mulki(PictureMethod):
    """The student learns a task, and its pictures and class texts relate to class prototypes as its teachers' do."""

    Config: ClassVar[type[MethodConfig]] = MulkiConfig
    steady = True
    card: ClassVar[MethodCard] = MethodCard(
        title="MulKI, a reconstruction: fine-tuning under two teachers by relations to class prototypes",
        paper="Zhang et al. 2024, arXiv:2411.06764 (IEEE TIP 2026), whose equations could not be read",
        equations=(
            "of a model: v unit images, W its unit class vectors, P the unit mean image of each class, s its scale",
            "of the student P follows the batches: P_c = N(μ P_c + (1 - μ) mean v of class c in the batch)",
            "L_labels = CE(s v Wᵀ, y); L_prototypes = 1/2 [CE(s P Wᵀ, own class) + CE(s W Pᵀ, own class)]",
            "relations of a sample of class y: R = {s v Pᵀ, s v Wᵀ, s W_y Wᵀ, s W_y Pᵀ}",
            "w_m = softmax over teachers m of σ(s_m v_m W_mᵀ)_y; m: the model before all tasks, the one before this",
            "L_relations = T² mean_b Σ_m w_m Σ_R KL(σ(R_m/T) ‖ σ(R_S/T)), over the labelled samples",
            "L = L_labels + L_prototypes + L_relations",
            "saved: the mean of the weights before the task and along it (training.mean_every)",
        ),
        needs="labels and names of at least two classes; as teacher the model before all tasks, of the student's width",
        trainable="the student but for its logit scale",
        departures=(
            "From the abstract: prototypes of classes that align both modalities, relations within and between "
            "modalities to them, two teachers that are weighted for each sample, models joined within and between "
            "tasks, and no data but the task's. Every formula, default and weight is ours.",
            "A text of a sample is the prompt of its class, so samples without a label take part in nothing.",
            "Prototypes of the teachers are of all pictures that the run reads, made once; the student's begin there.",
        ),
        checked_against="the formulas written out in loops; no published code was found, so there is no parity",
    )

    pictures: Float[Tensor, "classes dim"]
    shown: Bool[Tensor, " classes"]
    teacher_pictures: Float[Tensor, "teachers classes dim"]
    teacher_texts: Float[Tensor, "teachers classes dim"]

    def __init__(
        self,
        config: MulkiConfig,
        *,
        student: DualEncoder,
        teacher: FrozenTeacher | None = None,
        classes: ClassPrompts | None = None,
    ) -> None:
        super().__init__(config, student=student, teacher=teacher)
        assert teacher is not None
        assert classes is not None
        self.config, number, device = config, len(classes.names), student.device
        self.weights = {
            "labels": config.task_weight,
            "prototypes": config.prototype_weight,
            "relations": config.relation_weight,
        }
        self.label_reader = LabelReader(num_classes=number)
        check_several(config.name, classes)
        check_unadapted(student)  # its teachers' class vectors would be made of pictures, and its own of texts
        check_kept_width(config.name, student, teacher)
        student.log_logit_scale.requires_grad_(False)
        self.previous: MomentumTeacher | None = None
        read = config.teachers if config.relation_weight else "previous"  # as which the student's mean pictures begin
        if self.prepares and read != "initial":
            self.previous = MomentumTeacher(student, decay=1.0, role=PREVIOUS)
            self.teachers[PREVIOUS] = self.previous
        if read == "previous":  # then nobody asks the recipe's
            del self.teachers[teacher.role]
        self.roles = tuple(self.teachers)
        self.own_vectors = LearnedClassVectors(classes, student, at_once=config.prompts_at_once)
        models = [self.teachers[role].model for role in self.roles]  # each stays on its own device
        texts = [class_vectors(m, classes.names, classes.templates, own=classes.own, device=m.device) for m in models]
        texts = texts or [student.log_logit_scale.new_zeros(number, student.embed_dim)]  # which nobody reads
        self.register_buffer("teacher_texts", torch.stack([each.to(device) for each in texts]))
        self.register_buffer("teacher_pictures", torch.full_like(self.teacher_texts, torch.nan))  # until `prepare`
        self.register_buffer("pictures", torch.full_like(self.teacher_texts[0], torch.nan))
        self.register_buffer("shown", torch.zeros(number, dtype=torch.bool, device=device))

    @property
    def needs_labels(self) -> bool:
        return True

    @property
    def prepares(self) -> bool:
        return bool(self.config.prototype_weight or self.config.relation_weight)

    def prepare(self, survey: Survey) -> None:
        """Makes the mean picture of each class, by each teacher."""
        number = len(self.shown)
        for place, role in enumerate(self.roles):
            answers = Answered.joined(survey(role, towers=("image",)))
            means, counts = class_means(F.normalize(answers.image.double(), dim=-1), answers.labels, number)
            self.teacher_pictures[place] = F.normalize(means, dim=-1).to(self.teacher_pictures)
            self.shown.copy_(counts > 0)
        self.pictures.copy_(self.teacher_pictures[-1])
        check_shown(self.config.name, self.shown)

    def terms(self, batch: Batch) -> dict[str, Term]:
        config, values = self.config, dict[str, Tensor]()
        student, labels = self.encode_student(batch), self.labels(batch)
        image, scale = student.image.embedding, student.logit_scale
        texts = self.own_vectors(self.student, self.step.generator("prompts"))
        by_text = similarities(image, texts, scale)
        if self.wants("labels"):
            values["labels"] = labelled_cross_entropy(by_text, labels)
        if not self.prepares:
            return self.weighted(values)
        pictures = moved_prototypes(self.pictures, image, labels, momentum=config.momentum)
        if self.training:
            self.pictures.copy_(pictures.detach())
        if self.wants("prototypes"):
            values["prototypes"] = prototype_alignment(similarities(pictures, texts, scale), self.shown)
        if self.wants("relations"):
            own = relations_of(image, pictures, texts, scale)
            values["relations"] = self._relations(batch, own, labels)
        return self.weighted(values)

    def _relations(self, batch: Batch, own: tuple[Tensor, ...], labels: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
        """The weighted KL of the labelled samples, a mean over them."""
        answers = self.encode_teachers(batch, self.roles)
        of_class = (labels[:, None] == torch.arange(len(self.shown), device=labels.device)).to(own[0].dtype)
        known = of_class.sum(1)
        distances, confidences = [], []
        for place, role in enumerate(self.roles):
            answer, its = answers[role], (self.teacher_pictures[place], self.teacher_texts[place])
            with torch.no_grad():
                theirs = relations_of(answer.image.embedding, *its, answer.logit_scale)
            told = sample_divergences(own, theirs, of_class, self.shown, temperature=self.config.temperature)
            distances.append(told)
            confidences.append((theirs[1].softmax(1) * of_class).sum(1))
        weights = torch.stack(confidences).softmax(0)
        if self.config.teacher_weights == "equal":
            weights = torch.full_like(weights, 1 / len(weights))
        count = known.sum().clamp_min(1)
        if len(weights) > 1:
            self.measurements["previous_weight"] = (weights[-1] * known).sum() / count
        return (weights * torch.stack(distances) * known).sum() / count

"""LELP, a reconstruction (Loo et al. 2024, arXiv:2409.20449): few classes are cut into parts by linear projections.

What is from the paper and what is ours: the card below and docs/methods/lelp.md.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from cmapkd.config import ConfigError, counted
from cmapkd.data.labels import LabelReader
from cmapkd.data.templates import ClassPrompts
from cmapkd.data.types import Batch
from cmapkd.features.closed_form import ALIKE, class_parts, principal_directions
from cmapkd.methods.card import ClassesConfig, MethodCard, MethodConfig
from cmapkd.methods.dual import PictureMethod
from cmapkd.methods.targets import Answered, Survey
from cmapkd.methods.terms import Term
from cmapkd.models import DualEncoder, FrozenTeacher
from cmapkd.models.joined import JoinedEncoder
from cmapkd.models.texts import frozen_class_vectors
from cmapkd.objectives import kl_divergence, labelled_cross_entropy, similarities
from cmapkd.objectives.common import unit
from cmapkd.objectives.subclasses import subclass_divergence


class LelpConfig(ClassesConfig):
    """How classes are cut into parts, and what each term counts."""

    parts: int = Field(4, ge=2, description="Parts of each class, as many directions.")
    part_temperature: float = Field(1.0, gt=0, description="Divides the teacher's scores of parts (published: beta).")
    temperature: float = Field(1.0, gt=0, description="Divides both models' class logits on top of their logit scales.")
    class_weight: float = Field(1.0, ge=0, description="Weight of the KL over classes.")
    part_weight: float = Field(
        1.0, ge=0, description="Weight of the KL over the parts of each class. With class_weight: KL over all parts."
    )
    task_weight: float = Field(0.0, ge=0, description="Weight of the cross-entropy with the labels.")
    label_share: float = Field(1.0, ge=0, le=1, description="Share of the samples whose label is read.")
    directions: Literal["pca", "random", "shuffled"] = Field(
        "pca",
        description="pca: along which a class varies most; random: any, as a control; shuffled: pca, and each picture "
        "learns another's parts, the control that must fail.",
    )


class Lelp(PictureMethod):
    """The student learns the teacher's classes, and within each class the part that an image's embedding points to."""

    Config: ClassVar[type[MethodConfig]] = LelpConfig
    steady = True
    card: ClassVar[MethodCard] = MethodCard(
        title="LELP, a reconstruction: parts of classes by linear projections of embeddings",
        paper="Loo, Iliopoulos, Hu, Vee 2024, arXiv:2409.20449, of which steps are known and no equations",
        equations=(
            "W: the teacher's class vectors; h = N(v_T) without its part in the span of W",
            "of each class c: mean m_c and first S principal directions D_c of h, R a random rotation",
            "A_c = R D_c / sqrt(mean variance); z_c = A_c (h - m_c); q(s|c) = σ(z_c / β)",
            "p(c) = σ(s_T v_T Wᵀ / T), p_S(c) = σ(s_S v_S Wᵀ / T); q_S(s|c) = softmax within c of a linear head on v_S",
            "L = T² KL(p q ‖ p_S q_S) over classes and parts = T² [KL(p ‖ p_S) + Σ_c p(c) KL(q(.|c) ‖ q_S(.|c))]",
        ),
        needs="image embeddings and logit scales of both models, names of few classes; labels where there are any",
        trainable="the student's image tower, a linear map where the widths differ, the head of the parts (dropped)",
        departures=(
            "From the paper, by its reviews: null space of the classifier, PCA of each class, random rotation to equal "
            "variance, softmax within the class, no hard term. Centring, the scale to unit variance, S, β and the "
            "product of the probabilities are ours.",
            "The classifier is made of the classes' prompts, not of a linear layer. The head has the parts of a class "
            "alone: the class itself is read from the prompts, so that a sum over parts is the class.",
            "Of samples without a label that is read, the class is the teacher's own. A class with S images or fewer, "
            "or of images that are all alike, is cut by the directions of all images.",
        ),
        checked_against="the formulas written out in loops; no published code was found, so there is no parity",
    )

    class_vectors: Float[Tensor, "classes dim"]
    projections: Float[Tensor, "classes parts dim"]
    offsets: Float[Tensor, "classes parts"]

    def __init__(
        self,
        config: LelpConfig,
        *,
        student: DualEncoder,
        teacher: FrozenTeacher | None = None,
        classes: ClassPrompts | None = None,
    ) -> None:
        super().__init__(config, student=student, teacher=teacher)
        assert teacher is not None
        assert classes is not None
        self.config = config
        self.weights = {"labels": config.task_weight, "classes": config.class_weight, "parts": config.part_weight}
        if config.task_weight:
            self.label_reader = LabelReader(config.label_share, len(classes.names))
        self.student = JoinedEncoder.at_width(student, teacher)
        self.student.freeze_unused(scale=False)
        number, width = len(classes.names), teacher.embed_dim
        self.register_buffer("class_vectors", frozen_class_vectors(teacher, classes))
        room = width - int(torch.linalg.matrix_rank(self.class_vectors))
        if number < 2 or config.parts > room:
            raise ConfigError(
                f"lelp cuts each of {counted(number, 'class')} into {config.parts} parts, by directions in which no "
                f"two classes differ, and of the teacher's {width} dimensions {room} are left for them: lower "
                "method.parts, or take data of fewer classes, two at least"
            )
        # until `prepare`, no step goes on with them
        self.register_buffer("projections", torch.full((number, config.parts, width), torch.nan))
        self.register_buffer("offsets", torch.full((number, config.parts), torch.nan))
        self.head = nn.Linear(width, number * config.parts) if config.part_weight else None

    @property
    def prepares(self) -> bool:
        return self.head is not None

    def prepare(self, survey: Survey) -> None:
        """Finds the directions of each class."""
        answers = Answered.joined(survey(towers=("image",)))
        units, vectors = F.normalize(answers.image.double(), dim=-1), self.class_vectors.double()
        labels = torch.where(answers.labels >= 0, answers.labels, (units @ vectors.T).argmax(1))
        left = units - units @ torch.linalg.pinv(vectors) @ vectors
        if len(left) <= self.config.parts:
            raise ConfigError(
                f"lelp cuts classes into {self.config.parts} parts, and {counted(len(left), 'training image')} cannot "
                "show that many directions: take a data.train with more samples or more training.steps"
            )
        every = principal_directions(left, self.config.parts)
        if float(every[1].mean()) < ALIKE:
            raise ConfigError(
                f"lelp cuts classes by how the teacher's pictures differ, and all {len(left)} training images are "
                "alike to it: take other data, or a trained teacher"
            )
        random, draws = self.config.directions == "random", torch.Generator().manual_seed(0)
        found = class_parts(left, labels, len(vectors), common=every, random=random, generator=draws)
        self.projections.copy_(found[0])
        self.offsets.copy_(found[1])

    def terms(self, batch: Batch) -> dict[str, Term]:
        student, temperature = self.encode_student(batch), self.config.temperature
        logits = similarities(student.image.embedding, self.class_vectors, student.logit_scale)
        values: dict[str, Tensor] = {}
        if self.wants("labels"):
            values["labels"] = labelled_cross_entropy(logits, self.labels(batch))
        if not (self.wants("classes") or self.wants("parts")):
            return self.weighted(values)
        teacher = self.encode_teacher(batch)
        soft = similarities(teacher.image.embedding, self.class_vectors, teacher.logit_scale)
        if self.wants("classes"):
            values["classes"] = kl_divergence(logits, soft, temperature=temperature)
        if self.head is not None and self.wants("parts"):
            own = self.head(student.image.embedding).unflatten(1, self.offsets.shape)
            theirs = self._parts(teacher.image.embedding)
            values["parts"] = subclass_divergence(own, theirs, soft, temperature=temperature)
        return self.weighted(values)

    @torch.no_grad()
    def _parts(self, image: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch classes parts"]:
        """The teacher's scores of the parts of each class."""
        with torch.autocast(self.device.type, enabled=False):
            scores = torch.einsum("bd,csd->bcs", unit(image), self.projections) - self.offsets
        scores = scores / self.config.part_temperature
        return scores.roll(1, 0) if self.config.directions == "shuffled" else scores

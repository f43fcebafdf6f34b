"""DeGLA (Hu et al., ACM MM 2025, arXiv:2504.16801): fine-tuning on texts that are false of their picture.

Contrast with such texts teaches what belongs to what; distillation from a moving average keeps what the model knew.
NegCLIP (arXiv:2210.01936) is its first term. Departures and how it was checked: the card below, docs/methods/degla.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from cmapkd.data.texts import NEGATIVES
from cmapkd.data.types import Batch
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.dual import DualEncoderMethod
from cmapkd.methods.in_batch import embeddings_of, pair_distance
from cmapkd.methods.terms import Term
from cmapkd.models import DualEncoder, Features, FrozenTeacher, MomentumTeacher
from cmapkd.objectives import contrast_with_negatives, feature_distance, own_negatives_loss

PUBLISHED_DISTILL_WEIGHT = 0.005 * 256  # of a sum over 256 pairs, restated for the mean over pairs


class DeglaConfig(MethodConfig):
    """How many false texts a sample brings, what each term counts, and how slowly the teacher moves."""

    negatives: int = Field(4, ge=1, description="False texts of each sample.")
    pool: str = Field(NEGATIVES, min_length=1, description="The pool of texts that the false texts are.")
    task_weight: float = Field(
        1.0, ge=0, description="Weight of the contrastive loss whose images also see all false texts of the batch."
    )
    image_grounded_weight: float = Field(
        0.1, ge=0, description="Weight of the contrast of an image with its own caption and false texts alone."
    )
    text_grounded_weight: float = Field(
        0.1, ge=0, description="Weight of the contrast of a caption with the teacher's of it and its own false texts."
    )
    text_grounded_scale: float = Field(10.0, gt=0, description="Logit scale of that contrast; it is not learned.")
    text_grounded_with: Literal["own", "official"] = Field(
        "own",
        description="Which false texts a caption is contrasted with, own: those of its sample; official: those that "
        "the published code takes, mostly of other samples.",
    )
    distill_weight: float = Field(
        PUBLISHED_DISTILL_WEIGHT,
        ge=0,
        description="Weight of the squared distance of all unit embeddings from the teacher's, a mean over pairs and a "
        "sum over a pair's picture and texts. Published: 0.005 of the sum over 256 pairs, which is this default.",
    )
    momentum: float = Field(
        0.9996,
        ge=0,
        le=1,
        description="Weight of the past in the teacher's weights, at each step; 1: it stays as the student began.",
    )


class Degla(DualEncoderMethod):
    """A trained student learns to tell captions from false ones, and stays near its own moving average."""

    Config: ClassVar[type[MethodConfig]] = DeglaConfig
    uses_teacher: ClassVar[bool] = False
    steady = True
    card: ClassVar[MethodCard] = MethodCard(
        title="DeGLA: contrast with false captions, and self-distillation that keeps what was known",
        paper="Hu et al., ACM MM 2025, arXiv:2504.16801; NegCLIP: Yuksekgonul et al., ICLR 2023, arXiv:2210.01936",
        equations=(
            "v, t are unit embeddings of a pair, n_1 ... n_K of its K false texts; v', t', n' are the teacher's",
            "L_contrastive = 1/2 [CE(s v [T; N]ᵀ, own caption) + CE(s t Vᵀ, own image)], N those of all pairs",
            "L_image = CE(s v [t; n_1; ...; n_K]ᵀ, t)",
            "L_text = CE(10 t [t'; n_1; ...; n_K]ᵀ, t'), no gradient to t'",
            "L_feature = |v - v'|² + |t - t'|² + Σ_k |n_k - n'_k|²",
            "L = L_contrastive + 0.1 L_image + 0.1 L_text + 1.28 L_feature, batch means",
            "after each step: teacher = momentum teacher + (1 - momentum) student",
        ),
        needs="a trained student; false texts of each sample (a pool); no teacher but the student's own average",
        trainable="the student",
        departures=(
            "L_feature is a mean over pairs. Published: a sum, whose weight grows with the batch; 0.005 at 256 pairs "
            "is 1.28 here.",
            "L_text contrasts a caption with its own false texts, as the paper says. The published code takes those in "
            "places i + kB of a list sorted by sample; text_grounded_with: official does the same.",
            "All processes' embeddings have a gradient; in the published script those of other processes have none.",
            "Statistics and other buffers of the student reach the teacher; published: parameters alone.",
            "A logit bias (SigLIP) is in no softmax, so it does not learn.",
        ),
        checked_against="the published loss class run on random embeddings, and NegCLIP's: values and gradients of "
        "every term, tests/methods/fixtures/degla.json",
    )

    def __init__(self, config: DeglaConfig, *, student: DualEncoder, teacher: FrozenTeacher | None = None) -> None:
        super().__init__(config, student=student, teacher=teacher)
        self.config = config
        self.weights = {
            "contrastive": config.task_weight,
            "image_grounded": config.image_grounded_weight,
            "text_grounded": config.text_grounded_weight,
            "feature": config.distill_weight,
        }
        self.momentum: MomentumTeacher | None = None
        if {*self.term_names} & {"text_grounded", "feature"}:
            self.momentum = MomentumTeacher(student, decay=config.momentum)
            self.teachers[self.momentum.role] = self.momentum

    @property
    def text_pools(self) -> Mapping[str, int]:
        return {self.config.pool: self.config.negatives}

    def terms(self, batch: Batch) -> dict[str, Term]:
        """The terms of the stage; embeddings are of all processes' samples."""
        student = self.encode_student(batch)
        image, text = embeddings_of(student)
        negatives = self._negatives(student)
        of_each = negatives.unflatten(0, (len(image), -1))
        values: dict[str, Tensor] = {}
        if self.wants("contrastive"):
            values["contrastive"] = contrast_with_negatives(
                image, text, negatives, logit_scale=student.logit_scale, pictures=student.pictures
            )
        if self.wants("image_grounded"):
            values["image_grounded"] = own_negatives_loss(image, text, of_each, logit_scale=student.logit_scale)
        if self.wants("text_grounded") or self.wants("feature"):
            values |= self._of_teacher(student, self.encode_teacher(batch))
        return self.weighted(values)

    def _of_teacher(self, student: Features, teacher: Features) -> dict[str, Tensor]:
        """The terms that read the moving average."""
        (image, text), (teacher_image, teacher_text) = embeddings_of(student), embeddings_of(teacher)
        negatives = self._negatives(student)
        values: dict[str, Tensor] = {}
        if self.wants("text_grounded"):
            of_each = negatives.unflatten(0, (len(text), -1))
            if self.config.text_grounded_with == "official":
                of_each = negatives.unflatten(0, (-1, len(text))).transpose(0, 1)  # row i has the places i + kB
            values["text_grounded"] = own_negatives_loss(
                text, teacher_text.detach(), of_each, logit_scale=self.config.text_grounded_scale
            )
        if self.wants("feature"):
            distances = pair_distance((image, text), (teacher_image, teacher_text))
            of_false = feature_distance(negatives, self._negatives(teacher))
            values["feature"] = distances + of_false * self.config.negatives
        return values

    def _negatives(self, features: Features) -> Float[Tensor, "negatives dim"]:
        """Embeddings of the false texts, those of a sample together."""
        return features.more_texts[self.config.pool].embedding

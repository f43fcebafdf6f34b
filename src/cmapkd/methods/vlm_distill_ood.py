"""Distillation for unseen classes (Li et al., ICCV 2023, arXiv:2307.03135): a CLIP teacher into an image tower.

The student's image tower learns the teacher's joint space from labelled pictures. Then it is asked about other classes.
What is saved is a dual encoder: this tower beside the teacher's text tower. Departures: the card below and
docs/methods/vlm_distill_ood.md.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from cmapkd.data.labels import LabelReader, places_among
from cmapkd.data.templates import ClassPrompts
from cmapkd.data.types import Batch
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.dual import DualEncoderMethod
from cmapkd.methods.terms import Term
from cmapkd.models import DualEncoder, Features, FrozenTeacher, LevelRequest
from cmapkd.models.joined import JoinedEncoder
from cmapkd.models.texts import frozen_class_vectors
from cmapkd.objectives import (
    agreeing,
    contrastive_loss,
    feature_distance,
    labelled_cross_entropy,
    log_distance,
    nearest_divergence,
    own_text_cross_entropy,
    similarities,
)


class VlmDistillOodConfig(MethodConfig):
    """The weight of each term, zero to leave it out. By default the combination of the published scripts."""

    label_weight: float = Field(1.0, ge=0, description="Weight of the cross-entropy with the labels (L-cls).")
    feature_weight: float = Field(1.0, ge=0, description="Weight of the distance from the teacher's images (L-mse).")
    contrastive_weight: float = Field(
        1.0, ge=0, description="Weight of InfoNCE between both models' images, in both directions (L-im-cst)."
    )
    proximal_weight: float = Field(
        1.0, ge=0, description="Weight of the KL among the classes that are nearest for the teacher (L-vlalign)."
    )
    caption_weight: float = Field(
        0.0, ge=0, description="Weight of the cross-entropy with the teacher's captions (L-cap); published: an option."
    )
    temperature: float = Field(0.07, gt=0, description="Divides all cosines; 1 / it is the saved model's logit scale.")
    top_k: int = Field(256, ge=2, description="Classes of a picture in the KL; all of them where there are fewer.")
    keep_wrong: bool = Field(
        False, description="Whether pictures that the teacher classifies wrongly count in the KL; published: no."
    )
    feature: Literal["unit", "log"] = Field(
        "unit",
        description="unit: squared distance of unit embeddings; log: log(1 + squared distance / 10) of embeddings as "
        "they are, the published alternative.",
    )
    caption_temperature: Literal["same", "official"] = Field(
        "same", description="Of captions. same: temperature; official: 1, as in the published code."
    )
    left_out: tuple[str, ...] = Field(
        (),
        description="Names of classes that no training picture shows, left out of all softmaxes of the training. A "
        "sample of one counts as unlabelled.",
    )
    label_share: float = Field(
        1.0, ge=0, le=1, description="Share of the samples whose label is read; the others are unlabelled."
    )

    @property
    def reads_classes(self) -> bool:
        return True

    @property
    def reads_captions(self) -> bool:
        return self.caption_weight > 0


class VlmDistillOod(DualEncoderMethod):
    """An image tower learns the teacher's space of pictures and of labels, so that it also knows unseen labels."""

    Config: ClassVar[type[MethodConfig]] = VlmDistillOodConfig
    steady = True
    card: ClassVar[MethodCard] = MethodCard(
        title="Distilling large vision-language models with out-of-distribution generalizability",
        paper="Li et al., ICCV 2023, arXiv:2307.03135",
        equations=(
            "v: the student's unit image embedding at the teacher's width; v_T, c_T: the teacher's, of image and text",
            "W: unit vectors of the training classes' prompts by the teacher; τ: temperature, σ: softmax",
            "L_cls = CE(v Wᵀ/τ, y)",
            "L_mse = |v - v_T|², batch mean; or log(1 + |v - v_T|²/10), not normalised, of the batch mean",
            "L_im-cst = 1/2 [CE(v v_Tᵀ/τ, diag) + CE(v_T vᵀ/τ, diag)]",
            "L_vlalign = mean of KL(σ(v_T W_Kᵀ/τ) ‖ σ(v W_Kᵀ/τ)) over pictures with argmax v_T Wᵀ = y, K: the top_k "
            "classes that are nearest to v_T",
            "L_cap = CE(v c_Tᵀ/τ, diag), other pictures of the same class left out",
            "L = L_cls + L_mse + L_im-cst + L_vlalign (+ L_cap), each with its weight",
        ),
        needs="pictures, names of the classes, and labels where there are any; captions for L_cap alone",
        trainable="the student's image tower, and a linear map where the widths differ; the teacher's text tower stays",
        departures=(
            "A picture without label counts in all terms but L_cls. Published: every picture has one.",
            "Where the teacher is wrong about the whole batch, L_vlalign is zero; the published code gives NaN.",
            "Texts of a class are averaged (prompt ensembling). Published: one text, `a photo of NAME . DESCRIPTION`.",
            "L_cap has the temperature; caption_temperature: official leaves it out, as the published code does.",
            "The teacher sees the student's view; data.teacher_view: whole shows it the picture, as published.",
            "The saved model's logit scale is 1 / temperature and does not learn.",
            "AdamW with this toolkit's schedule. Prompt learning (CoOp) and few-shot retrieval are not part of it.",
        ),
        checked_against="the published loss lines run on random embeddings: values and gradients of every term, "
        "tests/methods/fixtures/vlm_distill_ood.json",
    )

    class_vectors: Tensor  # of the classes that are not left out
    place_of: Tensor  # of each class among them, or -1

    def __init__(
        self,
        config: VlmDistillOodConfig,
        *,
        student: DualEncoder,
        teacher: FrozenTeacher | None = None,
        classes: ClassPrompts | None = None,
    ) -> None:
        super().__init__(config, student=student, teacher=teacher)
        assert teacher is not None
        assert classes is not None
        self.config = config
        self.weights = {
            "labels": config.label_weight,
            "feature": config.feature_weight,
            "contrastive": config.contrastive_weight,
            "proximal": config.proximal_weight,
            "captions": config.caption_weight,
        }
        self.label_reader = LabelReader(config.label_share, len(classes.names))
        self.register_buffer("place_of", places_among(classes.names, left_out=config.left_out))
        kept = [number for number, name in enumerate(classes.names) if name not in config.left_out]
        self.register_buffer("class_vectors", frozen_class_vectors(teacher, classes)[kept])
        joined = JoinedEncoder.at_width(student, teacher)
        with torch.no_grad():
            student.log_logit_scale.fill_(-math.log(config.temperature))
        joined.freeze_unused()
        self.student = joined

    @property
    def student_needs(self) -> LevelRequest:
        return LevelRequest(towers=("image",))

    @property
    def teacher_needs(self) -> LevelRequest:
        return LevelRequest() if self.config.caption_weight else LevelRequest(towers=("image",))

    def labels(self, batch: Batch) -> Int[Tensor, " batch"]:
        """Places of the samples' classes among those that are not left out, -1 where there is none."""
        labels = super().labels(batch)
        return torch.where(labels < 0, labels, self.place_of[labels.clamp_min(0)])

    def terms(self, batch: Batch) -> dict[str, Term]:
        student, labels = self.encode_student(batch), self.labels(batch)
        asks = any(self.wants(name) for name in self.weights if name != "labels")
        teacher = self.encode_teacher(batch) if asks else student
        values = self._of_classes(student, teacher, labels) | self._of_pictures(student, teacher, labels)
        return self.weighted(values)

    def _of_classes(self, student: Features, teacher: Features, labels: Tensor) -> dict[str, Tensor]:
        """The terms that compare pictures with the classes."""
        scale, values = 1 / self.config.temperature, dict[str, Tensor]()
        logits = similarities(student.image.embedding, self.class_vectors, scale)
        if self.wants("labels"):
            values["labels"] = labelled_cross_entropy(logits, labels)
        if self.wants("proximal"):
            soft = similarities(teacher.image.embedding, self.class_vectors, scale)
            counts = None if self.config.keep_wrong else agreeing(soft, labels)
            values["proximal"] = nearest_divergence(logits, soft, number=self.config.top_k, counts=counts)
        return values

    def _of_pictures(self, student: Features, teacher: Features, labels: Tensor) -> dict[str, Tensor]:
        """The terms that compare pictures with the teacher's answers to them."""
        config, values = self.config, dict[str, Tensor]()
        own, theirs = student.image.embedding, teacher.image.embedding.detach()
        if self.wants("feature"):
            values["feature"] = (feature_distance if config.feature == "unit" else log_distance)(own, theirs)
        if self.wants("contrastive"):
            values["contrastive"] = contrastive_loss(
                own, theirs, logit_scale=1 / config.temperature, pictures=student.pictures
            )
        if self.wants("captions"):
            scale = 1.0 if config.caption_temperature == "official" else 1 / config.temperature
            logits = similarities(own, teacher.text.embedding.detach(), scale)
            values["captions"] = own_text_cross_entropy(logits, labels)
        return values

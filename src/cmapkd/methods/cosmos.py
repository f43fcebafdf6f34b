"""COSMOS (Kim et al., CVPR 2025, arXiv:2412.01814): self-distillation across modalities, from whole to part.

Crops of a picture read the sentences of its captions, and texts read its patches. What they make of it must find the
large crops and long texts of the student's moving average. Departures: the card below and docs/methods/cosmos.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.data.sentences import PASSAGES, SENTENCES
from cmapkd.data.types import Batch
from cmapkd.features.cross_attention import CrossAttention
from cmapkd.features.pyramid import cells_of
from cmapkd.features.taps import level_at
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.dual import STUDENT, DualEncoderMethod
from cmapkd.methods.own_scales import factor, keep_in_range, new_scale
from cmapkd.methods.side_by_side import Views, side_by_side, with_text_of
from cmapkd.methods.step import StepInfo
from cmapkd.methods.terms import Term
from cmapkd.models import DualEncoder, Features, FrozenTeacher, LevelRequest, MomentumTeacher
from cmapkd.objectives import contrast_of_views

GLOBAL, LOCAL = "global", "local"
"""Names of the further views, which `data.more_views` describes."""


class CosmosConfig(MethodConfig):
    """How many parts of a picture and its texts are read, what each term counts, and how slowly the teacher moves."""

    local_views: int = Field(6, ge=0, description="Small crops of each picture, beside the two large ones.")
    local_texts: int = Field(6, ge=0, description="Single sentences of each sample, beside the two texts of several.")
    task_weight: float = Field(1.0, ge=0, description="Weight of the contrast of both large crops with all texts.")
    distill_weight: float = Field(1.0, ge=0, description="Weight of the contrast with the teacher.")
    cross_attention: bool = Field(
        True,
        description="Whether crops read the text, and texts the picture, before they are compared with the teacher.",
    )
    heads: int = Field(8, ge=1, description="Heads of this attention; they share the width of the joint space.")
    momentum: float = Field(
        0.999, ge=0, le=1, description="Weight of the past in the teacher's weights, at each step. Published: of CC3M."
    )

    @property
    def why_unmixed(self) -> str | None:
        return "its texts are the sentences of all captions of a sample, its own and synthetic ones"

    @model_validator(mode="after")
    def _learns_something(self) -> Self:
        if self.task_weight == 0 and self.distill_weight == 0:
            raise ValueError("task_weight and distill_weight are both zero, which leaves nothing to learn: raise one")
        return self


class Cosmos(DualEncoderMethod):
    """Parts of a picture and of its texts learn what the student's moving average makes of the whole."""

    Config: ClassVar[type[MethodConfig]] = CosmosConfig
    uses_teacher: ClassVar[bool] = False
    steady = True
    contrasts = ("contrastive", "distill")
    compared_levels = LevelRequest()  # maps that learn read the tokens, so a tower may be frozen
    card: ClassVar[MethodCard] = MethodCard(
        title="COSMOS: cross-modality self-distillation",
        paper="Kim et al., CVPR 2025, arXiv:2412.01814",
        equations=(
            "v_i, t_j: embeddings of a sample's crops and texts, the first two of each large; v', t': the moving "
            "average's of the large ones",
            "c_v = v_i + A_t(v_i, W_t tokens of text 1), c_t = t_j + A_v(t_j, W_v patches of crop 1), A: attention",
            "NCE(X, Y; s): symmetric InfoNCE within the batch, mean over all pairs of views",
            "L_contrastive = NCE(v_1..2, t_1..8; s)",
            "L_distill = 1/4 [NCE(c_v, v'; s_d) + NCE(c_v, t'; s_d) + NCE(c_t, v'; s_d) + NCE(c_t, t'; s_d)]",
            "L = L_contrastive + L_distill; after each step: teacher = momentum teacher + (1 - momentum) student",
        ),
        needs="views `global` and `local`; sentences of captions; the last level of both towers; no teacher but the "
        "student's own average",
        trainable="the student, two maps of tokens, two attentions, the logit scale s_d (all but the student dropped)",
        departures=(
            "The teacher moves after the step, published before it.",
            "Padding of texts is not attended to; published: it is.",
            "Small crops have the model's own size, published 96 of 224 pixels.",
            "Of published changes of pictures the crops, flips and colours are there: no grey, blur or inversion.",
            "Tokens are those of the last level, in front of the tower's own last norm.",
            "Two texts of several sentences differ where a sample has enough sentences.",
            "A logit bias (SigLIP) is in no softmax, so it does not learn.",
        ),
        checked_against="the published loss class and attention run on random embeddings: values and gradients, "
        "tests/methods/fixtures/cosmos.json",
    )

    def __init__(self, config: CosmosConfig, *, student: DualEncoder, teacher: FrozenTeacher | None = None) -> None:
        super().__init__(config, student=student, teacher=teacher)
        self.config = config
        self.weights = {"contrastive": config.task_weight, "distill": config.distill_weight}
        self.momentum: MomentumTeacher | None = None
        self.levels: tuple[str, ...] = ()
        if config.distill_weight:
            self.momentum = MomentumTeacher(student, decay=config.momentum)
            self.teachers[self.momentum.role] = self.momentum
            self.distill_scale = new_scale()
            if config.cross_attention:
                self._read_tokens(student)

    def _read_tokens(self, student: DualEncoder) -> None:
        """Makes what reads the last level of each tower."""
        if not (student.image_levels and student.text_levels):
            raise ConfigError(
                f"method cosmos reads the last tokens of both towers, and {student.name} shows none of one: set "
                "method.cross_attention=false, or take another student"
            )
        dim, heads = student.embed_dim, self.config.heads
        image = level_at(student.image_levels, 1.0, tower="image")
        text = level_at(student.text_levels, 1.0, tower="text")
        self.levels = (image.name, text.name)
        self.image_tokens, self.text_tokens = nn.Linear(image.width, dim), nn.Linear(text.width, dim)
        self.read_image, self.read_text = (CrossAttention(dim, heads, norm=True) for _ in range(2))

    @property
    def text_pools(self) -> Mapping[str, int]:
        return {PASSAGES: 2} | ({SENTENCES: self.config.local_texts} if self.config.local_texts else {})

    @property
    def more_views(self) -> Mapping[str, int]:
        """Small crops are in no term but the teacher's."""
        local = self.config.local_views if self.config.distill_weight else 0
        return {GLOBAL: 1} | ({LOCAL: local} if local else {})

    @property
    def student_needs(self) -> LevelRequest:
        views = tuple(self.more_views) if self.wants("distill") else (GLOBAL,)
        levels = self.levels if self.wants("distill") else ()
        return LevelRequest(levels[:1], levels[1:], views=views)

    @property
    def teacher_needs(self) -> LevelRequest:
        return LevelRequest(views=(GLOBAL,), pools=(PASSAGES,))

    def terms(self, batch: Batch) -> dict[str, Term]:
        """The terms of the stage, of all processes' samples."""
        values: dict[str, Tensor] = {}
        if self.wants("distill"):
            student, teacher, read = self.encode_both(batch, self._read)
            values["distill"] = self._distilled(student, teacher, read)
        else:
            student = self.encode_student(batch)
        if self.wants("contrastive"):
            images = side_by_side(student.image, student.more_images, (GLOBAL,))
            texts = side_by_side(student.text, student.more_texts, self.text_pools)
            values["contrastive"] = contrast_of_views(
                images, texts, logit_scale=student.logit_scale, pictures=student.pictures
            )
        return self.weighted(values)

    def _distilled(self, student: Features, teacher: Features, read: Mapping[str, Views]) -> Float[Tensor, ""]:
        targets = (
            side_by_side(teacher.image, teacher.more_images, (GLOBAL,)),
            side_by_side(teacher.text, teacher.more_texts, (PASSAGES,)),
        )
        scale = factor(self.distill_scale, "exp")
        losses = [
            contrast_of_views(views, target.detach(), logit_scale=scale, pictures=student.pictures)
            for views in read.values()
            for target in targets
        ]
        return torch.stack(losses).mean()

    def _read(self, _part: Batch, student: Features, _teacher: Features) -> dict[str, Views]:
        """All views of a part of the batch with what they read of the other modality; not normalised."""
        images = side_by_side(student.image, student.more_images, self.more_views)
        texts = side_by_side(student.text, student.more_texts, self.text_pools)
        if not self.levels:
            return {"image": images, "text": texts}
        patches = cells_of(student.image.levels[self.levels[0]])
        words = student.text.levels[self.levels[1]]
        return {
            "image": images + self.read_text(images, self.text_tokens(words.values), words.mask),
            "text": texts + self.read_image(texts, self.image_tokens(patches)),
        }

    def after_step(self, step: StepInfo | None = None) -> None:
        super().after_step(step)
        if self.config.distill_weight:
            keep_in_range((self.distill_scale,), "exp")

    def _encode_student(self, part: Batch, number: int = 0) -> Features:
        return super()._encode_student(with_text_of(part, PASSAGES, STUDENT), number)

    def _encode_teacher(self, part: Batch, role: str | None = None) -> Features:
        return super()._encode_teacher(with_text_of(part, PASSAGES, STUDENT), role)

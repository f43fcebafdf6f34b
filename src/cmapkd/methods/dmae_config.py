"""The settings of method dmae."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cmapkd.features.taps import Layer
from cmapkd.methods.image_tokens import TokenLayers

PUBLISHED_ALIGN_WEIGHT = 1024**-0.5  # 1 × the mean over 1,024 channels, restated for the sum by their square root


class DmaeConfig(TokenLayers):
    """What each term counts, what is hidden, and what of the teacher is followed."""

    task_weight: float = Field(
        1.0,
        ge=0,
        description="Weight of the student's contrastive loss, of the visible tokens (FLIP's). Published: 0, pictures "
        "alone; the text tower then does not learn.",
    )
    reconstruction_weight: float = Field(1.0, ge=0, description="Weight of the error of hidden pixels.")
    align: Literal["tokens", "embedding"] = Field(
        "tokens",
        description="tokens: the teacher's of one layer, as DMAE; embedding: that of whole pictures, as "
        "self-distillation in further pre-training, where the teacher is an earlier student of the same sizes.",
    )
    align_weight: float | None = Field(
        None,
        ge=0,
        description="Weight of the distance from the teacher; none: 0.03125 for tokens (published: 1 × the mean over "
        "1,024 channels), 1 for embeddings.",
    )
    mask_ratio: float = Field(
        0.75, gt=0, lt=1, description="Share of the cells that is hidden; the number seen is rounded down."
    )
    teacher_sees: Literal["visible", "whole"] = Field(
        "visible",
        description="visible: the teacher computes the same tokens as the student, which saves its time too and takes "
        "models of one grid; whole: it sees all of the picture, can be cached, and its grid may differ.",
    )
    student_layer: Layer = Field(
        0.75, description="The student's aligned image level: its name (blocks.3), or a share of the depth."
    )
    teacher_layer: Layer = Field(0.75, description="The teacher's aligned image level, likewise.")
    decoder_width: int | None = Field(
        None,
        ge=32,
        multiple_of=32,
        description="Channels of the decoder; none: two thirds of the student's, as 512 are of 768.",
    )
    decoder_depth: int | None = Field(
        None, ge=1, description="Blocks of the decoder; none: two thirds of the student's, as 8 are of 12."
    )

    def weight_of_align(self) -> float:
        if self.align_weight is None:
            return PUBLISHED_ALIGN_WEIGHT if self.align == "tokens" else 1.0
        return self.align_weight

    @property
    def reads_captions(self) -> bool:
        return self.task_weight > 0

    @property
    def not_cached(self) -> str | None:
        if self.align == "tokens" and self.teacher_sees == "visible" and self.weight_of_align():
            return "the teacher sees other tokens in every step; teacher_sees: whole takes a cache"
        return None

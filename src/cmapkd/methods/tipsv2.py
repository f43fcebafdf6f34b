"""Patch-level distillation by a frozen teacher, after TIPSv2 (arXiv:2604.12012): a reconstruction.

The paper's finding: where a frozen teacher is distilled, the visible patches must be supervised, so nothing is masked.
Departures, and what could not be found: the card below and docs/methods/tipsv2.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.data.masks import check_mask, hide
from cmapkd.data.types import Batch
from cmapkd.features import PairProjector, gather_rows
from cmapkd.features.closed_form import spherical_kmeans
from cmapkd.features.pyramid import grid_of, level_grid
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.dual import STUDENT, DualEncoderMethod, task_loss
from cmapkd.methods.in_batch import embeddings_of, pair_distance
from cmapkd.methods.micro_batches import micro_batches
from cmapkd.methods.terms import Term
from cmapkd.models import DualEncoder, Features, FrozenTeacher, LevelRequest
from cmapkd.objectives.prototypes import prototype_divergence

_TOKENS_PER_PROTOTYPE = 64  # of the first batch, at most, that the prototypes are found from


class TIPSv2Config(MethodConfig):
    """What the student sees of a picture, which of its cells count, and what each term weighs."""

    patch_weight: float = Field(1.0, ge=0, description="Weight of the divergence of cells.")
    task_weight: float = Field(1.0, ge=0, description="Weight of the student's own contrastive loss.")
    feature_weight: float = Field(
        2000 / 512, ge=0, description="Weight of the squared distance of unit embeddings; CLIP-KD's."
    )
    prototypes: int = Field(64, ge=2, description="Clusters of the teacher's tokens, found in the first batch.")
    student_temperature: float = Field(0.1, gt=0, description="Divides the student's cosines; iBOT's.")
    teacher_temperature: float = Field(0.07, gt=0, description="Divides the teacher's cosines; iBOT's.")
    mask_ratio: float = Field(
        0.0, ge=0, lt=1, description="Share of its cells that the student does not see; 0: it sees all."
    )
    cells: Literal["all", "masked"] = Field("all", description="Which cells are compared; masked is iBOT's loss.")

    @model_validator(mode="after")
    def _something_is_masked(self) -> Self:
        if self.cells == "masked" and not self.mask_ratio:
            raise ValueError("cells: masked compares hidden cells alone, and mask_ratio 0 hides none: set mask_ratio")
        return self


class TIPSv2(DualEncoderMethod):
    """The student's cells divide among prototypes as the teacher's do; beside the contrastive and feature terms."""

    Config: ClassVar[type[MethodConfig]] = TIPSv2Config
    steady = True
    card: ClassVar[MethodCard] = MethodCard(
        title="TIPSv2: patch-level distillation by a frozen teacher (a reconstruction)",
        paper="TIPSv2, CVPR 2026, arXiv:2604.12012; iBOT, Zhou et al., ICLR 2022, arXiv:2111.07832",
        equations=(
            "x_i: tokens of the last level at cell i of the student's grid; c_k: prototypes; P: linear",
            "p_T,i = σ(cos(x_T,i, c_k) / teacher_temperature), p_S,i = σ(cos(P x_S,i, c_k) / student_temperature)",
            "L_patch = mean over cells of KL(p_T,i ‖ p_S,i); all cells, or the masked ones",
            "L = task_weight L_contrastive + feature_weight (‖v̂ - v_T‖² + ‖t̂ - t_T‖²) + patch_weight L_patch",
        ),
        needs="the last image level of both models, embeddings of the teacher; widths and grids may differ",
        trainable="the student, P, and linear maps of the embeddings where the widths differ",
        departures=(
            "No training code was published. Weights, temperatures and centring could not be found; temperatures are "
            "iBOT's, there is no centring.",
            "Prototypes are spherical k-means of the teacher's tokens in the first batch; the paper's are heads of its "
            "pre-training, which are not public.",
            "KL in place of the cross-entropy: the same gradient.",
            "With a mask the whole student, contrastive term included, sees the masked picture.",
        ),
        checked_against="formulas written out and gradcheck; there is no published code",
    )

    centres: Tensor

    def __init__(self, config: TIPSv2Config, *, student: DualEncoder, teacher: FrozenTeacher | None = None) -> None:
        super().__init__(config, student=student, teacher=teacher)
        assert teacher is not None
        self.config = config
        self.weights = {
            "contrastive": config.task_weight,
            "feature": config.feature_weight,
            "patches": config.patch_weight,
        }
        for model, role in ((student, "student"), (teacher.model, "teacher")):
            if not model.image_levels:
                raise ConfigError(f"method {config.name} reads patches, and the {role} {model.name} has no image level")
        self.student_level, self.teacher_level = student.image_levels[-1], teacher.model.image_levels[-1]
        widths = self.student_level.width, self.teacher_level.width
        self.map_tokens = nn.Linear(*widths) if config.patch_weight else None
        self.project = PairProjector(student.embed_dim, teacher.embed_dim) if config.feature_weight else None
        self.register_buffer("centres", torch.zeros(config.prototypes, self.teacher_level.width))
        self.found = False
        self.patch = 0  # side of a masked square, in pixels
        if config.mask_ratio:
            size = student.image_spec.size
            with torch.no_grad():
                empty = student.log_logit_scale.new_zeros(1, 3, size, size)
                rows, _ = grid_of(
                    student.encode_image(empty, (self.student_level.name,)).levels[self.student_level.name]
                )
            self.patch = -(-size // rows)
            check_mask(size, patch=self.patch, ratio=config.mask_ratio)

    @property
    def student_needs(self) -> LevelRequest:
        return LevelRequest(image_levels=(self.student_level.name,) if self.config.patch_weight else ())

    @property
    def teacher_needs(self) -> LevelRequest:
        return LevelRequest(image_levels=(self.teacher_level.name,) if self.config.patch_weight else ())

    @property
    def structure(self) -> dict[str, Any]:
        """Whether the prototypes have been found, which no look at their tensor should tell."""
        return {"found": self.found}

    def restructure(self, structure: Mapping[str, Any]) -> None:
        self.found = bool(structure["found"])

    def terms(self, batch: Batch) -> dict[str, Term]:
        if self.wants("patches") and not self.found:
            self._find_prototypes(batch)
        student, teacher, rows = self.encode_both(batch, self._divergences)
        values: dict[str, Tensor] = {}
        if self.wants("contrastive"):
            values["contrastive"] = task_loss(student)
        if self.wants("feature") and self.project is not None:
            values["feature"] = pair_distance(embeddings_of(self.project(student)), embeddings_of(teacher))
        if self.wants("patches"):
            values["patches"] = rows["patches"].mean()
        return self.weighted(values)

    def _divergences(self, part: Batch, student: Features, teacher: Features) -> dict[str, Float[Tensor, " batch"]]:
        config = self.config
        if self.map_tokens is None or not self.wants("patches"):
            return {}
        level = student.image.levels[self.student_level.name]
        divergence = prototype_divergence(
            self.map_tokens(level_grid(level)),
            level_grid(teacher.image.levels[self.teacher_level.name], grid_of(level)),
            self.centres,
            student_temperature=config.student_temperature,
            teacher_temperature=config.teacher_temperature,
            counted=self._hidden(part).flatten(1).to(self.device) if config.cells == "masked" else None,
        )
        return {"patches": divergence}

    @torch.no_grad()
    def _find_prototypes(self, batch: Batch) -> None:
        """From the tokens of all processes' samples of the first batch, or as many of them as are enough."""
        parts = micro_batches(batch, self.micro_batch)
        levels = [self._encode_teacher(part).image.levels[self.teacher_level.name] for part in parts]
        tokens = gather_rows(torch.cat([level_grid(level) for level in levels])).flatten(0, 1)
        count, draws = self.config.prototypes, self.step.generator("prototypes")
        if len(tokens) < count:
            raise ConfigError(
                f"method.prototypes is {count}, and the first batch has {len(tokens)} tokens of the teacher: lower it, "
                "or take larger batches"
            )
        some = torch.randperm(len(tokens), generator=draws)[: count * _TOKENS_PER_PROTOTYPE]
        self.centres.copy_(spherical_kmeans(tokens[some.to(tokens.device, non_blocking=True)], count, draws))
        self.found = True

    def _encode_student(self, part: Batch, number: int = 0) -> Features:
        if not (self.config.mask_ratio and self.training):
            return super()._encode_student(part, number)
        pixels = hide(self.student_pixels(part), self._hidden(part), patch=self.patch)
        inputs = replace(part.pairs(STUDENT).to(self.device, True), images=pixels)
        features: Features = self.student(inputs, self.student_needs)
        return features

    def _hidden(self, part: Batch) -> Bool[Tensor, "batch rows columns"]:
        return self.hidden_in(part, patch=self.patch, ratio=self.config.mask_ratio)

"""DCLIP (Csizmadia et al. 2025, arXiv:2505.21549): a teacher of regions and caption, distilled into images.

First a meta-teacher on top of a frozen model learns to fuse crops of objects with the words of the caption. Then the
student's pictures learn what it says. Departures and how it was checked: the card below and docs/methods/dclip.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.data.batches import Extra
from cmapkd.data.regions import RegionReader
from cmapkd.data.types import Batch
from cmapkd.features import gather_rows
from cmapkd.features.region_fusion import RegionFusion
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.dual import DualEncoderMethod
from cmapkd.methods.in_batch import embeddings_of
from cmapkd.methods.micro_batches import encode_checkpointed, join_rows, micro_batches
from cmapkd.methods.stages import StageConfig
from cmapkd.methods.terms import Term
from cmapkd.models import DualEncoder, Features, FrozenTeacher, LevelRequest
from cmapkd.models.types import BOTH
from cmapkd.objectives import contrastive_loss, feature_distance

REGIONS = "regions"
"""The name of the further view, which `data.more_views` describes, and of the number of regions of each sample."""


class DclipConfig(MethodConfig):
    """How many regions are read, what each term of the second stage counts, and a control."""

    regions: int = Field(8, ge=0, description="Regions of each picture, at most; 0: the whole picture alone.")
    heads: int = Field(8, ge=1, description="Heads of both attentions; they share the width of the joint space.")
    temperature: float = Field(0.05, gt=0, description="Divides cosines in both contrasts; it is not learned.")
    image_weight: float = Field(1.0, ge=0, description="Weight of images against the meta-teacher's vector.")
    text_weight: float = Field(1.0, ge=0, description="Weight of texts against the teacher's.")
    task_weight: float = Field(1.0, ge=0, description="Weight of the contrast of images with texts.")
    targets: Literal["own", "shuffled"] = Field(
        "own", description="Whose vector an image learns; shuffled: another sample's of the batch, a control."
    )

    @property
    def not_cached(self) -> str | None:
        return "crops of regions are drawn anew in every epoch" if self.regions else None

    @model_validator(mode="after")
    def _learns_something(self) -> Self:
        if not (self.image_weight or self.text_weight or self.task_weight):
            raise ValueError("all weights are zero, which leaves nothing to learn in the second stage: raise one")
        return self


class Dclip(DualEncoderMethod):
    """A meta-teacher fuses regions and words in the first stage, and teaches images in the second."""

    Config: ClassVar[type[MethodConfig]] = DclipConfig
    steady = True
    contrasts = ("contrastive", "meta_teacher")
    card: ClassVar[MethodCard] = MethodCard(
        title="DCLIP: cross-modal transformer distillation, from regions and words to images",
        paper="Csizmadia et al. 2025, arXiv:2505.21549",
        equations=(
            "P: the teacher's embeddings of n regions; C: the last text level's tokens, mapped to the same width",
            "C' = LN(C + A_1(C, P)), P' = LN(P + A_2(P, C)); g(X) = Σ_i σ_i(cos(x_i, mean X) / 2) x_i",
            "G = 1/2 g(C') + 1/2 g(P')",
            "L = NCE(G, t_T; 1/0.05) in stage meta, NCE: symmetric InfoNCE; the map, A_1, A_2 and the norms learn",
            "L = (1 - cos(v, G)) + (1 - cos(t, t_T)) + NCE(v, t; 1/0.05) in stage distil; the student learns",
        ),
        needs="view `regions`, of boxes as a rule; text tokens of the teacher, of the student's width; as a rule "
        "teacher: student",
        trainable="two attentions, a map and norms (dropped); then the student but for its logit scale",
        departures=(
            "Padding of regions and texts is left out of attention and pooling; published: zeros in both.",
            "Tokens of the last text level go through a learned map; published: the tower's own projection.",
            "Regions are boxes of the data; published: those that YOLOv8x finds.",
            "A picture without box is one region; published: zeros.",
            "Start and end tokens count as words; published: not.",
            "Both stages are one run, of 0.7 and 0.3 of the steps; published: two runs, of 5 and of 2 epochs.",
            "The whole student learns, unless the second stage names parts; the published text and code differ in it.",
        ),
        checked_against="the formulas written out in loops; the published code has no licence and was only read",
    )

    def __init__(self, config: DclipConfig, *, student: DualEncoder, teacher: FrozenTeacher | None = None) -> None:
        super().__init__(config, student=student, teacher=teacher)
        assert teacher is not None
        self.config, self.not_cached = config, config.not_cached
        if student.embed_dim != teacher.embed_dim:
            raise ConfigError(
                f"dclip compares the student's embeddings with its teacher's, but {student.name} embeds in "
                f"{student.embed_dim} numbers and {teacher.name} in {teacher.embed_dim}: take teacher: student, or a "
                "teacher of the student's width"
            )
        if not teacher.model.text_levels:
            raise ConfigError(
                f"dclip reads the tokens of captions, and the text tower of {teacher.name} shows none: take another"
            )
        self.text_level = teacher.model.text_levels[-1]
        self.fusion = RegionFusion(teacher.embed_dim, self.text_level.width, config.heads)
        student.log_logit_scale.requires_grad_(False)
        weights = {"image": config.image_weight, "text": config.text_weight, "contrastive": config.task_weight}
        self.weights = {"meta_teacher": 1.0, **weights}

    @property
    def default_stages(self) -> tuple[StageConfig, ...]:
        return (
            StageConfig(name="meta", share=0.7, terms=("meta_teacher",), train=("modules",)),
            StageConfig(name="distil", share=0.3, terms=self.term_names[1:], train=("student",)),
        )

    @property
    def more_views(self) -> Mapping[str, int]:
        return {REGIONS: self.config.regions} if self.config.regions else {}

    @property
    def extras(self) -> Mapping[str, Extra]:
        return {**super().extras, **({REGIONS: RegionReader(self.config.regions)} if self.config.regions else {})}

    @property
    def teacher_needs(self) -> LevelRequest:
        """Of the picture as a whole nothing, where its regions are read; texts alone where no term reads the fusion."""
        if not self._fuses:
            return LevelRequest(towers=("text",))
        views = tuple(self.more_views)
        return LevelRequest((), (self.text_level.name,), towers=("text",) if views else BOTH, views=views)

    @property
    def _fuses(self) -> bool:
        """Whether a term of the stage reads the meta-teacher's vector."""
        return self.wants("meta_teacher") or self.wants("image")

    def shared_parameters(self) -> Mapping[str, nn.Parameter]:
        """Also a layer of the meta-teacher, for its own term, which does not reach the student."""
        own = "fusion.map_words.weight"
        return {**super().shared_parameters(), own: self.get_parameter(own)}

    def terms(self, batch: Batch) -> dict[str, Term]:
        """The terms of the stage, of all processes' samples."""
        values, scale = dict[str, Tensor](), 1 / self.config.temperature
        answers = self._answers(batch) if self._fuses or self.wants("text") else {}
        if self.wants("meta_teacher"):
            values["meta_teacher"] = contrastive_loss(
                answers["fused"], answers["said"], logit_scale=scale, pictures=self._pictures(batch)
            )
        if any(self.wants(name) for name in ("image", "text", "contrastive")):
            student = self.encode_student(batch)
            image, text = embeddings_of(student)
            if self.wants("image"):
                fused = answers["fused"].detach()
                targets = fused.roll(1, 0) if self.config.targets == "shuffled" else fused
                values["image"] = feature_distance(image, targets) / 2  # of unit vectors: 1 - cos
            if self.wants("text"):
                values["text"] = feature_distance(text, answers["said"]) / 2
            if self.wants("contrastive"):
                values["contrastive"] = contrastive_loss(image, text, logit_scale=scale, pictures=student.pictures)
        return self.weighted(values)

    def _answers(self, batch: Batch) -> dict[str, Float[Tensor, "batch dim"]]:
        """The teacher's texts, and where a term reads them the meta-teacher's vectors; of all processes' samples."""
        parts = micro_batches(batch, self.micro_batch)
        rows = join_rows(encode_checkpointed(self._answered, parts, model=self))
        return {name: gather_rows(each) for name, each in rows.items()}

    def _answered(self, part: Batch, _number: int) -> dict[str, Float[Tensor, "batch dim"]]:
        teacher = self._encode_teacher(part)
        said = {"said": teacher.text.embedding}
        return {**said, "fused": self._fused(part, teacher)} if self._fuses else said

    def _fused(self, part: Batch, teacher: Features) -> Float[Tensor, "batch dim"]:
        words = teacher.text.levels[self.text_level.name]
        regions, real = teacher.image.embedding[:, None], torch.ones(len(part), 1, dtype=torch.bool, device=self.device)
        if self.config.regions:
            regions = teacher.more_images[REGIONS].embedding.unflatten(0, (len(part), -1))
            numbers = part.extra[REGIONS].to(self.device, non_blocking=True)
            real = torch.arange(regions.shape[1], device=self.device) < numbers[:, None]
        found: Tensor = self.fusion(regions, words.values, real, words.mask)
        return found

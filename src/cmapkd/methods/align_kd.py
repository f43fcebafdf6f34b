"""Align-KD (Feng et al., CVPR 2025, arXiv:2412.01282): how texts and pictures meet in a language model's first layer.

Departures from the released code, and what is wrong with it: docs/methods/align_kd.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from cmapkd.data.types import Batch
from cmapkd.features.attention_blocks import heads_of, looked_at, paired, text_to_vision
from cmapkd.features.visual_rows import beside, check_same_texts, check_visual_tokens
from cmapkd.methods.behind_terms import Made
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.generative import Counted, GenerativeConfig, GenerativeMethod
from cmapkd.methods.stages import StageConfig
from cmapkd.models import FrozenTeacher
from cmapkd.models.generative import GenerativeModel
from cmapkd.models.token_types import Rows, TokenFeatures, TokenNeeds, Where
from cmapkd.objectives.attention_maps import attention_error, focused_distance
from cmapkd.objectives.tokens import TokenDivergence

EVERYWHERE: tuple[Where, ...] = ("answer", "prompt", "visual")


class AlignKDConfig(GenerativeConfig):
    """Where models are compared, and what each term counts."""

    positions: Literal["all", "answers"] = Field(
        "all",
        description="Behind which tokens next-token distributions are compared; all: of prompts and pictures, too.",
    )
    layer: int = Field(0, ge=0, description="Layer of both language models whose attention is read, from 0.")
    focus: int = Field(16, ge=0, description="Visual tokens that the teacher attends to most, and that count twice.")
    adapters: Literal["learn", "frozen"] = Field(
        "learn",
        description="Maps of the teacher's heads and widths to the student's. frozen: they stay random, as in the "
        "released code, whose optimizer does not know them.",
    )
    answers_weight: float = Field(1.0, ge=0, description="Weight of the cross-entropy with the answers of the data.")
    distill_weight: float = Field(1.0, ge=0, description="Weight of the divergence of next-token distributions.")
    vision_weight: float = Field(1.0, ge=0, description="Weight of the distance of projected visual tokens.")
    attention_weight: float = Field(1.0, ge=0, description="Weight of the distance of attention maps.")

    @model_validator(mode="after")
    def _teaches(self) -> AlignKDConfig:
        if not (self.distill_weight or self.vision_weight or self.attention_weight):
            raise ValueError("all weights but answers_weight are 0, and what is left is sft: set method: sft")
        return self


class AlignKD(GenerativeMethod):
    """Distributions, projected visual tokens, and what texts attend to in a picture."""

    Config: ClassVar[type[MethodConfig]] = AlignKDConfig
    of_teacher: ClassVar[frozenset[str]] = frozenset({"distillation", "vision", "attention"})
    card: ClassVar[MethodCard] = MethodCard(
        title="Align-KD: attention of texts to pictures in the first layer, and projected visual tokens",
        paper="Feng et al. 2025 (CVPR), arXiv:2412.01282",
        equations=(
            "distillation: mean over all positions of KL(p ‖ q), at temperature 1",
            "vision: mean over pictures of mean_k e_k + mean_{k in top 16} e_k, e_k = channel mean of (P v_T − v_S)²",
            "top 16: visual tokens with most of the teacher's attention in the layer, mean of heads, sum of queries",
            "attention: mean of (A a_T − a_S)² over the student's heads, texts behind the picture and visual tokens",
            "L = CE + distillation + vision + attention; P and A are linear maps of widths and of heads",
        ),
        needs="final states, projected visual tokens and attention maps of one layer; one vocabulary and one chat "
        "template, as many visual tokens or square grids of them; no cache",
        trainable="the student, two linear maps of the teacher (dropped)",
        departures=(
            "Both maps learn. In the released code no optimizer has them: adapters: frozen.",
            "The map of heads begins as their mean; adapters: frozen begins at random, as released.",
            "Queries of the attention term are texts, keys visual tokens. The released mask is its transpose.",
            "The 16 tokens are chosen among visual tokens alone, at their own places.",
            "Divergences replace cross-entropies with the teacher: the same gradient, without the floor.",
            "Padding counts nowhere. A picture counts like any other, however many tokens it has.",
        ),
        checked_against="the sums in plain loops, with gradients; published get_distil_loss, get_v_loss and the "
        "expression of attention (tests/methods/fixtures/align_kd.json)",
    )
    not_cached: str | None = "its terms read the teacher's attention and visual tokens, which a cache does not hold"
    config: AlignKDConfig

    def __init__(
        self, config: AlignKDConfig, *, student: GenerativeModel, teacher: FrozenTeacher | None = None
    ) -> None:
        super().__init__(config, student=student, teacher=teacher)
        self.config = config
        self._reads = next(iter(self.teachers.values())).reads
        self.weights = {
            "answers": config.answers_weight,
            "distillation": config.distill_weight,
            "vision": config.vision_weight,
            "attention": config.attention_weight,
        }
        assert teacher is not None
        models: tuple[GenerativeModel, GenerativeModel] = (student, teacher.model)
        check_visual_tokens(*models)
        whole = config.distill_weight > 0 and config.positions == "all"
        if whole or config.attention_weight:
            instead = "set positions: answers" if whole else "set attention_weight: 0"
            check_same_texts(*models, whole=whole, instead=f"Give both one template, or {instead}")
        chooses = config.vision_weight > 0 and config.focus > 0
        heads = [heads_of(model, config.layer) if config.attention_weight or chooses else 1 for model in models]
        widths = [model.image_levels[-1].width for model in models]
        self.map_heads, self.map_tokens = nn.Linear(heads[1], heads[0]), nn.Linear(widths[1], widths[0])
        if config.adapters == "learn":
            nn.init.constant_(self.map_heads.weight, 1 / heads[1])
            nn.init.zeros_(self.map_heads.bias)
        self.map_heads.requires_grad_(config.adapters == "learn" and config.attention_weight > 0)
        self.map_tokens.requires_grad_(config.adapters == "learn" and config.vision_weight > 0)

    @property
    def student_needs(self) -> TokenNeeds:
        return self._needs(self.wants("attention"))

    @property
    def teacher_needs(self) -> TokenNeeds:
        chooses = self.wants("vision") and self.config.focus > 0
        return self._needs(chooses or self.wants("attention"))

    def _needs(self, attention: bool) -> TokenNeeds:
        everywhere = self.config.positions == "all" and self.wants("distillation")
        return TokenNeeds(
            frozenset(EVERYWHERE if everywhere else EVERYWHERE[:1]),
            attention=(self.config.layer,) if attention else (),
            projected=self.wants("vision"),
        )

    def why_not_again(self, stages: Sequence[StageConfig]) -> str | None:
        if self.config.attention_weight:
            return "it reads attention maps while a layer computes: set method.attention_weight=0, or a micro_batch"
        return super().why_not_again(stages)

    @property
    def made_of(self) -> Mapping[str, Made]:
        return {"vision": "projected", "attention": "attention"}

    def sums(self, part: Batch, student: TokenFeatures, teacher: TokenFeatures | None) -> dict[str, Counted]:
        config, forward = self.config, TokenDivergence()
        weighed = self.weigh(part, student.hidden["answer"])
        if teacher is None or config.positions == "answers":
            counted = self.losses(student, weighed, teacher=teacher, divergence=forward, soft=weighed)
        else:
            counted = self.losses(student, weighed)
            if self.wants("distillation"):
                counted["distillation"] = self._everywhere(part, student, teacher)
        if teacher is None:
            return counted
        if self.wants("vision"):
            counted["vision"] = self._vision(part, student, teacher)
        if self.wants("attention"):
            counted["attention"] = self._attention(part, student, teacher)
        return counted

    def _everywhere(self, part: Batch, student: TokenFeatures, teacher: TokenFeatures) -> Counted:
        own = [student.hidden[where] for where in EVERYWHERE]
        states = [teacher.hidden["answer"].values, teacher.hidden["prompt"].values]
        states.append(beside(teacher.hidden["visual"], *self.visual_counts(part)))
        if any(len(mine.values) != len(theirs) for mine, theirs in zip(own, states, strict=True)):
            raise ValueError(
                "the prompts of a batch have other numbers of tokens for student and teacher, whose chat templates "
                "differ: set method.positions=answers"
            )
        rows = Rows(*(torch.cat([getattr(each, name) for each in own]) for name in ("values", "sample", "place")))
        weighed = self.weigh(part, rows)
        forward = TokenDivergence()
        total = self.divergence_at(student, rows, teacher, torch.cat(states), divergence=forward, weights=weighed.rows)
        return Counted(total, weighed.number)

    def _vision(self, part: Batch, student: TokenFeatures, teacher: TokenFeatures) -> Counted:
        own, theirs = student.projected, teacher.projected
        assert own is not None
        assert theirs is not None
        counts, others = self.visual_counts(part)
        states = self.map_tokens(beside(theirs, counts, others).to(self.map_tokens.weight.dtype))
        looked = torch.zeros_like(theirs.values[:, 0])
        if self.config.focus:
            looked = looked_at(teacher.attention[self.config.layer], self.dialogues(part, self._reads))
        looked = beside(Rows(looked[:, None], theirs.sample, theirs.place), counts, others)[:, 0]
        pictures = zip(own.values.split(counts), states.split(counts), looked.split(counts), strict=True)
        distances = [focused_distance(*each, focus=self.config.focus) for each in pictures if len(each[0])]
        nothing = own.values.sum() * 0 + states.sum() * 0
        return Counted.of(nothing + sum(distances), len(distances))

    def _attention(self, part: Batch, student: TokenFeatures, teacher: TokenFeatures) -> Counted:
        layer, maps = self.config.layer, self.map_heads
        own, theirs = (
            text_to_vision(features.attention[layer], self.dialogues(part, reads))
            for reads, features in (("student", student), (self._reads, teacher))
        )
        pairs = paired(own, theirs)
        errors = [attention_error(*pair, maps.weight, maps.bias) for pair in pairs]
        nothing = student.attention[layer].sum() * 0 + (maps.weight.sum() + maps.bias.sum()) * 0
        return Counted.of(nothing + sum(errors), sum(mine.numel() for mine, _ in pairs))

"""MoVE-KD (Cao et al., CVPR 2025, arXiv:2501.01709): several image encoders distilled into one vision tower.

The tower of a student that writes learns the patch tokens of all of them. The student's mixture of experts (MoE-LoRA)
is not built here. Departures: the card below and docs/methods/move_kd.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.data.types import Batch
from cmapkd.features.gather import mean_over_processes
from cmapkd.features.projector import TokenAdapter
from cmapkd.features.visual_grid import resampled
from cmapkd.features.visual_rows import per_picture
from cmapkd.methods.behind_terms import Made, mixers_of
from cmapkd.methods.beside_experts import ExpertMethod, SeenByExperts
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.generative import Counted
from cmapkd.methods.micro_batches import encode_checkpointed, micro_batches
from cmapkd.methods.move_config import MoveKDConfig
from cmapkd.methods.stages import StageConfig
from cmapkd.methods.terms import Term
from cmapkd.models import FrozenTeacher
from cmapkd.models.generative import GenerativeModel
from cmapkd.models.picture_attention import check_blocks
from cmapkd.models.token_types import TokenFeatures, TokenNeeds
from cmapkd.objectives.encoder_mixture import encoder_errors, encoder_shares

PRE_TRAINING, FINE_TUNING = 558, 665  # thousands of samples that each stage of the paper reads once


class MoveKD(ExpertMethod):
    """The student's visual tokens follow those of several encoders, each behind an adapter."""

    Config: ClassVar[type[MethodConfig]] = MoveKDConfig
    card: ClassVar[MethodCard] = MethodCard(
        title="MoVE-KD: several image encoders distilled into the vision tower of a model that writes",
        paper="Cao et al., CVPR 2025, arXiv:2501.01709",
        equations=(
            "v: the student's visual tokens; u_k = (W₂ gelu(W₁ t_k)ᵀ)ᵀ of encoder k; u_1 = t_1 where shapes agree",
            "e_k,i = mean over channels of (v_i − u_k,i)²; a = σ(attention of the first encoder's class token)",
            "l_k = mean_i e_k,i + Σ_i a_i e_k,i",
            "w_1 = 0.8, w_k = 0.2 σ_k(mean_i c·u_k,i), c: that class token; flattened where one mean exceeds 0.8",
            "L = answers_weight CE + distill_weight mean over pictures of Σ_k w_k l_k",
        ),
        needs="one or more image encoders; the vision tower's tokens of the student, whose projector reads tiles",
        trainable="vision tower, projector and adapters, then all of the student; adapters are dropped",
        departures=(
            "The student's vision tower is dense: LoRA experts, their router and its balance loss are left out.",
            "The first encoder has an adapter, too, where its width differs. The class token is then mapped alike.",
            "Its tokens, and its attention, are resampled where square grids differ in size.",
            "The mean that flattens shares is over all micro-batches and processes.",
            "One encoder alone counts fully. Towers without a class token have the mean of tokens in its place.",
        ),
        checked_against="sums in plain loops, with gradients; the published lines of weights and losses "
        "(tests/methods/fixtures/move_kd.json)",
    )
    config: MoveKDConfig

    def __init__(
        self,
        config: MoveKDConfig,
        *,
        student: GenerativeModel,
        teacher: FrozenTeacher | None = None,
        more_teachers: Sequence[FrozenTeacher] = (),
    ) -> None:
        super().__init__(config, student=student, teacher=teacher, more_teachers=more_teachers)
        self.config = config
        self.check_roles(config.levels, "levels")
        shape = student.encoded_shape
        if shape is None:
            raise ConfigError(
                f"the projector of {student.name} reads patches of all pictures in one row, and move_kd compares them "
                "tile by tile: take a student whose pictures are tiles (LLaVA, SmolVLM, InternVL, Gemma 3, tiny_vlm)"
            )
        idle = config.changed("anchor_share", "shares")
        if idle and len(self.teachers) == 1:
            raise ConfigError(f"move_kd has one encoder, so method.{idle[0]} is not read: name more in more_teachers")
        self.shape, self.anchor = shape, next(iter(self.teachers))
        self.weights = {"answers": config.answers_weight, "distillation": config.distill_weight}
        self.levels = {role: self.level_of(role, self._where(role)) for role in self.teachers}
        sizes = {role: self.size_of(role, level) for role, level in self.levels.items()}
        self.adapters = nn.ModuleDict(
            {
                role: TokenAdapter(size, (shape.tokens, shape.width))
                for role, size in sizes.items()
                if role != self.anchor or size[1] != shape.width
            }
        )
        if config.token_weights == "attention":
            check_blocks(self.teachers[self.anchor].model, self.levels[self.anchor])

    def _where(self, role: str) -> str | float:
        known = self.teachers[role].model.image_levels
        last = known[-2].name if role == self.anchor and len(known) > 1 else 1.0
        return self.config.levels.get(role, last)

    @property
    def default_stages(self) -> tuple[StageConfig, ...]:
        if self.config.form == "one_stage":
            return ()
        seeing = ("vision", "projector", "modules", "weighting")
        first = round(PRE_TRAINING / (PRE_TRAINING + FINE_TUNING), 2)
        everything = (*seeing, "embeddings", "language", "head", "adapters", *mixers_of(self.student_parts))
        return (
            StageConfig(name="pre-training", share=first, train=seeing),
            StageConfig(name="fine-tuning", share=1 - first, train=everything),
        )

    @property
    def made_of(self) -> Mapping[str, Made]:
        return {"distillation": "encoded"}

    @property
    def student_needs(self) -> TokenNeeds:
        return TokenNeeds(encoded=self.wants("distillation"))

    def sums(self, part: Batch, student: TokenFeatures, teacher: TokenFeatures | None) -> dict[str, Counted]:  # noqa: ARG002
        return self.losses(student, self.weigh(part, student.hidden["answer"]))

    def terms(self, batch: Batch) -> dict[str, Term]:
        answered: dict[
            int, SeenByExperts
        ] = {}  # kept between the passes: the backward pass would ask the encoders again
        parts = micro_batches(batch, self.micro_batch)
        self.measurements = {}  # a stage without the encoders has no shares of them
        read = encode_checkpointed(partial(self._read, answered), parts, model=self)
        terms = self.summed([sums for sums, _, _ in read])
        if self.wants("distillation"):
            losses, scores = (torch.cat(each) for each in zip(*(found for _, *found in read), strict=True))
            total = (self._shares(scores) * losses).sum()
            terms["distillation"] = Term(total, self.weights["distillation"], losses.new_full((), len(losses)))
        return terms

    def _read(
        self, answered: dict[int, SeenByExperts], part: Batch, number: int
    ) -> tuple[dict[str, Counted], Tensor, Tensor]:
        """The sums of a part, losses of its pictures by encoder, and scores of all encoders but the first."""
        inputs = self.dialogues(part)
        student: TokenFeatures = self.student(inputs.to(self.device, True), self.student_needs)
        sums, roles = self.sums(part, student, None), list(self.teachers)
        shown = [row for row, tokens in enumerate(per_picture(inputs)) if tokens]
        none = student.hidden["answer"].values.new_zeros(0)
        if not self.wants("distillation") or not shown:
            return sums, none.view(0, len(roles)), none.view(0, len(roles) - 1)
        assert student.encoded is not None
        if len(student.encoded) != len(shown):
            raise ValueError(
                f"{len(shown)} pictures of the student are {len(student.encoded)} tiles: move_kd compares whole "
                "pictures, so switch off the cutting of pictures in the student's processor"
            )
        if number not in answered:
            anchor = self.anchor if self.config.token_weights == "attention" else None
            answered[number] = self.ask_all(part, shown, self.levels, attention_of=anchor)
        seen, losses, scores = answered[number], [], []
        weights, middle = self._weights(seen), seen.classes[self.anchor]
        if self.anchor in self.adapters:
            middle = self.adapters[self.anchor].channels(middle)  # type: ignore[operator]
        for role in roles:
            tokens = seen.tokens[role]
            adapted = self.adapters[role](tokens) if role in self.adapters else resampled(tokens, self.shape.tokens)
            losses.append(encoder_errors(student.encoded, adapted, weights))
            scores.append((adapted @ middle[..., None])[..., 0].mean(-1))
        others = torch.stack(scores, -1)[:, 1:]
        return sums, torch.stack(losses, -1), others

    def _weights(self, seen: SeenByExperts) -> Float[Tensor, "pictures tokens"] | None:
        """How much each of the student's tokens counts in the second part of an error; None: there is none."""
        if seen.looked is None:
            return None
        spread = resampled(seen.looked[..., None], self.shape.tokens)[..., 0]  # of a finer grid each place gets less
        return (spread * (seen.looked.shape[1] / self.shape.tokens)).softmax(-1)

    def _shares(self, scores: Float[Tensor, "pictures others"]) -> Float[Tensor, "pictures encoders"]:
        """How much each encoder counts for each picture, the first one's share first."""
        number, anchor = scores.shape[1], self.config.anchor_share
        if not number:
            return torch.ones(len(scores), 1, device=scores.device)
        if self.config.shares == "equal":
            scores = torch.zeros_like(scores)
        told = torch.stack([scores.detach().softmax(-1).sum(0), scores.new_full((number,), len(scores))])
        told = mean_over_processes(told)
        shares = encoder_shares(scores, anchor, told[0] / told[1].clamp(min=1e-9))
        means = mean_over_processes(shares.detach().sum(0))
        for role, total in zip(self.teachers, means, strict=True):
            self.measurements[f"share/{role}"] = total / told[1, 0].clamp(min=1e-9)
        return shares

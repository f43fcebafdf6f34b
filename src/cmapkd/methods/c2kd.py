"""C2KD (Huo et al., CVPR 2024, pp. 16006-16015): cross-modal distillation between two networks that both learn.

Here the student is an image tower and the teacher a text tower that reads the caption. Both learn to tell the class.
They meet through small proxies, in both directions, and only on samples whose classes both rank similarly.
Departures: the card below and docs/methods/c2kd.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from cmapkd.data.labels import NO_LABEL, LabelReader
from cmapkd.data.templates import ClassPrompts
from cmapkd.data.types import Batch
from cmapkd.features import gather_rows
from cmapkd.features.projector import ClassProxy
from cmapkd.features.pyramid import pooled
from cmapkd.features.taps import level_at
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.dual import DualEncoderMethod
from cmapkd.methods.micro_batches import encode_checkpointed, join_rows, map_rows, micro_batches
from cmapkd.methods.terms import Term
from cmapkd.models import DualEncoder, FrozenTeacher, LevelRequest
from cmapkd.models.texts import LearnedClassVectors
from cmapkd.models.trainable_text import trainable_text_tower
from cmapkd.objectives import (
    kendall_tau,
    kl_divergence,
    labelled_cross_entropy,
    non_target_divergence,
    similarities,
)

PROXY_DEPTH = 3 / 4  # of a tower's levels: the published proxies read the third of four stages


class C2KDConfig(MethodConfig):
    """What each term counts, and which samples the two networks tell each other about."""

    task_weight: float = Field(1.0, ge=0, description="Weight of the cross-entropies of both networks.")
    proxy_weight: float = Field(1.0, ge=0, description="Weight of the KLs between each network and its proxy.")
    cross_weight: float = Field(1.0, ge=0, description="Weight of the KLs between the proxies, where they agree.")
    agreement: float = Field(
        0.0,
        ge=-1.0,
        le=1.0,
        description="Kendall's tau above which a sample counts; 1: none does.",
    )
    direct_weight: float = Field(
        0.0, ge=0, description="Weight of KL(z_T ‖ z_S): plain distillation from the text network, to compare with."
    )
    target: Literal["left_out", "included"] = Field(
        "left_out", description="Whether the right class is left out of the KLs between the proxies."
    )
    prompts_at_once: int | None = Field(
        1, ge=1, description="Templates drawn in each step for the student's class vectors; none: all."
    )

    @property
    def reads_classes(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class TowerRows:
    """What the terms read of both towers, one row for each sample.

    Attributes:
        image, text: embeddings.
        image_level, text_level: the levels that the proxies read, as one vector each.
    """

    image: Float[Tensor, "batch student_dim"]
    image_level: Float[Tensor, "batch image_width"]
    text: Float[Tensor, "batch teacher_dim"]
    text_level: Float[Tensor, "batch text_width"]


class C2KD(DualEncoderMethod):
    """An image and a text tower learn the classes, and from each other where they rank a sample's classes similarly."""

    Config: ClassVar[type[MethodConfig]] = C2KDConfig
    not_cached: str | None = "its teacher learns too, so its answers change with every step"
    steady = True
    card: ClassVar[MethodCard] = MethodCard(
        title="C2KD: cross-modal distillation through proxies, both networks learning",
        paper="Huo et al., CVPR 2024, pp. 16006-16015, https://github.com/huofushuo/C2KD",
        equations=(
            "z_S: the student's image tower, z_T: the teacher's text tower on the caption; z_S', z_T': their proxies",
            "m_i = 1[Kendall-τ(z_T',i, z_S',i) > agreement]",
            "NT(a ← b) = 1/B Σ_i m_i KL(σ(b̃_i) ‖ σ(ã_i)), z̃: z with the right class's logit put to zero",
            "L_S = CE(z_S, y) + KL(z_S ‖ z_S') + KL(z_S' ‖ z_S) + NT(z_S' ← z_T'), and L_T likewise",
            "L = L_S + L_T; in KL(a ‖ b) and NT(b ← a) the target a is detached",
        ),
        needs="labels and the names of the classes; inner levels of the student's image and the teacher's text tower",
        trainable="the student, a copy of the teacher's text tower with a linear classifier, both proxies",
        departures=(
            "The student's classifier is its own text tower on the classes' prompts (cosines times its logit scale), "
            "so what is trained is what zero-shot evaluation measures; the published one is a linear layer.",
            "Proxies read the level at three quarters of each tower's depth, mean-pooled over its tokens; published: "
            "the third of four ResNet stages.",
            "Unlabelled samples count in the KLs, where nothing is put to zero.",
            "AdamW with this toolkit's schedule. The teacher's classifier starts untrained: a first stage of the label "
            "terms alone is the published pre-training.",
        ),
        checked_against="ntkl, _get_gt_mask and the mask by scipy's kendalltau, run on random logits: values, masks "
        "and gradients, tests/methods/fixtures/c2kd.json; shapes of the published proxy",
    )

    def __init__(
        self,
        config: C2KDConfig,
        *,
        student: DualEncoder,
        teacher: FrozenTeacher | None = None,
        classes: ClassPrompts | None = None,
    ) -> None:
        super().__init__(config, student=student, teacher=teacher)
        assert teacher is not None
        assert classes is not None
        self.config, num_classes = config, len(classes.names)
        self.weights = {
            "student_labels": config.task_weight,
            "teacher_labels": config.task_weight,
            "student_proxy": config.proxy_weight,
            "teacher_proxy": config.proxy_weight,
            "to_student": config.cross_weight,
            "to_teacher": config.cross_weight,
            "direct": config.direct_weight,
        }
        self.label_reader = LabelReader(num_classes=num_classes)
        self.own_vectors = LearnedClassVectors(classes, student, at_once=config.prompts_at_once)
        self.image_level = level_at(student.image_levels, PROXY_DEPTH, tower="image")
        self.text_level = level_at(teacher.model.text_levels, PROXY_DEPTH, tower="text")
        self.text_model = trainable_text_tower(teacher.model)
        self.text_classifier = nn.Linear(teacher.embed_dim, num_classes)
        self.image_proxy = ClassProxy(self.image_level.width, num_classes)
        self.text_proxy = ClassProxy(self.text_level.width, num_classes)

    @property
    def student_needs(self) -> LevelRequest:
        return LevelRequest(image_levels=(self.image_level.name,), towers=("image",))

    @property
    def teacher_needs(self) -> LevelRequest:
        return LevelRequest(text_levels=(self.text_level.name,), towers=("text",))

    def _encode(self, part: Batch, _number: int = 0) -> TowerRows:
        """Both towers on a part of the batch."""
        image = self.student.encode_image(self.student_pixels(part), self.student_needs.image_levels)
        texts = part.pairs("teacher").texts.to(self.device, non_blocking=True)
        text = self.text_model.encode_text(texts, self.teacher_needs.text_levels)
        return TowerRows(
            image.embedding,
            pooled(image.levels[self.image_level.name]),
            text.embedding,
            pooled(text.levels[self.text_level.name]),
        )

    def terms(self, batch: Batch) -> dict[str, Term]:
        """The terms of the stage. Rows are of all processes' samples, so the proxies' batch norms see all of them."""
        parts = micro_batches(batch, self.micro_batch)
        rows = map_rows(gather_rows, join_rows(encode_checkpointed(self._encode, parts, model=self)))
        labels = self.labels(batch)
        scale = self.student.log_logit_scale.exp().reshape(())
        vectors = self.own_vectors(self.student, self.step.generator("prompts"))
        student, teacher = similarities(rows.image, vectors, scale), self.text_classifier(rows.text)
        student_proxy, teacher_proxy = self.image_proxy(rows.image_level), self.text_proxy(rows.text_level)
        agreeing = (kendall_tau(teacher_proxy, student_proxy) > self.config.agreement).to(student.dtype)
        self.measurements = {"kept": agreeing.mean()}
        left_out = labels if self.config.target == "left_out" else torch.full_like(labels, NO_LABEL)
        values: dict[str, Callable[[], Tensor]] = {
            "student_labels": lambda: labelled_cross_entropy(student, labels),
            "teacher_labels": lambda: labelled_cross_entropy(teacher, labels),
            "student_proxy": lambda: kl_divergence(student_proxy, student) + kl_divergence(student, student_proxy),
            "teacher_proxy": lambda: kl_divergence(teacher_proxy, teacher) + kl_divergence(teacher, teacher_proxy),
            "to_student": lambda: non_target_divergence(student_proxy, teacher_proxy, left_out, agreeing),
            "to_teacher": lambda: non_target_divergence(teacher_proxy, student_proxy, left_out, agreeing),
            "direct": lambda: kl_divergence(student, teacher),
        }
        return self.weighted({name: value() for name, value in values.items() if self.wants(name)})

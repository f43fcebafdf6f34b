"""A method that uses everything a method may: a momentum teacher, a term with a count, draws, views, pools, labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmapkd.data.batches import Extra
from cmapkd.data.labels import LabelReader
from cmapkd.data.types import Batch
from cmapkd.methods import LABELS, DualEncoderMethod, MethodCard, MethodConfig, Term
from cmapkd.methods.micro_batches import encode_checkpointed, micro_batches
from cmapkd.models import MomentumTeacher, TowerFeatures
from cmapkd.models.tiny import TinyDualEncoder


class ContractedConfig(MethodConfig):
    decay: float = 0.5


class Contracted(DualEncoderMethod):
    """Every term depends on the whole batch, however it is shared out."""

    uses_teacher = False
    Config: ClassVar[type[MethodConfig]] = ContractedConfig
    card = MethodCard("Contracted", "none", (), "", "", (), "tests")

    def __init__(self, config: ContractedConfig, **models: Any) -> None:
        super().__init__(config, **models)
        self.momentum = MomentumTeacher(self.student, decay=config.decay, schedule="cosine")
        self.teachers[self.momentum.role] = self.momentum

    @property
    def term_names(self) -> tuple[str, ...]:
        return "momentum", "drawn", "labelled"

    @property
    def extras(self) -> Mapping[str, Extra]:
        return {**super().extras, LABELS: LabelReader()}

    def terms(self, batch: Batch) -> dict[str, Term]:
        student, target = self.encode_student(batch), self.encode_teachers(batch)["momentum"]
        ours, theirs = student.image.embedding, target.text.embedding
        directions = torch.randn(ours.shape[1], generator=self.step.generator("directions")).to(ours)
        return {
            "momentum": Term((1 - F.cosine_similarity(ours, theirs)).mean(), 2.0),
            "drawn": Term((ours @ directions).square().mean()),
            "labelled": self._labelled(batch),
        }

    def _labelled(self, batch: Batch) -> Term:
        """The sum over this process's labelled samples of a function of their texts, and how many they are."""

        def sums(part: Batch, _number: int) -> Tensor:
            labels = part.extra[LABELS].to(self.device)
            embedding = self.student.encode_text(part.inputs["student"].texts.to(self.device)).embedding
            labelled = (labels >= 0).to(embedding.dtype)
            return torch.stack([(embedding.square().sum(-1) * labelled).sum(), labelled.sum()])

        found = encode_checkpointed(sums, micro_batches(batch, self.micro_batch), model=self)
        total, count = torch.stack(found).sum(0)
        return Term(total, 0.5, count.detach())


class NormedStudent(TinyDualEncoder):
    """Has a batch norm."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.norm = nn.BatchNorm1d(self.embed_dim)

    def encode_image(self, images: Any, levels: Any = ()) -> TowerFeatures:
        tower = super().encode_image(images, levels)
        return replace(tower, embedding=self.norm(tower.embedding))

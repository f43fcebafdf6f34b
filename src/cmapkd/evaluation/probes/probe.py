"""A probe as the trainer sees it: a method whose student is the encoder and whose own module is the head."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cmapkd.data.types import Batch
from cmapkd.evaluation.probes.features import patch_level, patches_of, text_level
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.dual import DualEncoderMethod
from cmapkd.methods.step import StepInfo
from cmapkd.methods.terms import Term
from cmapkd.models.base import DualEncoder


@dataclass(frozen=True, slots=True)
class HeadInput:
    """What a head reads of a batch: patches and embedding of images; tokens and embedding of texts, if any."""

    patches: Float[Tensor, "batch cells width"]
    embedding: Float[Tensor, "batch dim"]
    tokens: Float[Tensor, "batch tokens text_width"] | None = None
    mask: Bool[Tensor, "batch tokens"] | None = None
    text_embedding: Float[Tensor, "batch dim"] | None = None


class Head(nn.Module):
    """A small module on top of an encoder."""

    @abstractmethod
    def loss(self, inputs: HeadInput, targets: dict[str, Tensor]) -> Float[Tensor, ""]:
        """Mean loss of the batch, a float32 scalar.

        Args:
            inputs: features of the samples.
            targets: by name, [batch ...]; each head says which it reads.
        """

    @abstractmethod
    def size(self, targets: dict[str, Tensor]) -> Int[Tensor, ""]:
        """Of how many things `loss` is the mean of these targets, so that parts of a batch can be put together."""


class Probe(DualEncoderMethod):
    """Trains a head by its loss. A frozen encoder is no submodule: no checkpoint holds it, no optimiser sees it."""

    uses_teacher = False
    Config = MethodConfig
    card: ClassVar[MethodCard] = MethodCard(
        title="Probe",
        paper="none: docs/evaluation.md",
        equations=(),
        needs="an encoder that exposes levels",
        trainable="the head; with fine_tune the encoder",
        departures=(),
        checked_against="tests/evaluation/probes",
    )

    def __init__(self, encoder: DualEncoder, head: Head, *, fine_tune: bool) -> None:
        super().__init__(MethodConfig(name="probe"), student=encoder)
        self.head = head
        if not fine_tune:
            del self.student
            self.__dict__["student"] = encoder  # beside the submodules, so that state_dict and train() do not reach it
        self._names = patch_level(encoder).name, text_level(encoder).name if encoder.text_levels else None

    @property
    def term_names(self) -> tuple[str, ...]:
        return ("task",)

    def terms(self, batch: Batch) -> dict[str, Term]:
        """The head's loss; a mean over this process's samples alone, as a probe is trained by one process."""
        targets = {name: value.to(self._head_device, non_blocking=True) for name, value in batch.extra.items()}
        inputs = self._encode(batch) if batch.inputs else _stored(targets)
        return {"task": Term(self.head.loss(inputs, targets))}

    def after_step(self, step: StepInfo | None = None) -> None:
        """Nothing: no logit scale is learned here."""

    @property
    def _head_device(self) -> torch.device:
        return next(self.head.parameters()).device

    def _encode(self, batch: Batch) -> HeadInput:
        image, text = self._names
        inputs = batch.pairs("student").to(self._head_device, True)
        tower = self.student.encode_image(self.student.image_spec.to_model(inputs.images), (image,))
        patches, _ = patches_of(self.student, tower)
        if not len(inputs.texts.ids):
            return HeadInput(patches, tower.embedding)
        assert text is not None
        texts = self.student.encode_text(inputs.texts, (text,))
        return HeadInput(patches, tower.embedding, texts.levels[text].values, inputs.texts.mask, texts.embedding)


def _stored(values: dict[str, Tensor]) -> HeadInput:
    """Features that `ProbeBatches` took from memory, [batch ...] each, in float32."""
    tokens = values["tokens"].float() if "tokens" in values else None
    texts = tokens, values.get("mask"), values.get("text_embedding")
    return HeadInput(values["patches"].float(), values["embedding"], *texts)


class ImageTokens(nn.Module):
    """Embedding and patches as tokens of one width, with learned positions; what every head begins with."""

    def __init__(self, patch_width: int, embed_dim: int, cells: int, width: int) -> None:
        super().__init__()
        self.of_patches = nn.Sequential(nn.LayerNorm(patch_width), nn.Linear(patch_width, width))
        self.of_embedding = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, width))
        self.positions = nn.Parameter(torch.randn(1, cells + 1, width) * 0.02)

    def forward(self, inputs: HeadInput) -> Float[Tensor, "batch tokens width"]:
        tokens = torch.cat([self.of_embedding(inputs.embedding)[:, None], self.of_patches(inputs.patches)], dim=1)
        out: Tensor = tokens + self.positions
        return out

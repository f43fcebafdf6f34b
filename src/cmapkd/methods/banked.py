"""The bank of teacher embeddings as a method uses it: its settings, how it is filled, and the term over it.

Everything here is of all processes' samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from cmapkd.config import Config
from cmapkd.data.types import Batch
from cmapkd.features import BankStore, EmbeddingBank, References, gather_rows, sample_keys
from cmapkd.methods.in_batch import Pair
from cmapkd.models import FrozenTeacher, Teacher
from cmapkd.objectives import bank_divergence


class BankConfig(Config):
    """The pairs of teacher embeddings that a sample is compared with."""

    size: int = Field(8192, ge=1, description="Pairs of teacher embeddings in the bank.")
    source: Literal["run", "cache"] = Field(
        "run", description="run: the pairs that the run has seen last; cache: a fixed draw from the teacher's cache."
    )
    store: BankStore = Field("fp16", description="Type of the bank's numbers; fp16 is off by one part in 2048.")
    sample: int | None = Field(
        2048, ge=2, description="Pairs drawn from the bank at each step to compare with; none: all of it."
    )
    duplicates: float | None = Field(
        None, gt=0, lt=1, description="Cosine of two images above which they count as the same; none: by name only."
    )


def make_bank(config: BankConfig, teacher: FrozenTeacher, levels: Mapping[str, int] | None = None) -> EmbeddingBank:
    """A bank of a teacher's embeddings, still empty.

    Args:
        levels: widths of inner levels that stand beside each pair, by name.
    """
    return EmbeddingBank(
        config.size, teacher.embed_dim, store=config.store, fixed=config.source == "cache", levels=levels
    )


def keys_in_bank(bank: EmbeddingBank, batch: Batch, teacher: Teacher, device: torch.device) -> Int[Tensor, " batch"]:
    """What names the batch's samples in the bank, on `device`; a fixed bank is filled when it is first asked for."""
    if not bank.fixed:
        own = sample_keys(batch.ids)
    else:
        if not bank.filled:
            bank.fill(teacher.reference_embeddings(bank.size))
        own = batch.stored["teacher"].samples
    return gather_rows(own.to(device, non_blocking=True))


def draw_references(
    bank: EmbeddingBank,
    config: BankConfig,
    keys: Int[Tensor, " batch"],
    images: Float[Tensor, "batch dim"],
    generator: torch.Generator,
) -> References:
    """The entries that a step compares with, drawn by the step's own generator.

    Args:
        images: the teacher's embeddings of the batch, for `config.duplicates`.
    """
    return bank.references(
        keys, num=config.sample, generator=generator, images=images, duplicates_above=config.duplicates
    )


def embeddings_against_bank(
    student: Pair, teacher: Pair, references: References, *, scale: Float[Tensor, ""], same_modality: bool = False
) -> Float[Tensor, ""]:
    """Mean over both modalities of the KL over the bank's embeddings.

    Args:
        student: embeddings at the teacher's width.
        scale: the teacher's logit scale, of both models.
        same_modality: images are compared with the bank's images, and not with its texts; texts likewise.
    """
    banks = (references.image, references.text) if same_modality else (references.text, references.image)
    divergences = [
        bank_divergence(
            anchors,
            targets,
            entries,
            student_scale=scale,
            teacher_scale=scale,
            exclude=references.exclude,
            frozen=True,
        ).mean()
        for anchors, targets, entries in zip(student, teacher, banks, strict=True)
    ]
    return torch.stack(divergences).mean()

"""CLIP-PING, a reconstruction (Thwal et al. 2024, arXiv:2412.03871): neighbours under the teacher are targets.

What is from the paper and what is ours: the card below and docs/methods/clip_ping.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from cmapkd.config import ConfigError, counted
from cmapkd.data.types import Batch
from cmapkd.features import BankStore, EmbeddingBank, gather_rows, sample_keys
from cmapkd.features.closed_form import nearest_others
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.dual import DualEncoderMethod, task_loss
from cmapkd.methods.own_scales import factor, keep_in_range, new_scale
from cmapkd.methods.step import StepInfo
from cmapkd.methods.targets import Survey
from cmapkd.methods.terms import Term
from cmapkd.models import DualEncoder, Features, FrozenTeacher
from cmapkd.objectives import contrastive_loss
from cmapkd.objectives.common import at_least_float32

SAME = 1 - 1e-3
"""Cosine above which two pictures, or two texts, are one thing under two names: tables have a line per caption."""


class ClipPingConfig(MethodConfig):
    """The weight of each term, and among which samples neighbours are looked for."""

    task_weight: float = Field(1.0, ge=0, description="Weight of the student's own contrastive loss.")
    nn_weight: float = Field(
        1.0, ge=0, description="Weight of InfoNCE against the features of neighbours within the modality."
    )
    xnn_weight: float = Field(
        1.0, ge=0, description="Weight of InfoNCE against those of the other modality's neighbours."
    )
    support: int = Field(
        65_536, ge=2, description="Samples of the training data among which neighbours are looked for; all of fewer."
    )
    store: BankStore = Field("fp16", description="Type of the support's numbers; fp16 is off by one part in 2048.")
    neighbours: Literal["nearest", "shuffled"] = Field(
        "nearest",
        description="nearest: the sample that the teacher finds most alike; shuffled: another one in its place, always "
        "the same, which is the control of an experiment.",
    )


class ClipPing(DualEncoderMethod):
    """Besides its own pair, a student's embedding finds the teacher's features of the pair's nearest neighbours."""

    Config: ClassVar[type[MethodConfig]] = ClipPingConfig
    steady = True
    card: ClassVar[MethodCard] = MethodCard(
        title="CLIP-PING, a reconstruction: contrastive targets from nearest neighbours",
        paper="Thwal et al. 2024, arXiv:2412.03871, of which the abstract was read",
        equations=(
            "a_i, b_i: the teacher's image and text features of sample i; s: a scale that is learned",
            "n(i) = the image in the support that is nearest to a_i, m(i) = the text that is nearest to b_i",
            "no neighbour is i, shows the picture of i (cosine above 0.999) or, as m(i), says the text of i (likewise)",
            "NCE(x, y) = 1/2 [CE(s x yᵀ, diag) + the transposed]; equal neighbours in a batch are no negatives",
            "L_NN = 1/2 [NCE(h_I(v), a_n) + NCE(h_T(t), b_m)]",
            "L_XNN = 1/2 [NCE(h_I(v), a_m) + NCE(h_T(t), b_n)]",
            "L = L_contrastive + L_NN + L_XNN",
        ),
        needs="embeddings of the teacher, whose towers need not know each other",
        trainable="the student, the linear maps h_I and h_T, the scale s",
        departures=(
            "From the paper: nearest and cross nearest neighbours of frozen encoders' features, as extra contrastive "
            "supervision. The formulas, weights, scale and maps are ours: no code was found, and no equation could be "
            "read.",
            "Neighbours are looked for among a support that is drawn once, with the teacher's answer to the view that "
            "the student sees.",
        ),
        checked_against="the formulas written out in loops; no published code was found, so there is no parity",
    )

    def __init__(self, config: ClipPingConfig, *, student: DualEncoder, teacher: FrozenTeacher | None = None) -> None:
        super().__init__(config, student=student, teacher=teacher)
        assert teacher is not None
        self.config = config
        self.weights = {"contrastive": config.task_weight, "nn": config.nn_weight, "xnn": config.xnn_weight}
        self.dim = teacher.embed_dim
        searches = bool({*self.term_names} & {"nn", "xnn"})
        self.to_image = nn.Linear(student.embed_dim, self.dim) if searches else None
        self.to_text = nn.Linear(student.embed_dim, self.dim) if searches else None
        self.scale = new_scale() if searches else None
        self.support = EmbeddingBank(0, self.dim, store=config.store)

    @property
    def prepares(self) -> bool:
        return self.to_image is not None

    def prepare(self, survey: Survey) -> None:
        """Fills the support."""
        parts = [*survey(num=self.config.support)]
        number = sum(len(part.keys) for part in parts)
        if number < 2:
            raise ConfigError(
                "clip_ping looks for neighbours among the training data, and the teacher answers "
                f"{counted(number, 'sample')}: take a data.train with more samples, or more training.steps"
            )
        if number == 2 and self.config.neighbours == "shuffled":
            raise ConfigError(
                "method.neighbours: shuffled takes a sample that is neither the neighbour nor the sample itself, and "
                "of 2 samples none is left: take method.support: 3 or more, and data with as many samples"
            )
        self._resize(number)
        for part in parts:
            self.support.push(part.image, part.text, part.keys)

    @property
    def structure(self) -> dict[str, Any]:
        return {"support": self.support.size}

    def restructure(self, structure: Mapping[str, Any]) -> None:
        self._resize(int(structure.get("support", 0)))

    def _resize(self, number: int) -> None:
        self.support = EmbeddingBank(number, self.dim, store=self.config.store).to(self.device)

    def terms(self, batch: Batch) -> dict[str, Term]:
        student = self.encode_student(batch)
        values: dict[str, Tensor] = {}
        if self.wants("contrastive"):
            values["contrastive"] = task_loss(student)
        if self.wants("nn") or self.wants("xnn"):
            n, m = self._neighbours(batch, self.encode_teacher(batch))
            if self.wants("nn"):
                values["nn"] = self._found(student, n, m)
            if self.wants("xnn"):
                values["xnn"] = self._found(student, m, n)
        return self.weighted(values)

    @torch.no_grad()
    def _neighbours(self, batch: Batch, teacher: Features) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]:
        """Where the neighbours of all processes' samples stand in the support: by image, and by text."""
        bank = self.support
        if bank.size < 2:
            raise ValueError("clip_ping has no support yet: `prepare` comes before the first step")
        keys = gather_rows(sample_keys(batch.ids).to(self.device, non_blocking=True))
        same = bank.references(keys, images=teacher.image.embedding, duplicates_above=SAME).exclude
        found = []
        for tower, entries in ((teacher.image, bank.image), (teacher.text, bank.text)):
            with torch.autocast(self.device.type, enabled=False):
                queries = at_least_float32(tower.embedding)
                places = nearest_others(
                    queries, entries, query_keys=keys, entry_keys=bank.keys, avoided=same, duplicates_above=SAME
                )
            if self.config.neighbours == "shuffled":
                # by the sample, else those that shared a neighbour would share what stands in its place
                places = (places + 1 + keys % (bank.size - 2)) % bank.size
                places = (places + (bank.keys[places] == keys).long()) % bank.size  # not the sample itself
            found.append(places)
        return found[0], found[1]

    def _found(
        self, student: Features, for_image: Int[Tensor, " batch"], for_text: Int[Tensor, " batch"]
    ) -> Float[Tensor, ""]:
        """Mean over both modalities of InfoNCE against the features of these samples."""
        assert self.to_image is not None
        assert self.to_text is not None
        assert self.scale is not None
        bank, scale = self.support, factor(self.scale, "exp")
        image, text = self.to_image(student.image.embedding), self.to_text(student.text.embedding)
        of_images = contrastive_loss(
            image, at_least_float32(bank.image[for_image]), logit_scale=scale, pictures=for_image
        )
        of_texts = contrastive_loss(text, at_least_float32(bank.text[for_text]), logit_scale=scale, pictures=for_text)
        return (of_images + of_texts) / 2

    @torch.no_grad()
    def after_step(self, step: StepInfo | None = None) -> None:
        super().after_step(step)
        keep_in_range((self.scale,), "exp")

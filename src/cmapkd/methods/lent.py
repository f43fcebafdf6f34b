"""What a method of embeddings can be lent of CMAPKD's, so that a comparison is fair: hints, a bank, one projector."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from pydantic import Field, field_validator
from torch import Tensor

from cmapkd.data.types import Batch
from cmapkd.features import EmbeddingBank, PairProjector
from cmapkd.methods.banked import BankConfig, draw_references, embeddings_against_bank, keys_in_bank, make_bank
from cmapkd.methods.card import MethodConfig
from cmapkd.methods.dual import DualEncoderMethod, TeacherDetail
from cmapkd.methods.hints import Hints, checked_hints
from cmapkd.methods.in_batch import Pair
from cmapkd.models import DualEncoder, Features, FrozenTeacher, LevelRequest


class LentConfig(MethodConfig):
    """Settings that are no part of the published method. By default nothing is lent."""

    hints: dict[str, float] = Field(
        default_factory=dict,
        description="What each inner level (P2 to P4, L1 to L3) counts against the teacher's same level. No part of "
        "the published method: a comparison gives it what cmapkd has.",
    )
    bank_weight: float = Field(
        0.0, ge=0, description="Weight of the KL over a bank of the teacher's other modality, cmapkd's. Likewise."
    )
    bank: BankConfig = Field(default_factory=BankConfig, description="The bank of teacher embeddings.")
    projector: Literal["own", "shared"] = Field(
        "own", description="To the teacher's width: one map for each modality, as published, or cmapkd's one for both."
    )

    @field_validator("hints")
    @classmethod
    def _hints_are_known(cls, value: dict[str, float]) -> dict[str, float]:
        return checked_hints(value)


class LentMethod(DualEncoderMethod):
    """A method of embeddings with two more terms, `hints` and `bank`, each where its settings ask for it.

    The method makes the modules at their places among its own: who draws first, begins with other weights.
    """

    config: LentConfig
    bank: EmbeddingBank | None
    hints: Hints | None

    def make_projector(self, student: DualEncoder, teacher: FrozenTeacher) -> PairProjector:
        """To the teacher's width, as `projector` says."""
        return PairProjector(student.embed_dim, teacher.embed_dim, shared=self.config.projector == "shared")

    def make_bank(self, teacher: FrozenTeacher) -> EmbeddingBank | None:
        """A bank that is still empty; None where its term has no weight."""
        return make_bank(self.config.bank, teacher) if self.config.bank_weight else None

    def make_hints(self, student: DualEncoder, teacher: FrozenTeacher) -> Hints | None:
        """None where no level counts."""
        return Hints(self.config.hints, student, teacher.model) if any(self.config.hints.values()) else None

    def encode_with_hints(self, batch: Batch) -> tuple[Features, Features, Float[Tensor, ""] | None]:
        """Both models' embeddings of all processes' samples, and the loss of the hints; None where it is not wanted."""
        if self._hints is None:
            return self.encode_student(batch), self.encode_teacher(batch), None
        student, teacher, distances = self.encode_both(batch, self._hints.distances)
        return student, teacher, self._hints.loss(distances)

    def against_bank(
        self, bank: EmbeddingBank, batch: Batch, student: Pair, teacher: Pair, scale: Float[Tensor, ""]
    ) -> Float[Tensor, ""]:
        """The KL over the bank, which then takes the batch's pairs in: after they were compared, not before.

        Args:
            student, teacher: embeddings of all processes' samples, at the teacher's width.
            scale: the teacher's logit scale.
        """
        assert self.teacher is not None
        keys = keys_in_bank(bank, batch, self.teacher, teacher[0].device)
        references = draw_references(bank, self.config.bank, keys, teacher[0], self.step.generator("bank"))
        loss = embeddings_against_bank(student, teacher, references, scale=scale)
        if self.training and not bank.fixed:
            bank.push(*teacher, keys)
        return loss

    @property
    def matches_words(self) -> bool:
        return self.hints is not None and self.hints.match.reads_words

    @property
    def student_needs(self) -> LevelRequest:
        return LevelRequest() if self._hints is None else self._hints.needs("student")

    @property
    def teacher_needs(self) -> LevelRequest:
        return LevelRequest() if self._hints is None else self._hints.needs("teacher")

    @property
    def teacher_detail(self) -> TeacherDetail:
        if self._hints is None:
            return "global"
        return "dense" if self._hints.reads_places else "pooled"

    @property
    def _hints(self) -> Hints | None:
        """Where the stage wants them."""
        return self.hints if self.wants("hints") else None

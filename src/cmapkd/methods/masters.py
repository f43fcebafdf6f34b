"""Masters, stage 1 (CVPR 2026, arXiv:2512.22238): a teacher without its smallest weights, which come back step by step.

Everything else is `token_kd`. A reconstruction of third-party notes: no code was found, and of the paper the abstract
alone was read. Its second stage, reinforcement with a judge, is not built here.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from cmapkd.config import ConfigError
from cmapkd.data.types import Batch
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.step import StepInfo
from cmapkd.methods.terms import Term
from cmapkd.methods.token_kd import TokenKD, TokenKDConfig
from cmapkd.models import FrozenTeacher
from cmapkd.models.generative import GenerativeModel
from cmapkd.models.thinned import Thinned


class MastersConfig(TokenKDConfig):
    """How thin the teacher is at first, and in how many steps it is whole again; all else is as of token_kd."""

    divergence: Literal["forward", "reverse", "jsd", "skew_forward", "skew_reverse", "tv", "sampled_reverse"] = Field(
        "jsd", description="Between the teacher's and the student's next-token distributions."
    )
    answers_weight: float = Field(0.0, ge=0, description="Weight of the cross-entropy with the answers of the data.")
    thin_from: float = Field(0.2, ge=0, lt=1, description="Share of a matrix's weights that is left out at first.")
    thin_step: float = Field(0.05, ge=0, lt=1, description="By how much it falls from one part of the run to the next.")
    snapshots: int = Field(5, ge=1, description="Equal parts of the run, each with a share of its own, at least 0.")
    thin_parts: tuple[Literal["vision", "projector", "language"], ...] = Field(
        ("vision", "projector", "language"), min_length=1, description="Parts of the teacher that are thinned."
    )

    @property
    def not_cached(self) -> str | None:
        return "the teacher has other weights in each part of the run, and a cache holds the answers of one"

    @model_validator(mode="after")
    def _thins(self) -> MastersConfig:
        if not self.thin_from:
            raise ValueError("thin_from is 0, so the teacher is always whole: set method: token_kd")
        if self.snapshots == 1 and self.changed("thin_step"):
            raise ValueError(f"snapshots: 1 is one part, so thin_step {self.thin_step:g} is not read: leave it out")
        return self

    def share(self, step: StepInfo) -> float:
        """Which share of the teacher's weights is left out in a step."""
        passed = min(self.snapshots - 1, step.step * self.snapshots // max(1, step.total))
        return max(0.0, self.thin_from - self.thin_step * passed)


class Masters(TokenKD):
    """The student follows a teacher that is thin at first, so that its distributions are nearer to a small model's."""

    Config: ClassVar[type[MethodConfig]] = MastersConfig
    card: ClassVar[MethodCard] = MethodCard(
        title="Masters, stage 1, a reconstruction: a teacher whose smallest weights come back step by step",
        paper="Masking Teacher and Reinforcing Student for Distilling VLMs, CVPR 2026, arXiv:2512.22238",
        equations=(
            "W_r: each matrix W without its share r of smallest |w|",
            "r = max(0, 0.2 − 0.05 ⌊5 i / I⌋) in step i of I",
            "L = answers_weight CE(y, q) + distill_weight JSD(p_r, q), p_r the teacher's next tokens with W_r",
        ),
        needs="as token_kd; a teacher with linear layers of torch; no cache",
        trainable="the student",
        departures=(
            "A reconstruction: formulas are from notes of others. The mixture weight of the JSD was not found: 0.5.",
            "Answers are those of the data, or with on_policy the student's own. Published: written beforehand by the "
            "masked teacher and the student.",
            "Linear layers of vision tower, projector and language model are thinned; not norms, words and head.",
            "The second stage (GRPO with a judge) is left out.",
        ),
        checked_against="a teacher that is thinned by hand, and shares of zeros by matrix; no code was found",
    )
    config: MastersConfig

    def __init__(
        self, config: MastersConfig, *, student: GenerativeModel, teacher: FrozenTeacher | None = None
    ) -> None:
        super().__init__(config, student=student, teacher=teacher)
        self.not_cached = config.not_cached
        assert teacher is not None
        if teacher.shared:
            raise ConfigError(f"the weights of {teacher.name} are read by the student, too: name another teacher")
        self._thinned = Thinned(teacher.model, config.thin_parts)

    def terms(self, batch: Batch) -> dict[str, Term]:
        self._thinned.to(self.config.share(self.step))
        terms = super().terms(batch)
        self.measurements["thinned"] = self.student.head.weight.new_tensor(self._thinned.share)
        return terms

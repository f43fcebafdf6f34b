"""TAID, temporally adaptive interpolated distillation (Shing et al. 2025, arXiv:2501.16937).

The target moves from the student's own distribution to the teacher's while the loss falls, for a large gap of sizes.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from cmapkd.data.types import Batch
from cmapkd.features.gather import mean_over_processes
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.generative import Counted, GenerativeConfig, GenerativeMethod
from cmapkd.methods.terms import Term
from cmapkd.models import FrozenTeacher
from cmapkd.models.generative import GenerativeModel
from cmapkd.models.token_types import TokenFeatures
from cmapkd.objectives.taid import TaidState, next_taid
from cmapkd.objectives.tokens import TokenDivergence


class TAIDConfig(GenerativeConfig):
    """Where the target begins and ends, and how fast it moves."""

    start: float = Field(0.4, ge=0, le=1, description="Weight of the teacher in the first target.")
    end: float = Field(1.0, ge=0, le=1, description="Weight of the teacher in the last target.")
    rate: float = Field(5e-4, ge=0, description="alpha: how far a step moves the target, at most.")
    momentum: float = Field(0.99, ge=0, lt=1, description="beta: weight of the past in the mean of the loss's fall.")
    adaptive: bool = Field(True, description="Whether a falling loss moves the target ahead of the straight line.")
    answers_weight: float = Field(0.0, ge=0, description="Weight of the cross-entropy with the answers of the data.")
    distill_weight: float = Field(1.0, ge=0, description="Weight of the divergence from the target.")

    @property
    def not_cached(self) -> str | None:
        return "its target mixes all logits of teacher and student, and a cache holds the likeliest alone"

    @model_validator(mode="after")
    def _forwards(self) -> TAIDConfig:
        if self.start > self.end:
            raise ValueError(f"start is {self.start:g} and end {self.end:g}: the target moves to the teacher, not away")
        return self


class TAID(GenerativeMethod):
    """Cross-entropy with the softmax of interpolated logits, whose place t rises at least with the steps."""

    Config: ClassVar[type[MethodConfig]] = TAIDConfig
    card: ClassVar[MethodCard] = MethodCard(
        title="TAID: temporally adaptive interpolated distillation",
        paper="Shing et al. 2025, arXiv:2501.16937, section 3",
        equations=(
            "p_t = σ((1−t) sg z_S + t z_T)",
            "L = answers_weight CE(y, q) − distill_weight Σ p_t log q",
            "r = (l' − l) / (l' + 1e-15), l = −Σ p_t log q of this step and l' of the one before; M ← βM + (1−β) r",
            "t ← min(end, max(start + (end − start) progress, t + α σ(M) (1 − t)))",
        ),
        needs="final states of the answers' tokens of both models, which must have one vocabulary; no cache",
        trainable="the student",
        departures=("The loss that moves t is the mean over all micro-batches and processes.",),
        checked_against="the target and the update written out; the released TAID.update_t "
        "(tests/objectives/fixtures/token_losses.json)",
    )
    place: Tensor
    momentum: Tensor
    before: Tensor

    def __init__(self, config: TAIDConfig, *, student: GenerativeModel, teacher: FrozenTeacher | None = None) -> None:
        super().__init__(config, student=student, teacher=teacher)
        self.config: TAIDConfig = config
        self.not_cached = config.not_cached
        self.weights = {"answers": config.answers_weight, "distillation": config.distill_weight}
        self.register_buffer("place", torch.tensor(config.start, dtype=torch.float64))
        self.register_buffer("momentum", torch.zeros((), dtype=torch.float64))
        self.register_buffer("before", torch.full((), torch.inf, dtype=torch.float64))

    def sums(self, part: Batch, student: TokenFeatures, teacher: TokenFeatures | None) -> dict[str, Counted]:
        weighed = self.weigh(part, student.hidden["answer"])
        return self.losses(student, weighed, teacher=teacher, divergence=self._target, soft=weighed)

    def terms(self, batch: Batch) -> dict[str, Term]:
        self._target = TokenDivergence("taid", t=float(self.place))
        terms = super().terms(batch)
        self.measurements["taid/t"] = self.place.clone()
        term = terms.get("distillation")
        if self.training and term is not None and term.count is not None:
            total = mean_over_processes(torch.stack([term.value.detach().double(), term.count.double()]))
            if total[1] > 0:  # a batch whose answers are all empty says nothing
                self._move(total[0] / total[1])
        return terms

    def _move(self, loss: Tensor) -> None:
        """Moves the target after a step whose loss was `loss`."""
        config = self.config
        progress = self.step.step / self.step.total
        state = next_taid(
            TaidState(float(self.place), float(self.before), float(self.momentum)),
            float(loss),
            progress=progress,
            start=config.start,
            end=config.end,
            rate=config.rate,
            inertia=config.momentum,
        )
        line = min(config.end, config.start + (config.end - config.start) * progress)
        self.place.fill_(state.t if config.adaptive else line)
        self.before.fill_(state.previous)
        self.momentum.fill_(state.momentum)

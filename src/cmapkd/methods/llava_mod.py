"""LLaVA-MoD (Shu et al., ICLR 2025, arXiv:2408.15881): mimic distillation, then preference distillation.

The mimic is `token_kd` on the answers alone. Then the student learns to prefer an answer to a worse one more clearly
than its teacher does. The paper's sparse students (mixtures of experts) are not built here.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from cmapkd.data.dialogues import ChatInput
from cmapkd.data.random import uniforms
from cmapkd.data.types import Batch, Input
from cmapkd.features.gather import gather_rows
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.generative import Counted, GenerativeConfig, GenerativeMethod
from cmapkd.methods.micro_batches import encode_checkpointed, micro_batches
from cmapkd.methods.stages import StageConfig
from cmapkd.methods.terms import Term
from cmapkd.models import FrozenTeacher
from cmapkd.models.generative import GenerativeModel
from cmapkd.models.token_types import TokenFeatures
from cmapkd.objectives.sequence import PreferenceForm, preference_loss, sums_by_sample, target_log_probs
from cmapkd.objectives.tokens import TokenDivergence


class LLaVAMoDConfig(GenerativeConfig):
    """What each of the two stages counts, and the form of the preference."""

    form: PreferenceForm = Field("kto_pair", description="kto_pair: the pairwise form of KTO; dpo: its sigmoid form.")
    beta: float = Field(0.1, gt=0, description="Multiplies log-ratios of whole answers, of student to teacher.")
    answers_weight: float = Field(
        0.0, ge=0, description="Weight of the cross-entropy with the good answers; the paper's sparse students have 1."
    )
    distill_weight: float = Field(1.0, ge=0, description="Weight of the divergence on the good answers, the mimic.")
    preference_weight: float = Field(1.0, ge=0, description="Weight of the preference of good answers to worse ones.")
    exchanged: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the pairs whose two answers change places in the preference, drawn by sample. 0.5 is a "
        "control: what is preferred then says nothing.",
    )

    @property
    def pair_terms(self) -> tuple[str, ...]:
        return ("preference",) if self.preference_weight else ()

    @property
    def not_cached(self) -> str | None:
        return "it reads the teacher's probability of any token, and a cache holds the likeliest alone"

    @model_validator(mode="after")
    def _something_counts(self) -> LLaVAMoDConfig:
        if not (self.answers_weight or self.distill_weight or self.preference_weight):
            raise ValueError("every weight is 0, so nothing would be learned: give one of them a weight")
        if self.exchanged and not self.preference_weight:
            raise ValueError(f"preference_weight is 0, so no pair is read: leave exchanged ({self.exchanged:g}) out")
        return self


class LLaVAMoD(GenerativeMethod):
    """Mimics the teacher's next tokens, then prefers good answers to worse ones more than the teacher does."""

    Config: ClassVar[type[MethodConfig]] = LLaVAMoDConfig
    card: ClassVar[MethodCard] = MethodCard(
        title="LLaVA-MoD: mimic and preference distillation, of dense students",
        paper="Shu et al., ICLR 2025, arXiv:2408.15881, section 3.2",
        equations=(
            "distillation (mimic): KL(p ‖ q) of the next tokens of the good answers y+",
            "r± = log q(y±) − log p(y±), sums over the tokens of an answer",
            "preference, kto_pair: 1 − ½ mean[σ(β(r+ − max(0, mean r−))) + σ(β(max(0, mean r+) − r−))]",
            "preference, dpo: −mean log σ(β(r+ − r−))",
            "L = answers_weight CE(y+, q) + distill_weight distillation + preference_weight preference, by stages",
            "stages: four fifths of the steps distillation, then preference",
        ),
        needs="final states of the answers' tokens of both models; a worse answer beside each good one; one vocabulary "
        "for the mimic, any two for the preference; no cache",
        trainable="the student",
        departures=(
            "Students are dense: the paper's mixture of experts and its balance loss are left out.",
            "All of the student learns. The paper's code trains MLPs and routers: see training.train_parts.",
            "The mimic compares the rows that predict answers. The paper's code compares rows one place off.",
            "Means of r+ and r− are over the batch of all processes, and not over the one pair that a device holds.",
            "The share of steps of each stage is ours. The paper has 3.8 million dialogues, then 80 thousand pairs.",
        ),
        checked_against="sums in plain loops; the released DPOTrainer.dpo_loss and get_logp "
        "(tests/methods/fixtures/llava_mod.json), AlignTrainer.compute_align_loss (tests/objectives/fixtures)",
    )
    config: LLaVAMoDConfig

    def __init__(
        self, config: LLaVAMoDConfig, *, student: GenerativeModel, teacher: FrozenTeacher | None = None
    ) -> None:
        super().__init__(config, student=student, teacher=teacher)
        self.config = config
        mimic = {"answers": config.answers_weight, "distillation": config.distill_weight}
        self.weights = mimic | {"preference": config.preference_weight}
        self.not_cached = config.not_cached

    @property
    def compares_tokens(self) -> bool:
        return super().compares_tokens and bool(self.config.distill_weight)

    @property
    def default_stages(self) -> tuple[StageConfig, ...]:
        mimic = tuple(name for name in self.term_names if name != "preference")
        if not mimic or not self.config.preference_weight:
            return ()
        return (
            StageConfig(name="mimic", share=0.8, terms=mimic),
            StageConfig(name="preference", share=0.2, terms=("preference",)),
        )

    def sums(self, part: Batch, student: TokenFeatures, teacher: TokenFeatures | None) -> dict[str, Counted]:
        weighed = self.weigh(part, student.hidden["answer"])
        return self.losses(student, weighed, teacher=teacher, divergence=TokenDivergence("forward"), soft=weighed)

    def terms(self, batch: Batch) -> dict[str, Term]:
        mimic = any(self.wants(name) for name in self.weights if name != "preference")
        terms = super().terms(batch) if mimic else {}
        return terms | (self.weighted({"preference": self._preference(batch)}) if self.wants("preference") else {})

    def _preference(self, batch: Batch) -> Float[Tensor, ""]:
        parts, answered = micro_batches(batch, self.micro_batch), dict[int, Tensor]()
        own = torch.cat(encode_checkpointed(partial(self._log_ratios, answered), parts, model=self))
        if self.config.exchanged:
            drawn = [uniforms(1, "exchanged", each)[0] < self.config.exchanged for each in batch.ids]
            own = torch.where(torch.tensor(drawn)[:, None].to(own.device, non_blocking=True), own.flip(-1), own)
        chosen, rejected = gather_rows(own).unbind(-1)  # both means of kto_pair are over the whole batch
        told = {"chosen": chosen, "rejected": rejected, "preferred": (chosen > rejected).to(chosen.dtype)}
        self.measurements |= {f"preference/{name}": each.detach().mean() for name, each in told.items()}
        return preference_loss(chosen, rejected, form=self.config.form, beta=self.config.beta)

    def _log_ratios(self, answered: dict[int, Tensor], part: Batch, number: int) -> Float[Tensor, "samples 2"]:
        """Log-probabilities of the good and of the worse answers, of the student less those of the teacher."""
        ours, theirs = [], []
        for which in ("chosen", "rejected"):
            asked = replace(part, inputs={role: _answering(each, which) for role, each in part.inputs.items()})
            student = self.student(asked.inputs["student"].to(self.device, True), self.student_needs)
            ours.append(_log_probs(student, len(part)))
            if number not in answered:  # the backward pass would ask the teacher again
                teacher = self.read_teacher(asked)
                assert teacher is not None
                with torch.no_grad():
                    theirs.append(_log_probs(teacher, len(part)))
        if number not in answered:
            answered[number] = torch.stack(theirs, -1)
        return torch.stack(ours, -1) - answered[number]


def _answering(inputs: Input, which: str) -> ChatInput:
    """The same prompts, with the good or the worse last answer alone to be read.

    Raises:
        ValueError: a dialogue has no worse answer.
    """
    assert isinstance(inputs, ChatInput)
    if not inputs.rejected or not all(inputs.rejected):
        raise ValueError("a dialogue of the batch has no worse answer: set pairs=True of the `Prompting` that makes it")
    return inputs.with_answers(inputs.answers() if which == "chosen" else inputs.rejected)


def _log_probs(features: TokenFeatures, number: int) -> Float[Tensor, " samples"]:
    assert features.head is not None
    rows = features.hidden["answer"]
    return sums_by_sample(target_log_probs(rows.values, features.head, features.targets), rows.sample, number)

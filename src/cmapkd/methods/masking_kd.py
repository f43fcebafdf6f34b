"""Masking-KD, Hide to See (arXiv:2605.11651): the student may not look at the reasoning that it attends to most.

Behind each token of an answer the student follows its teacher, who sees everything. What the student attends to most in
the answer so far is hidden from it, so it must look at the picture. Departures: docs/methods/masking_kd.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from cmapkd.config import ConfigError
from cmapkd.data.random import uniforms
from cmapkd.data.types import Batch
from cmapkd.features.gather import mean_over_processes
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.generative import Counted, GenerativeMethod
from cmapkd.methods.masking_config import MaskingKDConfig
from cmapkd.methods.micro_batches import encode_checkpointed, micro_batches
from cmapkd.methods.stages import StageConfig
from cmapkd.methods.terms import Term
from cmapkd.models import FrozenTeacher
from cmapkd.models.base import eval_mode
from cmapkd.models.generative import GenerativeModel
from cmapkd.models.tap_attention import MEAN
from cmapkd.models.token_types import TokenFeatures, TokenNeeds
from cmapkd.objectives.chunks import by_rows
from cmapkd.objectives.hidden_prefix import as_many, hidden_keys, hidden_shares
from cmapkd.objectives.tokens import TokenDivergence
from cmapkd.objectives.vocabulary import chunk_of_tokens

Answered = tuple[TokenFeatures | None, Tensor | None, Tensor | None]
"""Of a part of the batch: what the teacher says, what is hidden from the student, and how much that is."""


class MaskingKD(GenerativeMethod):
    """A divergence from the teacher, of a student that may not look back at what it attends to most."""

    Config: ClassVar[type[MethodConfig]] = MaskingKDConfig
    card: ClassVar[MethodCard] = MethodCard(
        title="Masking-KD (Hide to See): reasoning that is attended to most is hidden from the student",
        paper="Seonghoon Yu et al. 2026, arXiv:2605.11651",
        equations=(
            "A: the student's attention, mean over heads and layers; q_i, p_i: next tokens of student and teacher",
            "u_i = −log(T² KL(q_i ‖ p_i) + 1e-6), τ_i = 0.3 + 0.2 σ((u_i − mean u) / s), the mean over a dialogue",
            "hidden from i: the fewest earlier answer tokens j < i − 1 of most A_ij that have τ_i of Σ_j A_ij",
            "at most 0.3 of these tokens, at least one; where Σ_j A_ij < 0.1 a tenth of them",
            "L = answers_weight CE + distill_weight T² KL(q'_i ‖ p_i), q': of the student under this mask",
        ),
        needs="final states of the answers' tokens of both models, which must have one vocabulary; attention maps of "
        "the student; answers of several tokens; no cache",
        trainable="the student",
        departures=(
            "The mean of u is over tokens that predict one. Released: also over the end of the answer.",
            "Sums over tokens are divided once, over all micro-batches and processes.",
            "Attention is read, and keys are hidden, inside the attention function, so positions stay as they are.",
            "Traces are the data's answers. Whether they are right is for who makes the data.",
        ),
        checked_against="the steps in plain loops; the released _compute_tau and _build_mask "
        "(tests/methods/fixtures/masking_kd.json)",
    )
    config: MaskingKDConfig

    def __init__(
        self, config: MaskingKDConfig, *, student: GenerativeModel, teacher: FrozenTeacher | None = None
    ) -> None:
        super().__init__(config, student=student, teacher=teacher)
        self.config, self.not_cached = config, config.not_cached
        self.weights = {"answers": config.answers_weight, "distillation": config.distill_weight}
        self.divergence = TokenDivergence(config.divergence, temperature=config.temperature)
        if student.attention_heads is None and config.hide != "nothing":
            raise ConfigError(
                f"keys cannot be hidden from {student.name}, because it computes attention by "
                f"{student.attention or 'means of its own'}: load it with sdpa, or set method.hide=nothing"
            )

    def why_not_again(self, stages: Sequence[StageConfig]) -> str | None:
        if self.config.hide != "nothing":
            return "it hides keys while a layer computes: set method.hide=nothing, or a micro_batch"
        return super().why_not_again(stages)

    def terms(self, batch: Batch) -> dict[str, Term]:
        answered: dict[int, Answered] = {}  # kept between the passes
        self.measurements = {}
        parts = micro_batches(batch, self.micro_batch)
        terms = self.summed(encode_checkpointed(partial(self._read, answered), parts, model=self))
        if counts := [each for _, _, each in answered.values() if each is not None]:
            chosen, eligible = mean_over_processes(torch.stack(counts).sum(0)).unbind()
            self.measurements["hidden"] = chosen / eligible.clamp(min=1e-9)
        return terms

    def _read(self, answered: dict[int, Answered], part: Batch, number: int) -> dict[str, Counted]:
        if number not in answered:
            teacher = self.read_teacher(part) if self.wants("distillation") else None
            hides = teacher is not None and self.config.hide != "nothing"
            answered[number] = (teacher, *(self._hidden(part, teacher) if hides else (None, None)))  # type: ignore[arg-type]
        teacher, hidden, _ = answered[number]
        student = self.student(part.inputs["student"].to(self.device, True), TokenNeeds(hidden=hidden))
        return self.sums(part, student, teacher)

    def sums(self, part: Batch, student: TokenFeatures, teacher: TokenFeatures | None) -> dict[str, Counted]:
        weighed = self.weigh(part, student.hidden["answer"])
        return self.losses(student, weighed, teacher=teacher, divergence=self.divergence, soft=weighed)

    @torch.no_grad()
    def _hidden(self, part: Batch, teacher: TokenFeatures) -> tuple[Bool[Tensor, "batch length length"], Tensor]:
        """What the student may not attend to, by its own attention and distance from the teacher without a mask.

        Also how many keys are hidden, and how many could be.
        """
        inputs, config = self.dialogues(part).to(self.device, True), self.config
        with eval_mode(self.student):
            student = self.student(inputs, TokenNeeds(attention_mean=True))
        torch.clear_autocast_cache()  # else the pass that learns would find weights cast without a gradient
        self._check_lengths(student, teacher)
        rows, batch, length = student.hidden["answer"], *inputs.texts.ids.shape
        places = torch.arange(length, device=self.device)
        begins = inputs.answer & ~F.pad(inputs.answer, (1, 0))[:, :-1]
        number = begins.cumsum(-1)  # of the answer, in a dialogue of several
        said = inputs.answer[rows.sample, rows.place]  # queries in an answer: the first token stands behind the prompt
        same = (number[rows.sample] == number[rows.sample, rows.place][:, None]) & said[:, None]
        eligible = inputs.answer[rows.sample] & (places < rows.place[:, None] - 1) & same
        owner = torch.where(said, rows.sample, batch)
        shares = hidden_shares(
            self._distances(student, teacher),
            owner,
            batch + 1,
            least=config.least,
            most=config.most,
            scale=config.scale,
        )
        attention = student.attention[MEAN][rows.sample, rows.place]
        how = {"budget": config.budget, "fallback": config.fallback, "low": config.low}
        chosen = hidden_keys(attention, eligible, shares, **how)
        if config.hide == "random":
            chosen = as_many(chosen, eligible, self._drawn(part).to(self.device, non_blocking=True))
        hidden = torch.zeros(batch, length, length, dtype=torch.bool, device=self.device)
        counts = torch.stack([chosen.sum(), eligible.sum()]).double()
        return hidden.index_put((rows.sample, rows.place), chosen), counts

    def _drawn(self, part: Batch) -> Float[Tensor, "rows length"]:
        """A number for each place of a dialogue, and each token of its answers: of the step and the sample alone."""
        inputs, drawn = self.dialogues(part), []
        for sample_id, said, real in zip(part.ids, inputs.answer, inputs.texts.mask, strict=True):
            shape = int(said.sum()), int(real.sum())
            numbers = uniforms(shape[0] * shape[1], "hidden", self.step.seed, self.step.step, sample_id)
            drawn.append(F.pad(torch.from_numpy(numbers).view(shape).float(), (0, len(real) - shape[1])))
        return torch.cat(drawn)

    def _distances(self, student: TokenFeatures, teacher: TokenFeatures) -> Float[Tensor, " rows"]:
        """T² KL(q ‖ p) of every token of an answer."""
        assert student.head is not None
        own, judged = self.shared(student.head), self.teacher_head(teacher)
        reverse = TokenDivergence("reverse", temperature=self.config.temperature)

        def of_rows(ours: Tensor, theirs: Tensor) -> Tensor:
            return reverse(own(ours), judged(theirs))

        size = chunk_of_tokens(len(student.targets), len(own.weight), None)
        return by_rows(of_rows, student.hidden["answer"].values, teacher.hidden["answer"].values, size=size)

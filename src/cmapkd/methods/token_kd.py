"""Distillation of next-token distributions, off and on the student's policy, under any of several divergences.

Many published methods are settings of this one: docs/generative.md lists them by the names that people know.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from cmapkd.config import ConfigError
from cmapkd.data.types import Batch
from cmapkd.methods.byte_alignment import AlignedConfig, ByteAlignment
from cmapkd.methods.byte_distance import ByteDistance
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.generative import Counted, GenerativeMethod, TopRequest
from cmapkd.methods.rollouts import OnPolicyConfig, followed
from cmapkd.models import FrozenTeacher
from cmapkd.models.generative import GenerativeModel
from cmapkd.models.shared_vocabulary import kept_of
from cmapkd.models.token_types import Rows, TokenFeatures
from cmapkd.objectives.tokens import TokenDivergence


class TokenKDConfig(AlignedConfig):
    """Which divergence, on whose answers, and what each term counts."""

    divergence: Literal["forward", "reverse", "jsd", "skew_forward", "skew_reverse", "tv", "sampled_reverse"] = Field(
        "forward", description="Between the teacher's and the student's next-token distributions."
    )
    temperature: float = Field(1.0, gt=0, description="Divides both models' logits; the term is times its square.")
    beta: float = Field(
        0.5, ge=0, le=1, description="jsd: weight of the teacher in the mixture; 0: forward, 1: reverse."
    )
    skew: float = Field(0.1, gt=0, lt=1, description="skew_*: how much of the first distribution is in the mixture.")
    answers_weight: float = Field(1.0, ge=0, description="Weight of the cross-entropy with the answers of the data.")
    distill_weight: float = Field(1.0, ge=0, description="Weight of the divergence.")
    top_k: int | None = Field(
        None,
        ge=1,
        description="Teacher's likeliest tokens that are read, the rest as one; none: all. A cache needs it.",
    )
    on_policy: OnPolicyConfig | None = Field(
        None, description="The student's own answers take the place of some; none: they never do. Or a share alone."
    )

    @property
    def not_cached(self) -> str | None:
        return None if self.on_policy is None else "the teacher judges answers that the student has just written"

    @field_validator("on_policy", mode="before")
    @classmethod
    def _share_alone(cls, value: Any) -> Any:
        return {"share": value} if isinstance(value, int | float) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _settings_are_read(self) -> TokenKDConfig:
        for name, readers in (("beta", ("jsd",)), ("skew", ("skew_forward", "skew_reverse"))):
            if self.divergence not in readers and self.changed(name):
                raise ValueError(f"{name} is read by divergence {' and '.join(readers)} alone: leave it out")
        self._alignment_is_read()
        if self.divergence != "sampled_reverse":
            return self
        if self.on_policy is None or not self.on_policy.share:
            raise ValueError("sampled_reverse is measured on tokens that the student has drawn: set on_policy")
        if self.top_k is not None:
            raise ValueError("sampled_reverse reads the teacher's probability of any token: leave top_k out")
        return self

    def _alignment_is_read(self) -> None:
        if not self.reads_bytes:
            return
        if self.divergence == "sampled_reverse" or self.on_policy is not None:
            raise ValueError(
                "alignment: bytes compares the answers of the data alone, which both models read in tokens of their "
                "own: leave on_policy out, and take another divergence than sampled_reverse"
            )
        if self.compare == "ranked" and self.divergence != "forward":
            raise ValueError("compare: ranked is a distance by itself and reads no divergence: leave divergence out")


class TokenKD(GenerativeMethod):
    """The student's distribution over the next token follows the teacher's, at every token of an answer."""

    Config: ClassVar[type[MethodConfig]] = TokenKDConfig
    card: ClassVar[MethodCard] = MethodCard(
        title="Distillation of next-token distributions",
        paper="Hinton et al. 2015, arXiv:1503.02531; Kim & Rush 2016, arXiv:1606.07947, section 3.1 (word level); "
        "Agarwal et al. 2024, arXiv:2306.13649 (on policy); Ko et al. 2024, arXiv:2402.03898 (skewed)",
        equations=(
            "p = σ(z_T/T), q = σ(z_S/T) over the tokens that both models have",
            "forward: KL(p ‖ q); reverse: KL(q ‖ p); tv: ½ Σ |p − q|",
            "jsd: β KL(p ‖ m) + (1−β) KL(q ‖ m), m = βp + (1−β)q",
            "skew_forward: KL(p ‖ λp + (1−λ)q); skew_reverse: KL(q ‖ (1−λ)p + λq)",
            "sampled_reverse: −(log p_y − sg log q_y) log q_y, y drawn by the student",
            "on_policy.gate: D of those answers of the student's own alone that are right",
            "alignment bytes: p, q over what stands for the same text where tokens of both begin at one byte",
            "L = answers_weight CE(y, q) + distill_weight T² D",
        ),
        needs="final states of the answers' tokens of both models, which must have one vocabulary, but for alignment "
        "bytes; prompts, image sizes and widths may differ",
        trainable="the student",
        departures=(
            "Sums over tokens are divided once, over all micro-batches and processes.",
            "Rows of a head that belong to no token are cut off in both models before any softmax.",
            "Tokens that one model alone has are cut off in the divergence, and not in the cross-entropy.",
            "Whether a sample's answer is the student's own is drawn for each sample, and not for each batch.",
            "Answers of the student's own have no cross-entropy.",
            "A gate (KEPO) asks for the words of the data's answer. Its reward of a format and GRPO are left out.",
            "alignment bytes: the cells of `compare: text` are of no paper. GOLD and ULD are `hybrid` and `ranked`.",
        ),
        checked_against="the sums written out, with gradients; TRL, TAID, LLaVA-KD, LLaVA-MoD and NeMo "
        "(tests/objectives/fixtures)",
    )

    config: TokenKDConfig
    aligned: ByteAlignment | None = None
    """How tokens of two tokenizers meet; None where they have one."""

    def __init__(
        self, config: TokenKDConfig, *, student: GenerativeModel, teacher: FrozenTeacher | None = None
    ) -> None:
        super().__init__(config, student=student, teacher=teacher)
        self.config = config
        self.weights = {"answers": config.answers_weight, "distillation": config.distill_weight}
        self.divergence = TokenDivergence(
            config.divergence, temperature=config.temperature, beta=config.beta, lam=config.skew
        )
        if self._by_rank:
            self.not_cached = f"compare: {config.compare} reads all of the teacher's probabilities"
        if config.not_cached is not None:
            self.not_cached = config.not_cached

    def relate(self, teacher: GenerativeModel) -> None:
        """Also tokens of two tokenizers by their bytes, where the config says so and one tokenizer is not enough."""
        if self.config.alignment == "ids":
            super().relate(teacher)
            return
        cut = kept_of(teacher.vocabulary, self.student.vocabulary) is not None  # any text has tokens of both then
        if self.config.compare != "ranked" and not cut:
            with suppress(ConfigError):
                super().relate(teacher)
                spoken = max(each.vocabulary.spoken for each in (teacher, self.student))
                if self.num_tokens is None or spoken <= self.num_tokens:  # of one tokenizer every token is a cell
                    return
                self.num_tokens = None
        self.aligned = ByteAlignment(teacher, self.student)

    @property
    def compares_tokens(self) -> bool:
        return super().compares_tokens and self.aligned is None

    @property
    def teacher_top(self) -> TopRequest | None:
        if self.config.top_k is None or self._by_rank:
            return None
        return TopRequest(self.config.top_k, self.config.temperature)

    @property
    def on_policy(self) -> OnPolicyConfig | None:
        return self.config.on_policy

    def sums(self, part: Batch, student: TokenFeatures, teacher: TokenFeatures | None) -> dict[str, Counted]:
        if self.aligned is not None:
            return self._aligned_sums(part, student, teacher, self.aligned)
        rows, given = student.hidden["answer"], self.given(part)
        hard = soft = self.weigh(part, rows, wanted=given)
        if given is not None:
            wanted = followed(part, self.device, own_alone=self.divergence.reads_targets)
            soft = self.weigh(part, rows, wanted=wanted)
        return self.losses(student, hard, teacher=teacher, divergence=self.divergence, soft=soft)

    @property
    def _by_rank(self) -> bool:
        return self.aligned is not None and self.config.compare != "text"

    def _aligned_sums(
        self, part: Batch, student: TokenFeatures, teacher: TokenFeatures | None, aligned: ByteAlignment
    ) -> dict[str, Counted]:
        """As `sums`, but the divergence is of groups of tokens, which count as tokens do."""
        rows = student.hidden["answer"]
        counted = self.losses(student, self.weigh(part, rows))
        if not self.wants("distillation"):
            return counted
        assert teacher is not None
        groups = aligned.groups(student.targets, teacher.targets)
        begin = groups.student.start
        weighed = self.weigh(part, Rows(rows.values[begin], rows.sample[begin], rows.place[begin]))
        distance = ByteDistance(self.config.compare, self.divergence, self.config.top_k)
        judged = teacher.targets, self.answered(teacher)
        value = distance.total(aligned, student, judged, groups, weights=weighed.rows)
        return counted | {"distillation": Counted(value, weighed.number)}

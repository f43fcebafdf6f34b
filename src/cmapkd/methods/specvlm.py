"""SpecVLM (Huang et al. 2025, arXiv:2509.11815): a small draft of a model that writes, for speculative decoding.

The loss is the paper's. The draft is not: an ordinary small model that writes, and no layer behind the teacher's own
states. `models/drafting.py` decodes with it. Departures: the card below and docs/methods/specvlm.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import nn

from cmapkd.config import ConfigError
from cmapkd.data.types import Batch
from cmapkd.methods.behind_terms import Made
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.generative import Counted
from cmapkd.methods.rollouts import followed
from cmapkd.methods.token_kd import TokenKD, TokenKDConfig
from cmapkd.models import FrozenTeacher
from cmapkd.models.drafting import why_other_tokens, why_state
from cmapkd.models.generative import GenerativeModel
from cmapkd.models.shared_words import take_words
from cmapkd.models.token_types import TokenFeatures
from cmapkd.objectives.embedding_targets import embedding_distance


class SpecVLMConfig(TokenKDConfig):
    """What each term counts; all else is as of token_kd."""

    answers_weight: float = Field(0.0, ge=0, description="Weight of the cross-entropy with the answers of the data.")
    distill_weight: float = Field(0.1, ge=0, description="Weight of the divergence.")
    features_weight: float = Field(
        1.0, ge=0, description="Weight of the smooth L1 distance of final states; with 0 a cache can serve the teacher."
    )
    words: Literal["own", "teacher"] = Field(
        "own",
        description="The draft's table of words and head. teacher: those of the teacher, which stay as they are, as "
        "published; both models are equally wide then.",
    )

    @property
    def not_cached(self) -> str | None:
        if self.features_weight:
            return "it reads the teacher's final states, which no cache holds, unless method.features_weight is 0"
        return super().not_cached

    @model_validator(mode="after")
    def _is_a_draft(self) -> SpecVLMConfig:
        if self.reads_bytes:
            raise ValueError(
                "alignment is bytes, and a draft proposes tokens that its teacher reads, so both have one tokenizer: "
                "leave it out"
            )
        if not (self.distill_weight or self.features_weight):
            raise ValueError("distill_weight and features_weight are 0, and what is left is sft: set method: sft")
        return self


class SpecVLM(TokenKD):
    """A draft's distributions and final states follow those of the teacher that it will write ahead of."""

    Config: ClassVar[type[MethodConfig]] = SpecVLMConfig
    of_teacher: ClassVar[frozenset[str]] = frozenset({"distillation", "features"})
    card: ClassVar[MethodCard] = MethodCard(
        title="SpecVLM: a draft for speculative decoding, by distributions and final states (a reconstruction)",
        paper="Huang et al. 2025, arXiv:2509.11815, equation 3",
        equations=(
            "p, q: next-token distributions of teacher and draft behind the tokens of an answer",
            "f_T, f_S: final states there, from which the heads make p and q; P a linear map, where widths differ",
            "features = mean over tokens and channels of SmoothL1(P f_S, f_T)",
            "L = 0.1 KL(p ‖ q) + 1.0 features + answers_weight CE(y, q), answers_weight 0",
        ),
        needs="as token_kd; a student that is smaller than its teacher and knows all of its tokens; no cache, unless "
        "features_weight is 0",
        trainable="the student, P (dropped); with words: teacher without its table of words and head",
        departures=(
            "A reconstruction: equation and weights are the paper's, its code was not found.",
            "The draft reads pictures and words itself. Published: one layer over the teacher's own states.",
            "The draft may have another width, and a table of words and a head of its own, which learn. Published: the "
            "teacher's, as with words: teacher.",
            "The divergence replaces the cross-entropy with the teacher: the same gradient, without its entropy.",
            "No compressor of visual tokens.",
        ),
        checked_against="the sums written out, with gradients; EAGLE's compute_loss, whose weights are the same "
        "(tests/methods/fixtures/specvlm.json)",
    )
    config: SpecVLMConfig

    def __init__(
        self, config: SpecVLMConfig, *, student: GenerativeModel, teacher: FrozenTeacher | None = None
    ) -> None:
        super().__init__(config, student=student, teacher=teacher)
        assert teacher is not None
        for each in (student, teacher.model):
            if (why := why_state(each)) is not None:
                raise ConfigError(f"the student is to be a draft of its teacher, and {why}")
        self.weights = {**self.weights, "features": config.features_weight}
        own, theirs = (_decoder_size(each) for each in (student, teacher.model))
        if own >= theirs:
            raise ConfigError(
                f"the student is to be a draft, and its language model has {own:,} parameters, the teacher's "
                f"{theirs:,}: a draft must be smaller, or it proposes no faster than the teacher writes. Name a "
                "student with fewer layers, or method token_kd"
            )
        if config.words == "teacher":
            self._take_words(student, teacher.model)
        width, to = (each.text_levels[-1].width for each in (student, teacher.model))
        self.project = nn.Linear(width, to) if config.features_weight and width != to else None

    @staticmethod
    def _take_words(student: GenerativeModel, teacher: GenerativeModel) -> None:
        try:
            taken = take_words(student, teacher)
        except ConfigError as error:
            raise ConfigError(f"method.words: teacher cannot be had: {error}. Set method.words=own") from None
        for name in taken:
            student.get_parameter(name).requires_grad_(False)

    def relate(self, teacher: GenerativeModel) -> None:
        """Refuses a student that does not know all tokens of its teacher."""
        super().relate(teacher)
        if (why := why_other_tokens(teacher.vocabulary, self.student.vocabulary)) is not None:
            raise ConfigError(f"the student cannot be a draft of {teacher.name}: {why}")

    @property
    def made_of(self) -> Mapping[str, Made]:
        return {"features": "states"}

    def sums(self, part: Batch, student: TokenFeatures, teacher: TokenFeatures | None) -> dict[str, Counted]:
        counted = super().sums(part, student, teacher)
        if self.wants("features"):
            assert teacher is not None
            counted["features"] = self._features(part, student, teacher)
        return counted

    def _features(self, part: Batch, student: TokenFeatures, teacher: TokenFeatures) -> Counted:
        self._check_lengths(student, teacher)
        rows, theirs = student.hidden["answer"], teacher.hidden["answer"].values
        own = rows.values if self.project is None else self.project(rows.values)
        distances = embedding_distance(own[:, None], theirs[:, None])
        wanted = followed(part, self.device, own_alone=self.divergence.reads_targets)
        weighed = self.weigh(part, rows, wanted=wanted)
        total = distances.sum() if weighed.rows is None else (distances * weighed.rows).sum()
        return Counted(total, weighed.number)


def _decoder_size(model: GenerativeModel) -> int:
    """Parameters of the language model, which every written token costs."""
    sizes = dict(model.named_parameters())
    return sum(sizes[name].numel() for name in model.parts["language"])

"""Switch-KD (Sun et al., CVPR 2026 Findings, arXiv:2604.14629): differences of logits, and a switch of vision towers.

The teacher's language model is fed with what the student sees. The further it then is from itself, the more the student
learns to see. Training code is not published: the switch is a reconstruction of the project's figure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.data.types import Batch
from cmapkd.features.visual_grid import resampled, resampled_rows
from cmapkd.methods.behind_terms import Made
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.generative import Counted, GenerativeConfig, GenerativeMethod, Weighed
from cmapkd.models import FrozenTeacher
from cmapkd.models.generative import GenerativeModel
from cmapkd.models.token_types import EncodedShape, Seen, TokenFeatures, TokenNeeds
from cmapkd.objectives.chunks import by_rows
from cmapkd.objectives.logit_differences import PairDivergence, logit_differences
from cmapkd.objectives.vocabulary import Head, chunk_of_tokens


class SwitchKDConfig(GenerativeConfig):
    """Where the switch stands, which logits are compared, and what each term counts."""

    switch: Literal["vision", "projector"] = Field(
        "vision",
        description="What the teacher takes of the student. vision: its tower's tokens, through the teacher's own "
        "projector; projector: its projected tokens.",
    )
    top_k: int | None = Field(
        None, ge=2, le=64, description="Logits of a token that are compared; none: up to the knee of their curve."
    )
    candidates: int = Field(64, ge=2, le=64, description="Largest logits among which the knee is sought.")
    temperature: float = Field(3.0, gt=0, description="Divides differences of logits. No square multiplies the terms.")
    divergence: PairDivergence = Field("reverse", description="reverse: as in DBiLD; forward: as in BiLD.")
    answers_weight: float = Field(1.0, ge=0, description="Weight of the cross-entropy with the answers of the data.")
    distill_weight: float = Field(1.0, ge=0, description="Weight of the student's differences to the teacher's.")
    visual_weight: float = Field(1.0, ge=0, description="Weight of the same for the teacher that sees as the student.")

    @model_validator(mode="after")
    def _settings_are_read(self) -> SwitchKDConfig:
        if not (self.distill_weight or self.visual_weight):
            raise ValueError("distill_weight and visual_weight are 0, and what is left is sft: set method: sft")
        if self.top_k is not None and self.changed("candidates"):
            raise ValueError(
                f"candidates ({self.candidates}) is read where a knee is sought, and top_k ({self.top_k}) says how "
                "many logits are compared: leave one of the two out"
            )
        if not self.visual_weight and self.changed("switch"):
            raise ValueError(f"visual_weight is 0, so nothing is switched: leave switch ({self.switch}) out")
        return self

    @property
    def not_cached(self) -> str | None:
        return (
            "it reads the teacher's logits at the student's likeliest tokens, and asks it with the student's pictures"
        )


class SwitchKD(GenerativeMethod):
    """The student's largest logits differ as the teacher's, and the teacher with the student's eyes says the same."""

    Config: ClassVar[type[MethodConfig]] = SwitchKDConfig
    of_teacher: ClassVar[frozenset[str]] = frozenset({"distillation", "visual_switch"})
    card: ClassVar[MethodCard] = MethodCard(
        title="Switch-KD, its visual switch a reconstruction",
        paper="Sun et al., CVPR 2026 Findings, arXiv:2604.14629; BiLD: Li et al. 2024, arXiv:2406.13555",
        equations=(
            "d_ij = (z_i − z_j) / T, i < j among the k largest logits of a leader, in falling order",
            "k of each token: Kneedle's knee of its 64 largest logits",
            "D(z, z_T) = KL(σ(d(z)) ‖ σ(d(z_T))) led by z_T + the same led by z",
            "z_sw: logits of the teacher, whose projector is given the student's visual tokens",
            "L = answers_weight CE(y, q) + distill_weight D(z_S, z_T) + visual_weight D(z_sw, z_T)",
        ),
        needs="final states of the answers' tokens of both models, which must have one vocabulary; the vision tower's "
        "tokens of both, or the projector's; no cache",
        trainable="the student, one linear map where widths of visual tokens differ (dropped)",
        departures=(
            "The switch stands where the project's figure shows it. Its loss and gradient are our reading of it: "
            "z_sw is compared with the teacher's own logits alone, and the student's logits never with z_sw.",
            "Weights, temperature and the number of candidates are not published: 1 each, BiLD's 3, and 64.",
            "A linear map joins visual tokens of two widths. Grids of two sizes are resampled.",
            "Sums over tokens are divided once, over all micro-batches and processes.",
        ),
        checked_against="the formulas in plain loops; bild_loss of the published BiLD "
        "(tests/methods/fixtures/switch_kd.json); no training code of Switch-KD is published",
    )
    config: SwitchKDConfig

    def __init__(
        self, config: SwitchKDConfig, *, student: GenerativeModel, teacher: FrozenTeacher | None = None
    ) -> None:
        super().__init__(config, student=student, teacher=teacher)
        self.config = config
        soft = {"distillation": config.distill_weight, "visual_switch": config.visual_weight}
        self.weights = {"answers": config.answers_weight} | soft
        self.not_cached = config.not_cached
        assert teacher is not None  # `uses_teacher`
        own, other = (self._shape_of(model) for model in (student, teacher.model))
        self.tokens = other.tokens
        same = own.width == other.width or not config.visual_weight
        self.adapter: nn.Module = nn.Identity() if same else nn.Linear(own.width, other.width)

    @property
    def student_needs(self) -> TokenNeeds:
        if not self.wants("visual_switch"):
            return TokenNeeds()
        at_tower = self.config.switch == "vision"
        return TokenNeeds(encoded=at_tower, projected=not at_tower)

    @property
    def made_of(self) -> Mapping[str, Made]:
        return {"visual_switch": "encoded" if self.config.switch == "vision" else "projected"}

    def sums(self, part: Batch, student: TokenFeatures, teacher: TokenFeatures | None) -> dict[str, Counted]:
        weighed = self.weigh(part, student.hidden["answer"])
        terms = self.losses(student, weighed)
        if teacher is None:
            return terms
        self._check_lengths(student, teacher)
        states, head = self.answered(teacher)
        if self.wants("distillation"):
            assert student.head is not None
            ours = student.hidden["answer"].values, self.shared(student.head)
            terms["distillation"] = self._differences(ours, (states, head), weighed)
        if self.wants("visual_switch"):
            switched = self._switched(part, student).hidden["answer"].values
            terms["visual_switch"] = self._differences((switched, head), (states, head), weighed)
        return terms

    def _switched(self, part: Batch, student: TokenFeatures) -> TokenFeatures:
        """The teacher's features, with a gradient to what the student sees."""
        assert self.teacher is not None
        model: GenerativeModel = self.teacher.model
        inputs = self.dialogues(part, self.teacher.reads).to(self.device, True)
        if student.projected is not None:
            seen = replace(student.projected, values=self.adapter(student.projected.values))
            return model.forward_seeing(inputs, Seen(resampled_rows(seen, inputs.visual)))
        if student.encoded is None:  # no dialogue shows a picture
            return model.forward(inputs)
        tokens = resampled(self.adapter(student.encoded), self.tokens)
        return model.forward_seeing(inputs, model.project(inputs, tokens))

    def _differences(self, ours: tuple[Tensor, Any], theirs: tuple[Tensor, Any], weighed: Weighed) -> Counted:
        """The sum over rows of both terms, led by the one and by the other.

        Args:
            ours, theirs: states of the answers' tokens, and their head.
        """
        (rows, head), (judged, other) = ours, theirs
        size = chunk_of_tokens(len(rows), max(len(head.weight), self.config.candidates**2), None)
        values = by_rows(partial(self._of_rows, head, other), rows, judged, size=size)
        return Counted((values if weighed.rows is None else values * weighed.rows).sum(), weighed.number)

    def _of_rows(self, head: Head, other: Head, rows: Tensor, judged: Tensor) -> Float[Tensor, " rows"]:
        config, logits = self.config, (head(rows), other(judged))  # type: ignore[operator]
        how = config.model_dump(include={"top_k", "candidates", "temperature", "divergence"})
        led_by_teacher = logit_differences(*logits, leader="teacher", **how)
        return led_by_teacher + logit_differences(*logits, leader="student", **how)

    def _shape_of(self, model: GenerativeModel) -> EncodedShape:
        """What the switch takes of a model, or puts into it; of projected tokens the number is not known beforehand.

        Raises:
            ConfigError: the switch cannot stand there in this model.
        """
        if not self.config.visual_weight:
            return EncodedShape(0, 0)
        if self.config.switch == "projector":
            if model.num_deeper and model is not self.student:
                raise ConfigError(
                    f"{model.name} feeds further outputs of its vision tower to its first layers, which a student's "
                    "projected tokens do not replace: take another teacher, or set method.visual_weight=0"
                )
            return EncodedShape(0, model.image_levels[-1].width)
        shape = model.encoded_shape
        if shape is None:
            raise ConfigError(
                f"the projector of {model.name} reads patches of all pictures in one row, where those of no other "
                "tower can stand: set method.switch=projector, or method.visual_weight=0"
            )
        return shape

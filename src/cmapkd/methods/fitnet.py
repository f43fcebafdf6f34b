"""FitNets for dual encoders (Romero et al., ICLR 2015, arXiv:1412.6550): a hint for the lower half, then distillation.

No published code of the authors could be read; the one-stage form is mdistiller's. Departures: the card below.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal, Self

from jaxtyping import Float
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from cmapkd.data.types import Batch
from cmapkd.features.level_pairs import LevelPairs, Places
from cmapkd.features.taps import Layer
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.dual import DualEncoderMethod, task_loss
from cmapkd.methods.in_batch import similarity_loss
from cmapkd.methods.stages import StageConfig
from cmapkd.methods.terms import Term
from cmapkd.models import DualEncoder, Features, FrozenTeacher, LevelRequest
from cmapkd.models.reach import example_output, parameters_behind
from cmapkd.models.types import Tower
from cmapkd.objectives import hint_distance, level_distance

PUBLISHED_LAMBDA = (4 / 9, 1 / 9)  # 4 to 1 on the divergence at temperature 3 without the factor of 3² that ours has


class FitNetConfig(MethodConfig):
    """Which layers are compared, in what form, and what each term counts."""

    form: Literal["two_stage", "one_stage"] = Field(
        "two_stage",
        description="two_stage: the hint alone trains the lower layers, then the whole student is distilled; "
        "one_stage: task loss and hint together, without distillation of logits, as in mdistiller.",
    )
    guided_layer: Layer = Field(
        0.5, description="The student's image level that is guided: its name (blocks.3), or a share of the depth."
    )
    hint_layer: Layer = Field(0.5, description="The teacher's image level that guides it, likewise.")
    text_guided_layer: Layer | None = Field(
        None, description="Likewise in the text tower; none: it has no hint and is left alone in the hint stage."
    )
    text_hint_layer: Layer | None = Field(None, description="The teacher's text level that guides it.")
    standardise: bool = Field(
        False, description="Compare features whose channels are standardised at each place, instead of as they are."
    )
    hint_weight: float | None = Field(
        None,
        ge=0,
        description="Weight of the mean squared distance; none: 0.5 in two stages, 100 in one, as published.",
    )
    hint_share: float = Field(0.3, gt=0, lt=1, description="Share of the steps that the hint stage takes.")
    task_weight: float = Field(1.0, ge=0, description="Weight of the student's own contrastive loss.")
    distill_weight: float | tuple[float, float] = Field(
        PUBLISHED_LAMBDA,
        description="Weight of the KL of in-batch similarities; two numbers: linear from the first to the second over "
        "the stage. Published: 4 to 1 without the squared temperature, here 4/9 to 1/9.",
    )
    temperature: float = Field(3.0, gt=0, description="Divides both models' logits on top of their own logit scales.")

    @field_validator("distill_weight")
    @classmethod
    def _not_negative(cls, value: Any) -> Any:
        if min(value if isinstance(value, tuple) else (value,)) < 0:
            raise ValueError(f"weights are not negative, got {value}")
        return value

    @model_validator(mode="after")
    def _both_text_layers(self) -> Self:
        if (self.text_guided_layer is None) != (self.text_hint_layer is None):
            raise ValueError("give text_guided_layer and text_hint_layer both, or neither")
        return self

    def layers(self) -> dict[Tower, tuple[str | float, str | float]]:
        """The student's level and the teacher's of each tower that has a hint."""
        layers: dict[Tower, tuple[str | float, str | float]] = {"image": (self.guided_layer, self.hint_layer)}
        if self.text_guided_layer is not None and self.text_hint_layer is not None:
            layers["text"] = self.text_guided_layer, self.text_hint_layer
        return layers

    def weight_of_hint(self) -> float:
        if self.hint_weight is None:
            return 0.5 if self.form == "two_stage" else 100.0
        return self.hint_weight

    def distilled(self) -> tuple[float, float]:
        """Weight of the KL at the beginning and at the end of its stage."""
        if self.form == "one_stage":
            return 0.0, 0.0
        weight = self.distill_weight
        return weight if isinstance(weight, tuple) else (weight, weight)


class FitNet(DualEncoderMethod):
    """The teacher's middle layer teaches the student's to begin with, through a regressor that is thrown away."""

    Config: ClassVar[type[MethodConfig]] = FitNetConfig
    steady = True
    card: ClassVar[MethodCard] = MethodCard(
        title="FitNets: a hint for a middle layer, then distillation",
        paper="Romero et al., ICLR 2015, arXiv:1412.6550; in-batch logits as in method hinton",
        equations=(
            "L_HT = 1/2 mean |r(f_S) - f_T|² over places and channels, r a linear map of the channels",
            "stage 1: L_HT trains r and the student's layers up to f_S; the others stay bit for bit as they are",
            "stage 2: L_contrastive + λ T²/2 [KL(σ(Z_T/T) ‖ σ(Z_S/T)) + the transposed], λ from 4/T² to 1/T², T = 3",
            "one_stage: L_contrastive + 100 mean |r(f_S) - f_T|²",
            "L = what the stage has of hint_weight L_hint + task_weight L_contrastive + λ L_KD",
        ),
        needs="one level of both image towers, and of both text towers if asked for; embeddings, logit scales",
        trainable="the student, one linear map a level (not in the student that is saved)",
        departures=(
            "A reconstruction: the paper's own code could not be read. Its classes are the pairs of the batch here.",
            "r is a linear map at every place, for maps and tokens alike, and the teacher's level is resampled to the "
            "student's grid; the paper and mdistiller choose a convolution by the two sizes.",
            "mdistiller's r ends in batch norm and ReLU. Both are left out: a ReLU cannot reach a negative feature, as "
            "transformers have them, and a batch norm makes the loss depend on how a batch is shared out.",
            "The distance is a mean over places and channels; the paper's sum differs by a constant, which AdamW does "
            "not see where the hint is alone.",
            "λ is stated for a KL with the squared temperature, which the paper's has not.",
        ),
        checked_against="mdistiller's FitNet with a 1 x 1 regressor (value and gradients of the hint, its norm and "
        "ReLU off), tests/methods/fixtures/fitnet.json; the formulas written out",
    )

    def __init__(self, config: FitNetConfig, *, student: DualEncoder, teacher: FrozenTeacher | None = None) -> None:
        super().__init__(config, student=student, teacher=teacher)
        assert teacher is not None
        self.config = config
        self.weights = {
            "hint": config.weight_of_hint(),
            "contrastive": config.task_weight,
            "similarity": max(config.distilled()),
        }
        self.levels = LevelPairs(student, teacher.model, config.layers())
        self.regress = nn.ModuleDict({tower: nn.Linear(*self.levels.widths(tower)) for tower in config.layers()})
        behind = [
            parameters_behind(student, partial(example_output, student, tower, level.name))
            for tower, level in self.levels.student.items()
        ]
        self._guided_part = frozenset[str]().union(*behind)

    @property
    def student_parts(self) -> Mapping[str, frozenset[str]]:
        """The student's own parts, and `guided`: the layers up to the guided ones."""
        return {**super().student_parts, "guided": self._guided_part}

    @property
    def default_stages(self) -> tuple[StageConfig, ...]:
        if self.config.form == "one_stage":
            return ()
        share = self.config.hint_share
        rest = tuple(name for name in self.all_term_names if name != "hint")
        return (
            StageConfig(name="hint", share=share, terms=("hint",), train=("guided", "modules", "weighting")),
            StageConfig(name="distil", share=1 - share, terms=rest),  # without its term the regressor rests
        )

    @property
    def matches_words(self) -> bool:
        return "text" in self.levels.student

    @property
    def student_needs(self) -> LevelRequest:
        return self.levels.needs("student") if self.wants("hint") else LevelRequest()

    @property
    def teacher_needs(self) -> LevelRequest:
        return self.levels.needs("teacher") if self.wants("hint") else LevelRequest()

    def terms(self, batch: Batch) -> dict[str, Term]:
        student, teacher, rows = self.encode_both(batch, self._distances)
        values: dict[str, Tensor] = {}
        if self.wants("hint"):
            towers = [rows[tower].mean() for tower in self.levels.student]
            values["hint"] = sum(towers[1:], towers[0])
        if self.wants("contrastive"):
            values["contrastive"] = task_loss(student)
        terms = self.weighted(values)
        if self.wants("similarity"):
            similarity = similarity_loss(student, teacher, temperature=self.config.temperature)
            start, end = self.config.distilled()
            terms["similarity"] = Term(similarity, start + (end - start) * self.step.progress)
        return terms

    def _distances(self, part: Batch, student: Features, teacher: Features) -> dict[str, Float[Tensor, " batch"]]:
        """How far each sample's guided levels are from their hints, by tower; of this process's samples alone."""
        if not self.wants("hint"):
            return {}
        places: dict[Tower, Places] = {"image": self.levels.cells(student, teacher)}
        if self.matches_words:
            places["text"] = self.levels.words(part, student, teacher)
        distance = level_distance if self.config.standardise else hint_distance
        return {tower: distance(self.regress[tower](ours), hint, mask) for tower, (ours, hint, mask) in places.items()}

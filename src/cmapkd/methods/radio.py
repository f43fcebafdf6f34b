"""Agglomerative distillation in RADIO's style: several teachers of any width, balanced by their angular dispersion.

Ranzinger et al., AM-RADIO (CVPR 2024, arXiv:2312.06709) and C-RADIOv4 (arXiv:2601.17237). The training code is not
published. Departures: the card below and docs/methods/radio.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from cmapkd.config import ConfigError, closest
from cmapkd.data.types import Batch
from cmapkd.features import Adapter
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.dispersion import SMALLEST, Dispersion
from cmapkd.methods.dual import DualEncoderMethod, task_loss
from cmapkd.methods.terms import Term
from cmapkd.models import DualEncoder, Features, FrozenTeacher, LevelRequest
from cmapkd.models.types import Tower
from cmapkd.objectives import feature_distance, squared_angle
from cmapkd.objectives.angle import angular_dispersion


class RadioConfig(MethodConfig):
    """What each term counts, and how teachers of different spread are balanced."""

    task_weight: float = Field(
        1.0, ge=0, description="Weight of the student's own contrastive loss, which trains its own joint space."
    )
    image_weight: float = Field(1.0, ge=0, description="Weight of every teacher's images.")
    text_weight: float = Field(1.0, ge=0, description="Weight of the texts of every teacher that has a text tower.")
    teacher_weights: dict[str, float] = Field(
        default_factory=dict, description="Factors by a teacher's name in the run; of those not named 1, as published."
    )
    distance: Literal["balanced", "angle", "cosine"] = Field(
        "balanced",
        description="balanced: the squared angle over the teacher's dispersion; angle: without it; cosine: 1 - cos, as "
        "RADIO before its fourth version.",
    )
    dispersion: Literal["run", "cache"] = Field(
        "run",
        description="run: of the answers of the first dispersion_steps steps; cache: of dispersion_pairs answers of "
        "the cache, before the first step.",
    )
    dispersion_steps: int = Field(
        100, ge=1, description="Steps with the term after which the dispersions found by a run stay."
    )
    dispersion_pairs: int = Field(4096, ge=2, description="Pairs drawn from each teacher's cache.")
    hidden: int | None = Field(
        None, ge=1, description="Units inside the adapters; none: the larger of the student's and teacher's widths."
    )

    @model_validator(mode="after")
    def _cache_for_what_is_balanced(self) -> Self:
        if self.dispersion == "cache" and self.distance != "balanced":
            raise ValueError(
                f"dispersion: cache is for distance: balanced, and distance is {self.distance}: leave it out"
            )
        return self


class Radio(DualEncoderMethod):
    """Behind an adapter for each teacher and tower, the student's embeddings point where the teacher's do."""

    Config: ClassVar[type[MethodConfig]] = RadioConfig
    several_teachers: ClassVar[bool] = True
    pictures_alone: ClassVar[bool] = True
    steady = True
    card: ClassVar[MethodCard] = MethodCard(
        title="Agglomerative distillation of several teachers, RADIO style, with angle balancing (a reconstruction)",
        paper="Ranzinger et al., AM-RADIO, CVPR 2024, arXiv:2312.06709; C-RADIOv4, 2026, arXiv:2601.17237",
        equations=(
            "k: a teacher; m: image or text; y its embedding; x = A_k,m(e_S) the student's behind its adapter",
            "A(e) = W2 GELU(LN(W1 e)), plus e where the widths agree",
            "Θ(x, y) = arccos cos(x, y); μ = E[y]/|E[y]|; Disp_k,m = E[Θ(y, μ)²] over the teacher's answers",
            "L_k,m = mean Θ(x, y)² / Disp_k,m",
            "L = task_weight L_contrastive + Σ_k w_k (image_weight L_k,image + text_weight L_k,text)",
        ),
        needs="embeddings of one or more teachers of any widths; further teachers may have an image tower alone",
        trainable="the student and an adapter for each teacher and tower (dropped)",
        departures=(
            "Texts of teachers that have a text tower are distilled as images are. Published: images alone.",
            "A contrastive loss trains the student's own joint space. Published: the student has none.",
            "y is a unit vector in the mean direction.",
            "Dispersions are of the first steps of the run, or of the cache; published: of the training data, before.",
            "Of RADIO's losses the one of summaries alone: no dense features, one resolution, no shift equivariance, "
            "no noise on weights (DAMP, MESA), no PHI-S.",
            "Adapters are as wide inside as the larger of both widths; the published width is not known.",
        ),
        checked_against="the formula in loops and in float64 by arccos; no training code is published",
    )

    def __init__(
        self,
        config: RadioConfig,
        *,
        student: DualEncoder,
        teacher: FrozenTeacher | None = None,
        more_teachers: Sequence[FrozenTeacher] = (),
    ) -> None:
        super().__init__(config, student=student, teacher=teacher, more_teachers=more_teachers)
        self.config = config
        for role in config.teacher_weights:
            if role not in self.teachers:
                raise ConfigError(
                    f"method.teacher_weights names {role!r}{closest(role, self.teachers)}, and the teachers are "
                    f"{', '.join(self.teachers)}"
                )
            if config.teacher_weights[role] < 0:
                raise ConfigError(f"method.teacher_weights.{role} is {config.teacher_weights[role]:g}: give 0 or more")
        self.of_term = {f"{role}_{tower}": (role, tower) for role, tower in self._compared()}
        sizes = {name: self.teachers[role].embed_dim for name, (role, _) in self.of_term.items()}
        self.adapters = nn.ModuleDict(
            {name: Adapter(student.embed_dim, to, hidden=config.hidden) for name, to in sizes.items()}
        )
        balanced = config.distance == "balanced"
        self.dispersions = nn.ModuleDict({name: Dispersion(to) for name, to in sizes.items() if balanced})
        self._drawn = False

    def _compared(self) -> list[tuple[str, Tower]]:
        """The teachers and towers whose terms count."""
        weights: dict[Tower, float] = {"image": self.config.image_weight, "text": self.config.text_weight}
        return [
            (role, tower)
            for role, teacher in self.teachers.items()
            for tower, weight in weights.items()
            if tower in teacher.model.towers and weight * self.config.teacher_weights.get(role, 1.0)
        ]

    def _weight(self, role: str, tower: Tower) -> float:
        of_tower = self.config.image_weight if tower == "image" else self.config.text_weight
        return of_tower * self.config.teacher_weights.get(role, 1.0)

    @property
    def term_names(self) -> tuple[str, ...]:
        return (*(("contrastive",) if self.config.task_weight else ()), *self.of_term)

    @property
    def teacher_needs(self) -> LevelRequest:
        read = {tower for _, tower in self.of_term.values()}
        towers: tuple[Tower, ...] = ("image", "text")
        return LevelRequest(towers=tuple(tower for tower in towers if tower in read))

    def terms(self, batch: Batch) -> dict[str, Term]:
        student, terms = self.encode_student(batch), {}
        if self.wants("contrastive", self.config.task_weight):
            terms["contrastive"] = Term(task_loss(student), self.config.task_weight)
        wanted = {name: place for name, place in self.of_term.items() if self.wants(name)}
        teachers = self.encode_teachers(batch, {role for role, _ in wanted.values()})
        if self.config.dispersion == "cache":
            self._draw_dispersions()
        for name, (role, tower) in wanted.items():
            distance = self._distance(name, _of(student, tower), _of(teachers[role], tower))
            terms[name] = Term(distance, self._weight(role, tower))
        return terms

    def _distance(self, name: str, student: Tensor, teacher: Tensor) -> Float[Tensor, ""]:
        adapted = self.adapters[name](student)
        if self.config.distance == "cosine":
            return feature_distance(adapted, teacher) / 2  # the squared chord is 2 - 2 cos
        angles = squared_angle(adapted, teacher).mean()
        if self.config.distance == "angle":
            return angles
        dispersion = self.dispersions[name]
        assert isinstance(dispersion, Dispersion)
        if self.config.dispersion == "run" and self.training:
            dispersion.note(teacher, batches=self.config.dispersion_steps)
        own = angular_dispersion(teacher).clamp_min(SMALLEST)  # where nothing was noted: an evaluation before a step
        found = torch.where(dispersion.number > 0, dispersion.value, own)
        self.measurements[f"dispersion/{name}"] = found
        return angles / found

    def _draw_dispersions(self) -> None:
        """From the caches, once in a process: the draw is the same in each, and after a resume."""
        if self._drawn:
            return
        for role in dict.fromkeys(role for role, _ in self.of_term.values()):
            drawn = [*self.teachers[role].reference_embeddings(self.config.dispersion_pairs)]
            for name, (of, tower) in self.of_term.items():
                if of == role:
                    dispersion = self.dispersions[name]
                    assert isinstance(dispersion, Dispersion)
                    dispersion.fill(part[0 if tower == "image" else 1].to(self.device) for part in drawn)
        self._drawn = True


def _of(features: Features, tower: Tower) -> Float[Tensor, "batch dim"]:
    return features.image.embedding if tower == "image" else features.text.embedding

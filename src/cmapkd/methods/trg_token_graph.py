"""TRG for dual encoders (Zhang et al. 2023, arXiv:2306.12442): relations among the patch tokens of a whole batch.

A reconstruction: losses of a third party's notes on the paper, whose code was not found. Departures: the card below.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from jaxtyping import Float
from pydantic import Field, field_validator
from torch import Tensor, nn

from cmapkd.data.types import Batch
from cmapkd.features.drawn_places import drawn_orders, drawn_places
from cmapkd.features.key_tokens import take_tokens
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.dual import task_loss
from cmapkd.methods.image_tokens import ImageTokens, TokenLayers, TokenMethod
from cmapkd.methods.in_batch import similarity_loss
from cmapkd.methods.terms import Term
from cmapkd.models import DualEncoder, Features, FrozenTeacher
from cmapkd.objectives import context_distance, neighbour_divergence, token_contrast


class TokenGraphConfig(TokenLayers):
    """What each term counts, how many tokens are drawn, and how the graph is made of them."""

    task_weight: float = Field(1.0, ge=0, description="Weight of the student's own contrastive loss.")
    distill_weight: float = Field(1.0, ge=0, description="Weight of the KL of in-batch similarities.")
    temperature: float = Field(1.0, gt=0, description="Divides both models' similarities, on top of their scales.")
    inner_weight: float = Field(
        1.0, ge=0, description="Weight of the distance of a picture's own token relations. Published: unknown."
    )
    local_weight: float = Field(
        1.0, ge=0, description="Weight of the divergence of the nearest neighbours. Published: unknown."
    )
    global_weight: float = Field(
        1.0, ge=0, description="Weight of InfoNCE of a token against the teacher's. Published: unknown."
    )
    tokens: int = Field(
        8, ge=2, description="Tokens drawn of each picture in each step, at most all. Published: unknown."
    )
    neighbours: int = Field(10, ge=1, description="Nearest tokens that a token is linked with. Published: unknown.")
    bandwidth: float = Field(
        1.0, gt=0, description="Of the Gaussian kernel, in squared distances of tokens of length 1. Published: unknown."
    )
    affinity_temperature: float = Field(
        0.1,
        gt=0,
        description="Divides affinities, which lie in [0, 1], under the softmax. Printed: 1, at which 10 neighbours of "
        "512 tokens get 3 % of the mass.",
    )
    inner_temperature: float = Field(
        0.1, gt=0, description="Divides the cosines within a picture. Printed: 1 / sqrt(width) of each model."
    )
    global_temperature: tuple[float, float] = Field(
        (0.5, 0.1),
        description="Of InfoNCE, linear from the first to the second over the stage. Published: falling, numbers "
        "unknown.",
    )
    shuffled: bool = Field(
        False, description="A control: the teacher's tokens of each picture change places with each other."
    )

    @field_validator("global_temperature")
    @classmethod
    def _temperatures_are_positive(cls, value: tuple[float, float]) -> tuple[float, float]:
        if min(value) <= 0:
            raise ValueError(f"temperatures divide cosines and must be above 0, got {value[0]:g} and {value[1]:g}")
        return value


class TokenGraph(TokenMethod):
    """Patch tokens, drawn from all pictures of a batch, keep the teacher's neighbours, places and contexts."""

    Config: ClassVar[type[MethodConfig]] = TokenGraphConfig
    token_terms: ClassVar[tuple[str, ...]] = ("inner", "local", "global")
    steady = True
    card: ClassVar[MethodCard] = MethodCard(
        title="TRG, token-level relationship graph (a reconstruction of third-party notes)",
        paper="Zhang et al., 2023, arXiv:2306.12442",
        equations=(
            "x: the drawn tokens of all pictures, less their mean over channels and of length 1; σ: softmax over rows",
            "L_inner = 1/n Σ_i |σ(X Xᵀ / τ_c)_i of S - of T|² within each picture of n drawn tokens, batch mean",
            "A_ij = 1[j among the k nearest of i] exp(-|x_i - x_j|² / 2b), of each model by its own tokens",
            "L_local = mean_i KL(σ(A_i / τ_a) of S ‖ σ(A_i / τ_a) of T)",
            "L_global = mean_i CE(cos(P f_S,i, f_T,j) / τ_g over j, i), P linear, τ_g from 0.5 to 0.1",
            "L = L_contrastive + L_KD + α L_inner + β L_local + γ L_global, L_KD as in method hinton",
        ),
        needs="one level of both image towers; embeddings, logit scales",
        trainable="the student, one linear map (not in the student that is saved)",
        departures=(
            "A reconstruction: the losses are those of a third party's notes. Weights, numbers of tokens and "
            "neighbours, kernel and temperatures are unknown; the defaults are this project's.",
            "Logits of classes are the in-batch similarities of images and texts here.",
            "Affinities are divided by τ_a = 0.1. Printed is τ_a = 1, at which the softmax is nearly flat.",
            "Tokens are centred and of length 1, so that kernel and τ_c mean the same at any width.",
            "Sums over tokens are means, and L_inner is the printed mean over pairs times the number of tokens.",
            "Neighbours stand in rows. The notes' subscripts put them in columns.",
            "P is in L_global alone. The teacher's level is resampled to the student's grid.",
        ),
        checked_against="the formulas written out in loops, and gradcheck; no published code was found",
    )

    def __init__(self, config: TokenGraphConfig, *, student: DualEncoder, teacher: FrozenTeacher | None = None) -> None:
        super().__init__(config, student=student, teacher=teacher)
        assert teacher is not None
        self.config = config
        self.weights = {
            "contrastive": config.task_weight,
            "similarity": config.distill_weight,
            "inner": config.inner_weight,
            "local": config.local_weight,
            "global": config.global_weight,
        }
        self.levels = ImageTokens(config, student=student, teacher=teacher.model)
        self.project = nn.Linear(*self.levels.widths) if "global" in self.term_names else None

    def terms(self, batch: Batch) -> dict[str, Term]:
        config = self.config
        student, teacher, tokens = self.encode_both(batch, self._drawn)
        values: dict[str, Tensor] = {}
        if self.wants("contrastive"):
            values["contrastive"] = task_loss(student)
        if self.wants("similarity"):
            values["similarity"] = similarity_loss(student, teacher, temperature=config.temperature)
        if self.reads_tokens:
            ours, theirs = tokens["student"], tokens["teacher"]
            if self.wants("inner"):
                values["inner"] = context_distance(ours, theirs, temperature=config.inner_temperature).mean()
            ours, theirs = ours.flatten(0, 1), theirs.flatten(0, 1)
            if self.wants("local"):
                values["local"] = neighbour_divergence(
                    ours,
                    theirs,
                    neighbours=config.neighbours,
                    bandwidth=config.bandwidth,
                    temperature=config.affinity_temperature,
                ).mean()
            if self.project is not None and self.wants("global"):
                start, end = config.global_temperature
                temperature = start + (end - start) * self.step.progress
                values["global"] = token_contrast(self.project(ours), theirs, temperature=temperature).mean()
        return self.weighted(values)

    def _drawn(
        self, part: Batch, student: Features, teacher: Features
    ) -> Mapping[str, Float[Tensor, "batch tokens width"]]:
        """Tokens of both models at the places that the step draws for each picture; of this process's samples."""
        if not self.reads_tokens:
            return {}
        ours, theirs = self.levels.cells(student, teacher)
        count, key = min(self.config.tokens, ours.shape[1]), (self.step.seed, self.step.step)
        places = drawn_places(part.ids, count=count, of=ours.shape[1], key=key)
        of_teacher = places
        if self.config.shuffled:
            of_teacher = places.gather(1, drawn_orders(part.ids, of=count, key=key))
        return {
            role: take_tokens(cells, numbers.to(cells.device, non_blocking=True))
            for role, cells, numbers in (("student", ours, places), ("teacher", theirs, of_teacher))
        }

"""VidLanKD (NeurIPS 2021, arXiv:2107.02681), its transfer: a model that saw pictures teaches states of texts.

The teacher's grounding is not a part of this method: any model that reads pictures can teach. The published students
are masked language models. Here the student writes one token after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from cmapkd.data.types import Batch
from cmapkd.methods.behind_terms import Made
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.generative import Counted, GenerativeConfig, GenerativeMethod
from cmapkd.models import FrozenTeacher
from cmapkd.models.generative import GenerativeModel
from cmapkd.models.token_types import TokenFeatures
from cmapkd.objectives.neuron_selectivity import selectivity_distance


class VidLanKDConfig(GenerativeConfig):
    """Weights of both terms, and the order of the teacher's tokens."""

    answers_weight: float = Field(1.0, ge=0, description="Weight of the cross-entropy with the answers of the data.")
    selectivity_weight: float = Field(
        1.0, gt=0, description="Weight of the distance of both models' maps of tokens x tokens."
    )
    order: Literal["own", "reversed"] = Field(
        "own", description="reversed: the teacher's tokens of each answer stand in reverse order, which is a control."
    )

    @model_validator(mode="after")
    def _something_reaches_the_head(self) -> VidLanKDConfig:
        if not self.answers_weight:
            raise ValueError("answers_weight is 0, so nothing teaches the student to write: give it a weight")
        return self


class VidLanKD(GenerativeMethod):
    """The student's neurons answer to the tokens of a text as the neurons of its teacher do."""

    Config: ClassVar[type[MethodConfig]] = VidLanKDConfig
    card: ClassVar[MethodCard] = MethodCard(
        title="VidLanKD, its transfer by neuron selectivity, into a student that writes",
        paper="Tang et al., NeurIPS 2021, arXiv:2107.02681, section 3.3; Huang & Wang, arXiv:1707.01219",
        equations=(
            "g = Linear, GELU, LayerNorm, Linear, unit length: of the student's final states of an answer's L tokens",
            "s_i, t_i: unit vectors over these tokens, one for each neuron of g(student) and of the teacher's states",
            "selectivity = ‖Σ s_i s_iᵀ / D_S − Σ t_i t_iᵀ / D_T‖², [L, L], the mean over answers",
            "L = answers_weight CE(y, q) + selectivity_weight selectivity",
        ),
        needs="final states of the answers' tokens of both models, which must have one vocabulary; widths may differ; "
        "no cache",
        trainable="the student and a head of two layers, which is dropped at the end",
        departures=(
            "The student writes: its own loss is the cross-entropy of the next token, in place of masked words.",
            "The answers' tokens are compared, in place of all tokens of a masked text.",
            "The constant ‖Σ t_i t_iᵀ / D_T‖² is not dropped, so the term is a distance. Gradients are the same.",
            "The mean is over answers. The published sum over the batch is divided by its common length.",
            "The contrastive term is left out: released scripts switch it off, and its code takes padding for tokens.",
            "The teacher's own training, a hinge loss of texts and videos, is left out: teachers here read pictures.",
        ),
        checked_against="the kernel written out over pairs of neurons; the published NSTLoss "
        "(tests/methods/fixtures/vidlankd.json)",
    )
    config: VidLanKDConfig
    of_teacher: ClassVar[frozenset[str]] = frozenset({"selectivity"})

    def __init__(
        self, config: VidLanKDConfig, *, student: GenerativeModel, teacher: FrozenTeacher | None = None
    ) -> None:
        super().__init__(config, student=student, teacher=teacher)
        self.config = config
        self.weights = {"answers": config.answers_weight, "selectivity": config.selectivity_weight}
        self.not_cached = "it reads the teacher's states, and a cache holds its likeliest tokens"
        width = student.text_levels[0].width
        self.states_head = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, width)
        )

    @property
    def made_of(self) -> Mapping[str, Made]:
        return {"selectivity": "states"}

    def sums(self, part: Batch, student: TokenFeatures, teacher: TokenFeatures | None) -> dict[str, Counted]:
        rows = student.hidden["answer"]
        found = self.losses(student, self.weigh(part, rows))
        if self.wants("selectivity"):
            assert teacher is not None
            self._check_lengths(student, teacher)
            states: Tensor = teacher.hidden["answer"].values
            if self.config.order == "reversed":
                states = states.flip(0)[rows.sample.flip(0).argsort(stable=True)]
            own = F.normalize(self.states_head(rows.values), dim=-1)
            distances = selectivity_distance(own, states, rows.sample, len(part))
            found["selectivity"] = Counted.of(distances.sum(), len(part))
        return found

"""CLIP-CID, a reading (Yang et al., AAAI 2025, arXiv:2408.09441): clusters of the teacher's pictures are told apart.

What is from the paper and what is ours: the card below and docs/methods/clip_cid.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from cmapkd.config import ConfigError, counted
from cmapkd.data.types import Batch
from cmapkd.features.closed_form import spherical_kmeans
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.dual import DualEncoderMethod, task_loss
from cmapkd.methods.in_batch import similarity_loss
from cmapkd.methods.targets import Answered, Survey
from cmapkd.methods.terms import Term
from cmapkd.models import DualEncoder, FrozenTeacher
from cmapkd.objectives import kl_divergence, similarities

MOST_CLUSTERS = 512
SAMPLES_PER_CLUSTER = 8


class ClipCidConfig(MethodConfig):
    """What each term counts, and how the teacher's pictures are clustered."""

    task_weight: float = Field(1.0, ge=0, description="Weight of the student's own contrastive loss.")
    cluster_weight: float = Field(1.0, ge=0, description="Weight of the KL over clusters of the teacher's images.")
    instance_weight: float = Field(
        1.0, ge=0, description="Weight of the KL between both models' in-batch similarities."
    )
    clusters: int | None = Field(
        None, ge=2, description="Number of clusters; none: one for each 8 training samples, at most 512."
    )
    cluster_scale: float = Field(
        1 / 0.07,
        gt=0,
        description="Multiplies cosines of an image with the clusters' centres; CLIP's scale at its start.",
    )
    centres: Literal["clusters", "random"] = Field(
        "clusters", description="clusters: of the teacher's images; random: images drawn at random, as a control."
    )
    sample: int = Field(
        100_000, ge=2, description="Training samples that are clustered, drawn once; all where there are fewer."
    )


class ClipCid(DualEncoderMethod):
    """The student finds for each picture the teacher's clusters, and in the batch the teacher's similarities."""

    Config: ClassVar[type[MethodConfig]] = ClipCidConfig
    steady = True
    card: ClassVar[MethodCard] = MethodCard(
        title="CLIP-CID, a reading: clusters and instances of the teacher",
        paper="Yang et al., AAAI 2025, arXiv:2408.09441, of which the abstract was read",
        equations=(
            "C: centres of length one of the teacher's unit image embeddings, by k-means in cosines; P: a linear map",
            "L_cluster = KL(σ(s_c v_T Cᵀ) ‖ σ(s_c N(P v_S) Cᵀ)), batch mean",
            "L_instance = 1/2 [KL(σ(s_T v_T t_Tᵀ) ‖ σ(s_S v_S t_Sᵀ)) + the transposed]",
            "L = L_contrastive + L_cluster + L_instance",
        ),
        needs="embeddings and logit scales of both models",
        trainable="the student, the linear map P (dropped)",
        departures=(
            "From the paper: clusters of the teacher's image embeddings and a term over single pairs. All formulas are "
            "ours: no code was found, and no equation could be read.",
            "The paper also leaves near duplicates out of the data. This is a choice of data, and no part of the "
            "method here.",
        ),
        checked_against="the formulas written out in loops; no published code was found, so there is no parity",
    )

    centres: Float[Tensor, "clusters dim"]

    def __init__(self, config: ClipCidConfig, *, student: DualEncoder, teacher: FrozenTeacher | None = None) -> None:
        super().__init__(config, student=student, teacher=teacher)
        assert teacher is not None
        self.config, self.dim = config, teacher.embed_dim
        self.weights = {
            "contrastive": config.task_weight,
            "cluster": config.cluster_weight,
            "instance": config.instance_weight,
        }
        self.project = nn.Linear(student.embed_dim, self.dim) if config.cluster_weight else None
        self.register_buffer("centres", torch.zeros(0, self.dim))

    @property
    def prepares(self) -> bool:
        return self.project is not None

    def prepare(self, survey: Survey) -> None:
        """Clusters the teacher's image embeddings."""
        rows = Answered.joined(survey(num=self.config.sample, towers=("image",))).image
        number = self.config.clusters or min(MOST_CLUSTERS, len(rows) // SAMPLES_PER_CLUSTER)
        if not 2 <= number <= len(rows):
            least = number if self.config.clusters else 2 * SAMPLES_PER_CLUSTER
            raise ConfigError(
                f"clip_cid makes clusters of the training data, and the teacher answers {counted(len(rows), 'sample')} "
                f"where {least} are needed: take a data.train with more samples or more training.steps, or set "
                "method.clusters lower"
            )
        draws = torch.Generator().manual_seed(0)
        if self.config.centres == "random":
            centres = F.normalize(rows[torch.randperm(len(rows), generator=draws)[:number]], dim=-1)
        else:
            centres = spherical_kmeans(rows, number, draws)
        self._resize(number)
        self.centres.copy_(centres)

    @property
    def structure(self) -> dict[str, Any]:
        return {"clusters": len(self.centres)}

    def restructure(self, structure: Mapping[str, Any]) -> None:
        self._resize(int(structure.get("clusters", 0)))

    def _resize(self, number: int) -> None:
        self.centres = torch.zeros(number, self.dim, device=self.device)

    def terms(self, batch: Batch) -> dict[str, Term]:
        student = self.encode_student(batch)
        values: dict[str, Tensor] = {}
        if self.wants("contrastive"):
            values["contrastive"] = task_loss(student)
        if not (self.wants("cluster") or self.wants("instance")):
            return self.weighted(values)
        teacher = self.encode_teacher(batch)
        if self.project is not None and self.wants("cluster"):
            if not len(self.centres):
                raise ValueError("clip_cid has no clusters yet: `prepare` comes before the first step")
            own = similarities(self.project(student.image.embedding), self.centres, self.config.cluster_scale)
            theirs = similarities(teacher.image.embedding, self.centres, self.config.cluster_scale)
            values["cluster"] = kl_divergence(own, theirs)
        if self.wants("instance"):
            values["instance"] = similarity_loss(student, teacher)
        return self.weighted(values)

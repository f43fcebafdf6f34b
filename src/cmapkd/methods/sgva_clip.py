"""SgVA-CLIP (Peng et al. 2024, arXiv:2211.16191): few labelled pictures train an adapter behind a frozen image tower.

What the frozen model's pictures and class prompts say of all classes holds the adapter. The answer joins the prompts
with the mean of each class's adapted pictures. Departures: the card below and docs/methods/sgva_clip.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cmapkd.data.labels import LabelReader
from cmapkd.data.templates import ClassPrompts
from cmapkd.data.types import Batch
from cmapkd.features import gather_rows, sample_keys
from cmapkd.features.closed_form import rank_in_class
from cmapkd.methods.by_classes import (
    check_is_copy,
    check_several,
    check_shown,
    check_trained,
    check_unadapted,
    learned_context,
)
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.dual import PictureMethod
from cmapkd.methods.sgva_config import SgvaClipConfig
from cmapkd.methods.targets import Answered, Survey
from cmapkd.methods.terms import Term
from cmapkd.models import DualEncoder, FrozenTeacher
from cmapkd.models.adapted import AdaptedEncoder
from cmapkd.models.prompted import PromptedEncoder
from cmapkd.models.texts import LearnedClassVectors, class_vectors
from cmapkd.objectives import kl_divergence, labelled_cross_entropy, similarities
from cmapkd.objectives.support import support_scores


class SgvaClip(PictureMethod):
    """An adapter learns labels by pictures, and the frozen model's view of all classes; a context learns labels."""

    Config: ClassVar[type[MethodConfig]] = SgvaClipConfig
    steady = True
    encodes_student = False  # its frozen pictures are the teacher's answers
    card: ClassVar[MethodCard] = MethodCard(
        title="SgVA-CLIP: a visual adapter for few labels, held by the frozen model's classes",
        paper="Peng et al., IEEE Transactions on Multimedia 2024, arXiv:2211.16191",
        equations=(
            "v: the frozen unit image embedding, w_c: unit vector of the learned context with the name of class c",
            "a = N(relu(α W₂ relu(W₁ v) + (1 - α) v)), α learned from 0.5; P_c: the mean of a over pictures of class c",
            "z_P = s a Pᵀ, z_W = s v Wᵀ, z_A = s a Wᵀ, s: the frozen logit scale",
            "L = CE(z_P, y) + KL(σ(sg z_W / T) ‖ σ(s a sg(W)ᵀ / T)) + CE(z_W, y), T = 5",
            "answer: share z_P + (1 - share) z_W; of classes without pictures share z_A + (1 - share) z_W",
        ),
        needs="labels and the names of at least two classes; no captions. The teacher is the student: its answers are "
        "the frozen pictures. A text tower whose table of tokens can be reached, unless context is none",
        trainable="the adapter and the context",
        departures=(
            "P is of all the pictures of a class, up to shots, in every step; published: of an episode's. A picture's "
            "own row does not count for it, as an episode shows other pictures in its support.",
            "The first term has all classes with pictures; published: those of the episode.",
            "The adapter reads the embedding. The published code can do so; its example lifts the embedding to the "
            "width before the projection.",
            "share is a setting; published: learned or searched on validation data.",
            "Classes without pictures are scored by z_A in place of z_P; published: not scored.",
            "KL in place of the cross-entropy with soft targets: the same gradient, and zero at agreement.",
            "AdamW with this toolkit's schedule in place of two optimizers of SGD.",
        ),
        checked_against="the formulas written out in loops; the published code has no licence, and was read only",
    )

    support_keys: Int[Tensor, "classes shots"]
    frozen_vectors: Float[Tensor, "classes dim"]  # without a context

    def __init__(
        self,
        config: SgvaClipConfig,
        *,
        student: DualEncoder,
        teacher: FrozenTeacher | None = None,
        classes: ClassPrompts | None = None,
    ) -> None:
        super().__init__(config, student=student, teacher=teacher)
        assert teacher is not None
        assert classes is not None
        self.config, self.num_classes = config, len(classes.names)
        self.weights = {
            "prototypes": config.prototype_weight,
            "classes": config.distill_weight,
            "labels": float(config.context is not None),
        }
        self.label_reader = LabelReader(num_classes=self.num_classes)
        check_several(config.name, classes)
        check_unadapted(student)
        check_trained(config.name, student)
        check_is_copy(config.name, student, teacher)
        student.requires_grad_(False)
        inner: DualEncoder = student
        self.vectors: LearnedClassVectors | None = None
        if config.context is None:
            own = class_vectors(student, classes.names, classes.templates, own=classes.own, device=student.device)
            self.register_buffer("frozen_vectors", own.to(student.device))
        else:
            inner, self.vectors = learned_context(config, student, classes)
        hidden = max(1, round(config.hidden * student.embed_dim))
        self.student: AdaptedEncoder = AdaptedEncoder(
            inner, classes.names, shots=config.shots, hidden=hidden, share=config.share
        )
        keys = torch.full((self.num_classes, config.shots), -1, dtype=torch.long, device=student.device)
        self.register_buffer("support_keys", keys)

    @property
    def needs_labels(self) -> bool:
        return True

    @property
    def prepares(self) -> bool:
        return True

    def train(self, mode: bool = True) -> Self:
        """The frozen model stays in eval mode: nothing of it changes, and it drops nothing."""
        super().train(mode)
        self.student.model.eval()
        return self

    def shared_parameters(self) -> Mapping[str, nn.Parameter]:
        """The adapter's last layer, and the context: no term reaches both."""
        own = {"adapter": dict(self.student.named_parameters())["adapter.outer.weight"]}
        if isinstance(self.student.model, PromptedEncoder):
            own["context"] = self.student.model.context.tokens
        return own

    def prepare(self, survey: Survey) -> None:
        """Keeps the first pictures of each class."""
        answers = Answered.joined(survey(towers=("image",)))
        places = rank_in_class(answers.labels)
        kept = (answers.labels >= 0) & (places < self.config.shots)
        at = answers.labels[kept], places[kept]
        self.student.show(F.normalize(answers.image[kept], dim=-1), at)
        self.support_keys.fill_(-1)[at] = answers.keys[kept].to(self.support_keys.device)
        check_shown(self.config.name, self.student.in_support.any(1))

    def terms(self, batch: Batch) -> dict[str, Term]:
        config, student = self.config, self.student
        answers, values = self.encode_teacher(batch), dict[str, Tensor]()
        frozen, scale = F.normalize(answers.image.embedding.to(student.support.dtype), dim=-1), answers.logit_scale
        adapted = student.adapter(frozen)
        vectors = self.frozen_vectors if self.vectors is None else self.vectors(student.model)
        by_text = similarities(frozen, vectors, scale)
        if self.wants("prototypes"):
            scores = support_scores(adapted, student.adapter(student.support), self._counted(batch), scale)
            values["prototypes"] = labelled_cross_entropy(scores, self.labels(batch))
        if self.wants("classes"):
            by_adapter = similarities(adapted, vectors.detach(), scale)
            divergence = kl_divergence(by_adapter, by_text, temperature=config.temperature)
            values["classes"] = divergence / config.temperature**2
        if self.wants("labels"):
            values["labels"] = labelled_cross_entropy(by_text, self.labels(batch))
        return self.weighted(values)

    def _counted(self, batch: Batch) -> Bool[Tensor, "batch classes shots"]:
        """Which pictures count for which sample: all but its own, which counts where its class has no other."""
        keys = gather_rows(sample_keys(batch.ids).to(self.device, non_blocking=True))
        others = self.student.in_support & (self.support_keys != keys[:, None, None])
        return torch.where(others.any(-1, keepdim=True), others, self.student.in_support)

"""VL2Lite (Jang et al., CVPR 2025): a small classifier learns an image-text model's pictures and its classes' texts.

Two small networks bring the teacher's image and text vectors to the width of the student's features. They learn with
the student and are dropped. Departures: the card below and docs/methods/vl2lite.md.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from cmapkd.data.templates import ClassPrompts
from cmapkd.data.types import Batch
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.classifying import LABELS_HEAD, ClassifierMethod, ClassifyingConfig
from cmapkd.methods.terms import Term
from cmapkd.models import Classifier, FrozenTeacher
from cmapkd.models.classifier import ClassHeadConfig
from cmapkd.models.texts import frozen_class_vectors
from cmapkd.objectives import absolute_distance, kl_divergence, labelled_cross_entropy, similarities
from cmapkd.objectives.common import unit


class VL2LiteConfig(ClassifyingConfig):
    """What the features are compared with, and how the weight moves to the labels."""

    task_weight: float = Field(
        0.125, ge=0, le=1, description="Weight w of the cross-entropy at the end of the run; the other terms get 1 - w."
    )
    ramp: bool = Field(True, description="Whether w grows from 0 with the steps; if not, it is task_weight throughout.")
    vision_weight: float = Field(0.5, ge=0, description="Weight of the distance from the teacher's image vectors.")
    language_weight: float = Field(0.25, ge=0, description="Weight of the KL of the classes' probabilities.")
    temperature: float = Field(2.0, gt=0, description="Divides the logits of teacher and student in the KL.")
    logit_scale: float = Field(1 / 0.07, gt=0, description="Multiplies cosines with class vectors, of both models.")


class VL2Lite(ClassifierMethod):
    """Features are drawn to the teacher's image vectors, and to class vectors as the teacher's are to its own."""

    Config: ClassVar[type[MethodConfig]] = VL2LiteConfig
    label_free: ClassVar[str | None] = "method.task_weight=0"
    card: ClassVar[MethodCard] = MethodCard(
        title="VL2Lite: an image-text model's knowledge in a small classifier",
        paper="Jang et al., CVPR 2025, https://openaccess.thecvf.com/CVPR2025",
        equations=(
            "h = N(f), g = N(A_v v_T), G = N(A_t W), A_v and A_t: linear, ReLU, linear, to the width of f",
            "L_vision = mean |h - g|, over samples and channels",
            "L_language = T² KL(σ(s v_T Wᵀ/T) ‖ σ(s h Gᵀ/T)), T = 2, s = 1/0.07, W the classes' unit text vectors",
            "L = w CE(z, y) + (1 - w) (vision_weight L_vision + language_weight L_language), z = W₁ f + b",
            "w = task_weight × steps done / steps of the run",
        ),
        needs="names of the classes, pictures with labels; embeddings of the teacher",
        trainable="the student: its image tower and a linear head; A_v and A_t (dropped)",
        departures=(
            "w grows with the steps; published with the epochs, so that it is 0 in the whole first one.",
            "Teacher and student normalise pictures each in its own way; the published code gives both one input.",
            "The cross-entropy is the mean over labelled samples, the other terms over all.",
            "AdamW with this toolkit's schedule, and class vectors over all templates of the evaluation.",
        ),
        checked_against="KDCriterion, AlignNet and the loss of a public fork, run on random inputs: values and "
        "gradients, tests/methods/fixtures/vl2lite.json. The authors' own repository could not be read",
    )

    class_vectors: Tensor

    def __init__(
        self,
        config: VL2LiteConfig,
        *,
        student: Classifier,
        teacher: FrozenTeacher | None = None,
        classes: ClassPrompts | None = None,
    ) -> None:
        super().__init__(config, student=student, teacher=teacher, classes=classes)
        assert teacher is not None
        assert classes is not None
        self.config = config
        self.register_buffer("class_vectors", frozen_class_vectors(teacher, classes))
        self.set_heads({LABELS_HEAD: ClassHeadConfig()})
        # a network of a term without weight would never learn
        if config.vision_weight:
            self.align_image = aligner(teacher.embed_dim, student.embed_dim)
        if config.language_weight:
            self.align_text = aligner(teacher.embed_dim, student.embed_dim)

    @property
    def term_names(self) -> tuple[str, ...]:
        first, last = self.weights_at(0.0), self.weights_at(1.0)
        return tuple(name for name in last if first[name] or last[name])

    @property
    def needs_labels(self) -> bool:
        return bool(self.config.task_weight)

    def weights_at(self, progress: float) -> dict[str, float]:
        """Weights of the terms by name.

        Args:
            progress: share of the run's steps that are done.
        """
        config = self.config
        own = config.task_weight * (progress if config.ramp else 1.0)
        others = {"vision": config.vision_weight, "language": config.language_weight}
        return {"labels": own, **{name: (1 - own) * weight for name, weight in others.items()}}

    def terms(self, batch: Batch) -> dict[str, Term]:
        config, features = self.config, self.features(batch)
        weights = self.weights_at(self.step.step / self.step.total)
        teacher, values = self.encode_teacher(batch).image.embedding, dict[str, Tensor]()
        if self.wants("labels", config.task_weight):
            values["labels"] = labelled_cross_entropy(self.student.logits(LABELS_HEAD, features), self.labels(batch))
        if self.wants("vision", config.vision_weight):
            values["vision"] = absolute_distance(features, self.align_image(unit(teacher)))
        if self.wants("language", config.language_weight):
            own = similarities(features, self.align_text(self.class_vectors), config.logit_scale)
            theirs = similarities(teacher, self.class_vectors, config.logit_scale)
            values["language"] = kl_divergence(own, theirs, temperature=config.temperature)
        return {name: Term(value, weights[name]) for name, value in values.items()}


def aligner(width: int, to: int) -> nn.Sequential:
    """From the teacher's vectors to the width of the student's features."""
    return nn.Sequential(nn.Linear(width, to), nn.ReLU(), nn.Linear(to, to))

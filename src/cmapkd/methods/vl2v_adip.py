"""VL2V-ADiP (Addepalli et al., CVPR 2024, arXiv:2310.08255): align, distil and predict with a black-box teacher.

A projector behind a trained image tower learns the teacher's embeddings of pictures and of their labels; then the tower
does, below the frozen projector. Departures: the card below and docs/methods/vl2v_adip.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from cmapkd.data.labels import LabelReader
from cmapkd.data.templates import ClassPrompts
from cmapkd.data.types import Batch
from cmapkd.methods.card import ClassesConfig, MethodCard, MethodConfig
from cmapkd.methods.dual import PictureMethod
from cmapkd.methods.stages import StageConfig
from cmapkd.methods.terms import Term
from cmapkd.models import DualEncoder, FrozenTeacher
from cmapkd.models.joined import JoinedEncoder
from cmapkd.models.texts import frozen_class_vectors
from cmapkd.objectives import labelled_distance


class VL2VADiPConfig(ClassesConfig):
    """What images and labels count."""

    image_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Weight of the teacher's image embedding; its text embedding of the label has the rest. Published: "
        "0.5 for unseen domains, 0.1 for the training data's own.",
    )
    label_share: float = Field(
        1.0, ge=0, le=1, description="Share of the samples whose label is read; the others are unlabelled."
    )

    @model_validator(mode="after")
    def _learns_something(self) -> Self:
        if self.image_share == 0 and self.label_share == 0:
            raise ValueError("image_share and label_share are both zero, which leaves nothing to learn: raise one")
        return self


class VL2VADiP(PictureMethod):
    """First a projector, then the tower below it, learns to embed pictures where teacher and label are."""

    Config: ClassVar[type[MethodConfig]] = VL2VADiPConfig
    steady = True
    card: ClassVar[MethodCard] = MethodCard(
        title="VL2V-ADiP: vision-language to vision, align, distil, predict",
        paper="Addepalli et al., CVPR 2024, arXiv:2310.08255",
        equations=(
            "z = P f(x) + b, f: the student's image embedding; v_T: the teacher's of the picture, w_y: its unit vector "
            "of the label's prompts",
            "L = λ (1 - cos(z, v_T)) + (1-λ) (1 - cos(z, w_y)), batch means, λ = image_share",
            "stage align: P and b learn; stage distil: f learns, P and b stay",
            "prediction: the softmax of s_T cos(z, W)",
        ),
        needs="pictures, labels and the names of the classes; a trained student. Of the teacher embeddings alone",
        trainable="a linear projector, then the student's image tower; the teacher's text tower stays",
        departures=(
            "1 - cos in place of -cos: the same gradient, and zero at agreement.",
            "A picture without label counts in the image term alone, and the text term is a mean over the others.",
            "Both stages are one run, half of the steps each. Published: two runs, of which the second finds the "
            "projector of the first only where it is told to, and has a random one otherwise.",
            "training.ema may stand for SWAD, which averages weights in a window chosen on validation data.",
            "AdamW with this toolkit's schedule; published: Adam, rate 5e-5, no decay, 32 pictures a domain.",
            "No CutMix, which is off by default in the published code.",
        ),
        checked_against="the published loss function and classification head run on random embeddings: values and "
        "gradients, tests/methods/fixtures/vl2v_adip.json",
    )

    class_vectors: Tensor

    def __init__(
        self,
        config: VL2VADiPConfig,
        *,
        student: DualEncoder,
        teacher: FrozenTeacher | None = None,
        classes: ClassPrompts | None = None,
    ) -> None:
        super().__init__(config, student=student, teacher=teacher)
        assert teacher is not None
        assert classes is not None
        self.config = config
        self.weights = {"image": config.image_share, "text": 1 - config.image_share}
        self.label_reader = LabelReader(config.label_share, len(classes.names))
        self.register_buffer("class_vectors", frozen_class_vectors(teacher, classes))
        joined = JoinedEncoder(student, teacher, projector="linear")
        with torch.no_grad():
            student.log_logit_scale.fill_(float(teacher.model.log_logit_scale.detach().reshape(())))
        joined.freeze_unused()
        self.student = joined

    @property
    def needs_labels(self) -> bool:
        return not self.config.image_share

    @property
    def student_parts(self) -> Mapping[str, frozenset[str]]:
        """Also `projector`, and `tower`: all of the student that leads to it."""
        parts = self.student.parts
        projector = frozenset(name for name in parts["projections"] if name.startswith("project."))
        return {**parts, "projector": projector, "tower": (parts["image"] | parts["projections"]) - projector}

    @property
    def default_stages(self) -> tuple[StageConfig, ...]:
        return (
            StageConfig(name="align", share=0.5, train=("projector",)),
            StageConfig(name="distil", share=0.5, train=("tower",)),
        )

    def terms(self, batch: Batch) -> dict[str, Term]:
        embedding = self.encode_student(batch).image.embedding
        values: dict[str, Tensor] = {}
        if self.wants("image"):
            values["image"] = labelled_distance(embedding, self.encode_teacher(batch).image.embedding) / 2
        if self.wants("text"):
            labels = self.labels(batch)
            values["text"] = labelled_distance(embedding, self.class_vectors[labels.clamp_min(0)], labels) / 2
        return self.weighted(values)

"""DHO (Kang et al. 2025, arXiv:2505.07675): two heads on one image tower, one for few labels, one for the teacher.

Gradients of labels and of the teacher meet in the tower alone. Both heads' probabilities are mixed when the student is
asked. Departures: the card below and docs/methods/dho.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.data.templates import ClassPrompts
from cmapkd.data.types import Batch
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.classifying import LABELS_HEAD, TEACHER_HEAD, ClassifierMethod, ClassifyingConfig
from cmapkd.methods.terms import Term
from cmapkd.models import Classifier, DualEncoder, FrozenTeacher, build_model, dual, load_model
from cmapkd.models.classifier import AnswerRule, ClassHeadConfig
from cmapkd.models.texts import frozen_class_vectors, mean_class_texts
from cmapkd.objectives import kl_divergence, labelled_cross_entropy, similarities
from cmapkd.objectives.common import at_least_float32

HEAD_SCALE = 100.0  # of the teacher's head where both begin as class texts, as in the published code


class DHOConfig(ClassifyingConfig):
    """What both heads learn, and how they answer together."""

    task_weight: float = Field(0.5, ge=0, description="Weight of the cross-entropy of the labels' head.")
    distill_weight: float = Field(
        1.0, ge=0, description="Weight of the KL of the teacher's head, a mean over all samples, labelled or not."
    )
    temperature: float = Field(2.0, gt=0, description="Divides the logits of teacher and student in the KL.")
    teacher_scale: float | Literal["own"] = Field(
        100.0, description="Logit scale of the teacher's class probabilities: a number > 0, or own."
    )
    one_head: bool = Field(False, description="Both terms on one head: what the two heads are compared with.")
    head_texts: str | None = Field(
        None,
        description="Both heads begin as class texts of this model, in whose joint space the student's tower embeds: "
        "teacher, a name or a folder. None: random weights.",
    )
    alpha: float | None = Field(
        None, ge=0, le=1, description="Weight of the labels' head in the answer; none: chosen on data.val."
    )
    beta: float | None = Field(
        None, gt=0, description="Temperature of the teacher's head in the answer; none: chosen on data.val."
    )
    watch_gradients: bool = Field(
        False, description="Whether the cosine of both terms' gradients at the labelled samples' features is logged."
    )


class DHO(ClassifierMethod):
    """The labels' head learns from labelled samples, the teacher's head from all, and the tower from both."""

    Config: ClassVar[type[MethodConfig]] = DHOConfig
    label_free: ClassVar[str | None] = "method.task_weight=0"
    card: ClassVar[MethodCard] = MethodCard(
        title="DHO: dual-head optimisation for few labels",
        paper="Kang et al. 2025, arXiv:2505.07675",
        equations=(
            "z_c = W₁ f + b₁, z_k = W₂ f + b₂, Z_T = 100 v_T Wᵀ, W the unit vectors of the classes' prompts",
            "L = task_weight CE(z_c, y) over labelled + distill_weight T² KL(σ(Z_T/T) ‖ σ(z_k/T)) over all, T = 2",
            "answer: p = α σ(z_c) + (1 - α) σ(z_k / β)",
            "head_texts: W₁ = W₂ = means of text embeddings, z_k = 100 (W₂ f/‖f‖ + b₂)",
        ),
        needs="names of the classes, pictures, few of them labelled; embeddings of the teacher",
        trainable="the student: its image tower and two linear heads",
        departures=(
            "The KL is one mean over the batch. Published: the mean over labelled plus that over unlabelled samples, "
            "which is twice ours where both are as many: distill_weight 1 is their 0.5.",
            "One pass for both kinds of samples; the published few-shot script makes two, so batch norms see two.",
            "α and β are chosen once, for the student that is kept, on data.val: by accuracy, among equals by the "
            "likelihood. The published ImageNet script chooses them, and the epoch, on the test data.",
            "AdamW with this toolkit's schedule, weight decay and views.",
        ),
        checked_against="the published loss lines and its search of α and β, run on random inputs: values and "
        "gradients, tests/methods/fixtures/dho.json",
    )

    class_vectors: Tensor

    def __init__(
        self,
        config: DHOConfig,
        *,
        student: Classifier,
        teacher: FrozenTeacher | None = None,
        classes: ClassPrompts | None = None,
    ) -> None:
        super().__init__(config, student=student, teacher=teacher, classes=classes)
        assert teacher is not None
        assert classes is not None
        self.config = config
        self.weights = {"labels": config.task_weight, "classes": config.distill_weight}
        if isinstance(config.teacher_scale, float) and config.teacher_scale <= 0:
            raise ConfigError(f"method.teacher_scale is {config.teacher_scale:g}: give a number > 0, or own")
        self.register_buffer("class_vectors", frozen_class_vectors(teacher, classes))
        texts = config.head_texts is not None
        heads = {TEACHER_HEAD: ClassHeadConfig(unit=texts, scale=HEAD_SCALE if texts else 1.0)}
        if config.one_head:
            self.set_heads(heads)
        else:
            alpha, beta = 0.5 if config.alpha is None else config.alpha, 1.0 if config.beta is None else config.beta
            rule = AnswerRule(heads=(LABELS_HEAD, TEACHER_HEAD), alpha=alpha, beta=beta)
            self.set_heads({LABELS_HEAD: ClassHeadConfig(), **heads}, rule)
        if texts:
            self._begin_as_texts(teacher, classes)

    @property
    def mix(self) -> tuple[float | None, float | None] | None:
        return None if self.config.one_head else (self.config.alpha, self.config.beta)

    @property
    def needs_labels(self) -> bool:
        return bool(self.config.task_weight)

    def terms(self, batch: Batch) -> dict[str, Term]:
        config, features = self.config, self.features(batch)
        values: dict[str, Tensor] = {}
        labels = self.labels(batch)
        if self.wants("labels"):
            head = TEACHER_HEAD if config.one_head else LABELS_HEAD
            values["labels"] = labelled_cross_entropy(self.student.logits(head, features), labels)
        if self.wants("classes"):
            logits = self.student.logits(TEACHER_HEAD, features)
            values["classes"] = kl_divergence(logits, self.teacher_logits(batch), temperature=config.temperature)
        if config.watch_gradients and len(values) == 2 and features.requires_grad:
            one, two = (torch.autograd.grad(value, features, retain_graph=True)[0] for value in values.values())
            self.measurements["gradient_cosine"] = _cosine(one, two, labels >= 0)
        return self.weighted(values)

    def teacher_logits(self, batch: Batch) -> Float[Tensor, "batch classes"]:
        """The teacher's scores of the classes, without gradient."""
        teacher = self.encode_teacher(batch)
        scale = self.config.teacher_scale
        by = teacher.logit_scale if scale == "own" else scale
        logits: Tensor = similarities(teacher.image.embedding, self.class_vectors, by)
        return logits

    @torch.no_grad()
    def _begin_as_texts(self, teacher: FrozenTeacher, classes: ClassPrompts) -> None:
        """Both heads begin as the means of the classes' text embeddings, which are not normalised, without bias.

        Raises:
            ConfigError: the model embeds in another width than the student's tower.
        """
        model, student = self._model_of_texts(teacher), self.student
        if model.embed_dim != student.embed_dim:
            raise ConfigError(
                f"method.head_texts names {model.name}, which embeds in {model.embed_dim} numbers, and the tower of "
                f"{student.name} in {student.embed_dim}: name the model that the tower is of, or leave head_texts out"
            )
        texts = mean_class_texts(model, classes, device=next(model.parameters()).device)
        for head in student.heads.values():
            assert isinstance(head, nn.Linear)
            head.weight.copy_(texts)
            head.bias.zero_()

    def _model_of_texts(self, teacher: FrozenTeacher) -> DualEncoder:
        name = str(self.config.head_texts)
        model = teacher.model if name == "teacher" else load_model(name) if Path(name).is_dir() else build_model(name)
        return dual(model, "method.head_texts")


def _cosine(
    first: Float[Tensor, "batch width"], second: Float[Tensor, "batch width"], counted: Tensor
) -> Float[Tensor, ""]:
    """Of two gradients at the samples that count, in [-1, 1]; 0 where there are none."""
    one, two = (at_least_float32(each) * counted[:, None] for each in (first, second))
    cosine: Tensor = (one * two).sum() / (one.norm() * two.norm()).clamp_min(1e-30)
    return cosine.detach()

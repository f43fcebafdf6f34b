"""ZSCL (Zheng et al., ICCV 2023): learns a task, and stays alike on reference pictures and near its first weights.

The running mean of weights that belongs to it is `training.mean_every`. Departures: the card below and
docs/methods/zscl.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from cmapkd.config import ConfigError
from cmapkd.data.labels import LabelReader
from cmapkd.data.streams import MAIN_STREAM
from cmapkd.data.templates import ClassPrompts
from cmapkd.data.types import Batch
from cmapkd.features.weights import Anchor
from cmapkd.methods.by_classes import check_kept_width
from cmapkd.methods.card import ClassesConfig, MethodCard, MethodConfig, SentenceRequest
from cmapkd.methods.dual import PictureMethod
from cmapkd.methods.stages import StageConfig
from cmapkd.methods.terms import Term
from cmapkd.models import DualEncoder, Features, FrozenTeacher
from cmapkd.models.texts import LearnedClassVectors, LearnedSentences, embed_texts
from cmapkd.objectives import labelled_cross_entropy, reference_divergences, similarities


class ZSCLConfig(ClassesConfig):
    """What each term counts, and which pictures and sentences stand for all that must not be forgotten."""

    task_weight: float = Field(1.0, ge=0, description="Weight of the cross-entropy with the task's labels.")
    smoothing: float = Field(0.2, ge=0, lt=1, description="Label smoothing of the cross-entropy; published: 0.2.")
    image_weight: float = Field(1.0, ge=0, description="Weight of the KL of reference pictures over sentences.")
    text_weight: float = Field(1.0, ge=0, description="Weight of the KL of sentences over reference pictures.")
    temperature: float = Field(2.0, gt=0, description="Divides both models' logits in the two KL terms.")
    anchor_weight: float = Field(
        1.0, ge=0, description="Weight of the sum of squared distances of all weights to where this run began."
    )
    reference: str = Field(
        "reference",
        description="Stream of data.more whose pictures the student must see as its teacher does; train: the task's.",
    )
    sentences: str = Field(
        "captions",
        description="What reference pictures are compared with: captions, of the reference stream; classes, the task's "
        "prompts; or a text file with a sentence on each line.",
    )
    num_sentences: int = Field(1000, ge=2, description="Sentences at most, spread evenly over the stream or file.")
    text_side: Literal["teacher", "own"] = Field(
        "teacher",
        description="Whose vectors of the sentences the student's pictures are compared with; own: its text tower, "
        "which then has a gradient.",
    )
    sentences_at_once: int | None = Field(
        64, ge=2, description="text_side own: sentences drawn in each step; none: all."
    )
    prompts_at_once: int | None = Field(
        1, ge=1, description="Templates drawn in each step for the student's vectors of the classes; none: all."
    )

    @property
    def reads_sentences(self) -> SentenceRequest | None:
        return SentenceRequest(self.sentences, self.reference, self.num_sentences)


class ZSCL(PictureMethod):
    """The student learns a task, and on reference pictures its similarities stay those of the model it once was."""

    Config: ClassVar[type[MethodConfig]] = ZSCLConfig
    label_free: ClassVar[str | None] = "method.task_weight=0"
    steady = True
    card: ClassVar[MethodCard] = MethodCard(
        title="ZSCL: fine-tuning without forgetting, by reference pictures and an anchor of weights",
        paper="Zheng et al., ICCV 2023, arXiv:2303.06628",
        equations=(
            "s: the student's logit scale, which is frozen; W_S: its own vectors of the task's classes",
            "L_task = CE(s v_S W_Sᵀ, y) with label smoothing, over the labelled samples",
            "x: reference pictures; R: the teacher's vectors of sentences; Z_S = s v_S(x) Rᵀ, Z_T = s v_T(x) Rᵀ",
            "L_image = T² KL(σ(Z_T/T) ‖ σ(Z_S/T)), L_text = the same of the transposed",
            "L_anchor = Σ (θ - θ_start)², θ_start: the weights with which this run began",
            "L = L_task + L_image + L_text + L_anchor",
            "saved: the mean of θ_start, θ_n, θ_2n, ... (training.mean_every: n, published 100)",
        ),
        needs="labels and names of classes; a stream of reference pictures, which need no labels; sentences; as "
        "teacher the model before all tasks, of the student's width",
        trainable="the student but for its logit scale",
        departures=(
            "KL in place of the cross-entropy with soft targets: the same gradient, and zero at agreement.",
            "R is made once; the published code makes the same vectors in every step, of all captions of a file.",
            "Reference pictures are a share of the batch, and L_text has as many candidates as there are of them.",
            "The mean has weights after steps n, 2n, ...; published: also after the first step, so that weights near "
            "the start count twice.",
            "The prompt of a class is drawn from its templates in each step; published: one template.",
            "text_side: own is not in the published code.",
        ),
        checked_against="the published functions distillation, l2_loss and merge_we run on random inputs: values and "
        "gradients, tests/methods/fixtures/zscl.json; the formulas in loops",
    )

    sentence_vectors: Tensor  # the teacher's

    def __init__(
        self,
        config: ZSCLConfig,
        *,
        student: DualEncoder,
        teacher: FrozenTeacher | None = None,
        classes: ClassPrompts | None = None,
    ) -> None:
        super().__init__(config, student=student, teacher=teacher)
        assert teacher is not None
        assert classes is not None
        self.config = config
        self.weights = {
            "labels": config.task_weight,
            "reference_image": config.image_weight,
            "reference_text": config.text_weight,
            "anchor": config.anchor_weight,
        }
        check_kept_width(config.name, student, teacher)
        self.retains = bool(config.image_weight or config.text_weight)
        sentences = (classes.texts if config.sentences == "classes" else classes.sentences) if self.retains else ()
        if self.retains and len(sentences) < 2:
            raise ConfigError(
                f"zscl compares pictures with 2 sentences or more, and method.sentences={config.sentences} gives "
                f"{len(sentences)}: name a text file with one on each line"
            )
        if config.task_weight:
            self.label_reader = LabelReader(num_classes=len(classes.names))
        self.own_vectors = LearnedClassVectors(classes, student, at_once=config.prompts_at_once)
        self.own_sentences: LearnedSentences | None = None
        if self.retains:
            device = next(teacher.model.parameters()).device
            vectors = embed_texts(teacher.model, sentences, batch_size=256, device=device)
            self.register_buffer("sentence_vectors", vectors)
            if config.text_side == "own":
                self.own_sentences = LearnedSentences(sentences, student, at_once=config.sentences_at_once)
        student.log_logit_scale.requires_grad_(False)
        self.anchor = Anchor(student) if config.anchor_weight else None

    @property
    def streams(self) -> tuple[str, ...]:
        return (self.config.reference,) if self.retains and self.config.reference != MAIN_STREAM else ()

    @property
    def needs_labels(self) -> bool:
        return bool(self.config.task_weight)

    def why_whole(self, stages: Sequence[StageConfig]) -> str | None:
        if self.anchor is not None:
            return "zscl compares all weights with those at the start: set method.anchor_weight=0"
        return super().why_whole(stages)

    def terms(self, batch: Batch) -> dict[str, Term]:
        student, values = self.encode_student(batch), dict[str, Tensor]()
        if self.wants("labels"):
            vectors = self.own_vectors(self.student, self.step.generator("prompts"))
            logits = similarities(student.image.embedding, vectors, student.logit_scale)
            values["labels"] = labelled_cross_entropy(logits, self.labels(batch), smoothing=self.config.smoothing)
        wanted = [name for name in ("reference_image", "reference_text") if self.wants(name)]
        if wanted:
            of_images, of_texts = self._kept_alike(batch, student)
            alike = {"reference_image": of_images, "reference_text": of_texts}
            values |= {name: alike[name] for name in wanted}
        if self.anchor is not None and self.wants("anchor"):
            values["anchor"] = self.anchor.distance(self.student)
        return self.weighted(values)

    def _kept_alike(self, batch: Batch, student: Features) -> tuple[Tensor, Tensor]:
        """The KL of reference pictures over sentences, and of sentences over reference pictures."""
        teacher, theirs = self.encode_teacher(batch), self.sentence_vectors
        ours = theirs
        if self.own_sentences is not None:
            ours, drawn = self.own_sentences(self.student, self.step.generator("sentences"))
            theirs = theirs[drawn]
        scale = student.logit_scale
        return reference_divergences(
            similarities(student.image.embedding, ours, scale),
            similarities(teacher.image.embedding, theirs, scale),
            self.of_stream(batch, self.config.reference),
            temperature=self.config.temperature,
        )

"""MaKD (Lee et al., CVPR 2025 workshops, arXiv:2501.13341) with an image-text teacher: questions beside the labels.

A classifier also answers questions about the picture: is it red, has it a tail? The teacher gives the probability of a
yes, as it finds one text among others. Departures: the card below and docs/methods/makd.md.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.data.templates import ClassPrompts
from cmapkd.data.types import Batch
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.classifying import LABELS_HEAD, ClassifierMethod, ClassifyingConfig
from cmapkd.methods.terms import Term
from cmapkd.models import Classifier, FrozenTeacher
from cmapkd.models.classifier import ClassHeadConfig
from cmapkd.models.texts import frozen_class_vectors
from cmapkd.objectives import answer_cross_entropy, answers_among, labelled_cross_entropy, similarities


class MakdConfig(ClassifyingConfig):
    """The questions, how the teacher answers them, and what each term counts."""

    questions: dict[str, tuple[str, ...]] = Field(
        default_factory=dict,
        description="What is asked, in groups of alternatives: {colour: [red, green, blue], surface: [striped, ...]}. "
        "Every entry is one question. There must be some.",
    )
    templates: tuple[str, ...] = Field(
        ("a photo of something that is {}.",),
        description="Texts that mean a yes, with {} where an entry goes; several are averaged.",
    )
    options: Literal["contrast", "negation"] = Field(
        "contrast",
        description="What a yes is weighed against. contrast: the other entries of its group; negation: the entry in "
        "the negations, as in the published question.",
    )
    negations: tuple[str, ...] = Field(
        ("a photo of something that is not {}.",),
        description="Texts that mean a no, read with options: negation.",
    )
    task_weight: float = Field(1.0, ge=0, description="Weight of the cross-entropy with the labels, above 0.")
    question_weight: float = Field(
        4.0, ge=0, description="Weight of the binary cross-entropy of the questions, a mean over all of them."
    )
    teacher_scale: float | Literal["own"] = Field(
        "own", description="Multiplies the teacher's cosines before its softmax: a number > 0, or own, its logit scale."
    )
    answers: Literal["soft", "hard", "random", "shuffled"] = Field(
        "soft",
        description="soft: probabilities, as published; hard: yes or no; random: of random vectors in place of the "
        "texts', a control; shuffled: another picture's, the control that must fail.",
    )

    @field_validator("templates", "negations")
    @classmethod
    def _entries_have_a_place(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or any("{}" not in text for text in value):
            raise ValueError(f"give one text or more, each with {{}} where an entry goes, got {list(value)}")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.task_weight == 0:
            raise ValueError("task_weight 0 leaves the head of the classes random, and no other head answers: raise it")
        least = 2 if self.options == "contrast" else 1
        for group, entries in self.questions.items():
            if len(entries) < least:
                raise ValueError(
                    f"questions.{group} is {list(entries)}: with options: {self.options} a group has {least} or more "
                    "entries"
                )
            if len(set(entries)) < len(entries):
                raise ValueError(f"questions.{group} has an entry twice, {list(entries)}: each is a question")
        return self


class Makd(ClassifierMethod):
    """One head learns the labels, another one the teacher's answers to questions; the second is dropped."""

    Config: ClassVar[type[MethodConfig]] = MakdConfig
    card: ClassVar[MethodCard] = MethodCard(
        title="MaKD: multi-aspect distillation, with an image-text teacher",
        paper="Lee et al., CVPR 2025 workshops (FGVC), arXiv:2501.13341",
        equations=(
            "z_c = W₁ f + b₁, z_q = W₂ f + b₂: scores of C classes and Q questions; v: the teacher's image embedding",
            "t_q, t_q⁻: unit vectors of the texts that mean a yes and a no; s: teacher_scale",
            "contrast: a_q = σ(s v·t)_q over the alternatives t of the question's group",
            "negation: a_q = σ(s v·t_q, s v·t_q⁻), the first of the two",
            "L = task_weight CE(z_c, y) + question_weight mean BCE(z_q, a) over samples and questions",
        ),
        needs="questions; names of the classes, pictures with labels; embeddings of the teacher",
        trainable="the student: its image tower and a linear head; the head of the questions (dropped)",
        departures=(
            "An image-text teacher answers. Published: a multimodal language model, by its yes and no logits.",
            "By default a yes is weighed against the alternatives of its group, since such teachers hardly read a "
            "not. Published: yes against no, which is options: negation.",
            "Questions are part of the settings. Published: a language model writes and chooses 50 of them.",
            "The cross-entropy is the mean over labelled samples, the questions count in all.",
            "The published temperature is left out: the published loss does not read it.",
            "AdamW with this toolkit's schedule. Published: SGD for 240 epochs.",
        ),
        checked_against="makd_loss and forward_train of the published code, run on random logits: values and "
        "gradients, tests/methods/fixtures/makd.json",
    )

    yes: Float[Tensor, "questions dim"]
    no: Float[Tensor, "questions dim"]

    def __init__(
        self,
        config: MakdConfig,
        *,
        student: Classifier,
        teacher: FrozenTeacher | None = None,
        classes: ClassPrompts | None = None,
    ) -> None:
        super().__init__(config, student=student, teacher=teacher, classes=classes)
        assert teacher is not None
        self.config = config
        if isinstance(config.teacher_scale, float) and config.teacher_scale <= 0:
            raise ConfigError(f"method.teacher_scale is {config.teacher_scale:g}: give a number > 0, or own")
        if not config.questions:
            raise ConfigError(
                "makd asks questions, and method.questions has none: give groups of alternatives, as in "
                "{colour: [red, green, blue]}"
            )
        self.sizes = [len(entries) for entries in config.questions.values()]
        for number, (name, templates) in enumerate(self._texts().items()):
            self.register_buffer(name, self._vectors(teacher, templates, number))
        self.set_heads({LABELS_HEAD: ClassHeadConfig()})
        # a head of a term without weight would never learn
        self.question_head = nn.Linear(student.embed_dim, sum(self.sizes)) if config.question_weight else None

    def _texts(self) -> dict[str, tuple[str, ...]]:
        """The templates behind each buffer of vectors."""
        config = self.config
        return {"yes": config.templates} | ({"no": config.negations} if config.options == "negation" else {})

    def _vectors(
        self, teacher: FrozenTeacher, templates: tuple[str, ...], number: int
    ) -> Float[Tensor, "questions dim"]:
        """Unit vectors of all entries in these templates, or random ones.

        Raises:
            ConfigError: the teacher's text tower is untrained, or reads every entry in a template of its own.
        """
        asked = tuple(entry for entries in self.config.questions.values() for entry in entries)
        if self.config.answers == "random":
            draws = torch.Generator().manual_seed(number)
            return F.normalize(torch.randn(len(asked), teacher.embed_dim, generator=draws), dim=-1)
        if teacher.model.class_templates and self.config.options == "negation":
            raise ConfigError(
                f"the prompts of {teacher.name} are tuned for names, so it reads no negations: take options: contrast"
            )
        return frozen_class_vectors(teacher, ClassPrompts(asked, templates))

    @property
    def term_names(self) -> tuple[str, ...]:
        weights = {"labels": self.config.task_weight, "questions": self.config.question_weight}
        return tuple(name for name, weight in weights.items() if weight)

    @property
    def needs_labels(self) -> bool:
        return True

    def terms(self, batch: Batch) -> dict[str, Term]:
        config, features = self.config, self.features(batch)
        terms: dict[str, Term] = {}
        if self.wants("labels", config.task_weight):
            loss = labelled_cross_entropy(self.student.logits(LABELS_HEAD, features), self.labels(batch))
            terms["labels"] = Term(loss, config.task_weight)
        if self.question_head is not None and self.wants("questions", config.question_weight):
            answers = self.teacher_answers(batch)
            loss = answer_cross_entropy(self.question_head(features), answers)
            terms["questions"] = Term(loss, config.question_weight)
            sure = answers.clamp(1e-7, 1 - 1e-7)  # the least value that the term can have
            self.measurements["answer_entropy"] = answer_cross_entropy(sure.logit(), answers)
        return terms

    def teacher_answers(self, batch: Batch) -> Float[Tensor, "batch questions"]:
        """The teacher's probability of a yes to each question, without gradient."""
        teacher, hard = self.encode_teacher(batch), self.config.answers == "hard"
        scale = teacher.logit_scale if self.config.teacher_scale == "own" else self.config.teacher_scale
        scores = similarities(teacher.image.embedding, self.yes, scale)
        if self.config.options == "contrast":
            answers = answers_among(scores, self.sizes, hard=hard)
        else:
            against = similarities(teacher.image.embedding, self.no, scale)
            pairs = torch.stack([scores, against], dim=2).flatten(0, 1)  # a softmax over both is a yes over yes and no
            answers = answers_among(pairs, [2], hard=hard)[:, 0].view_as(scores)
        return answers.roll(1, 0) if self.config.answers == "shuffled" else answers

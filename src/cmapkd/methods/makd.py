"""MaKD (Lee et al., CVPR 2025 workshops, arXiv:2501.13341): questions about the picture beside the labels.

A classifier also answers questions: is it red, has it a tail? An image-text teacher gives the probability of a yes, as
it finds one text among others. A teacher that writes is asked once, before the first step.
Departures: the card below and docs/methods/makd.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.data.templates import ClassPrompts
from cmapkd.data.types import Batch
from cmapkd.features import gather_rows, sample_keys
from cmapkd.features.answer_table import AnswerTable
from cmapkd.methods.asked_teacher import WHY_NOT_CACHED, asked
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.classifying import LABELS_HEAD, ClassifierMethod
from cmapkd.methods.makd_config import MakdConfig
from cmapkd.methods.targets import Answered, Survey
from cmapkd.methods.terms import Term
from cmapkd.models import Classifier, FrozenTeacher, Model
from cmapkd.models.asked_writer import AskedWriter
from cmapkd.models.classifier import ClassHeadConfig
from cmapkd.models.texts import frozen_class_vectors
from cmapkd.objectives import answer_cross_entropy, answers_among, labelled_cross_entropy, similarities


class Makd(ClassifierMethod):
    """One head learns the labels, another one the teacher's answers to questions; the second is dropped."""

    Config: ClassVar[type[MethodConfig]] = MakdConfig
    learns_from: ClassVar[type[Model] | None] = Model  # of both contracts, see asked_teacher.py
    card: ClassVar[MethodCard] = MethodCard(
        title="MaKD: multi-aspect distillation, with an image-text teacher or one that writes",
        paper="Lee et al., CVPR 2025 workshops (FGVC), arXiv:2501.13341",
        equations=(
            "z_c = W₁ f + b₁, z_q = W₂ f + b₂: scores of C classes and Q questions; v: the teacher's image embedding",
            "t_q, t_q⁻: unit vectors of the texts that mean a yes and a no; s: teacher_scale",
            "contrast: a_q = σ(s v·t)_q over the alternatives t of the question's group",
            "negation: a_q = σ(s v·t_q, s v·t_q⁻), the first of the two",
            "a teacher that writes: a_q = p(yes) / (p(yes) + p(no)) of its first token, asked q about the picture",
            "L = task_weight CE(z_c, y) + question_weight mean BCE(z_q, a) over samples and questions",
        ),
        needs="questions; names of the classes, pictures with labels; embeddings of the teacher, or its first tokens",
        trainable="the student: its image tower and a linear head; the head of the questions (dropped)",
        departures=(
            "A teacher may be an image-text model. Published: a multimodal language model, by its yes and no logits.",
            "A teacher that writes sees the view in which the run reads a picture first. Published: the whole picture.",
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
        assert teacher is not None
        teacher = asked(teacher, config)
        writes = isinstance(teacher.model, AskedWriter)
        super().__init__(config, student=student, teacher=teacher, classes=classes)
        self.config = config
        self.table = (
            AnswerTable(sum(map(len, config.questions.values()))) if writes and config.question_weight else None
        )
        if isinstance(config.teacher_scale, float) and config.teacher_scale <= 0:
            raise ConfigError(f"method.teacher_scale is {config.teacher_scale:g}: give a number > 0, or own")
        if not config.questions:
            raise ConfigError(
                "makd asks questions, and method.questions has none: give groups of alternatives, as in "
                "{colour: [red, green, blue]}"
            )
        self.sizes = [len(entries) for entries in config.questions.values()]
        for number, (name, templates) in enumerate([] if writes else self._texts().items()):
            self.register_buffer(name, self._vectors(teacher, templates, number))
        self.set_heads({LABELS_HEAD: ClassHeadConfig()})
        if writes:
            self.not_cached = WHY_NOT_CACHED
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
        named = tuple(entry for entries in self.config.questions.values() for entry in entries)
        if self.config.answers == "random":
            draws = torch.Generator().manual_seed(number)
            return F.normalize(torch.randn(len(named), teacher.embed_dim, generator=draws), dim=-1)
        if teacher.model.class_templates and self.config.options == "negation":
            raise ConfigError(
                f"the prompts of {teacher.name} are tuned for names, so it reads no negations: take options: contrast"
            )
        return frozen_class_vectors(teacher, ClassPrompts(named, templates))

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
            scores = self.question_head(features)
            answers = self.teacher_answers(batch) if self.table is None else self._stored(self.table, batch, scores)
            loss = answer_cross_entropy(scores, answers)
            terms["questions"] = Term(loss, config.question_weight)
            sure = answers.clamp(1e-7, 1 - 1e-7)  # the least value that the term can have
            self.measurements["answer_entropy"] = answer_cross_entropy(sure.logit(), answers)
        return terms

    @property
    def prepares(self) -> bool:
        return self.table is not None

    @property
    def why_not_longer(self) -> str | None:
        return None if self.table is None else "the teacher was asked once, about the pictures of the shorter run"

    def prepare(self, survey: Survey) -> None:
        """Asks a teacher that writes about every picture."""
        assert self.table is not None
        answered = Answered.joined(survey(towers=("image",)))
        self.table.fill(answered.keys, answered.image.sigmoid())

    @property
    def structure(self) -> dict[str, Any]:
        return {} if self.table is None else {"answered": len(self.table.keys)}

    def restructure(self, structure: Mapping[str, Any]) -> None:
        if self.table is not None:
            self.table.resize(int(structure.get("answered", 0)), self.device)

    def _stored(self, table: AnswerTable, batch: Batch, scores: Tensor) -> Float[Tensor, "batch questions"]:
        """Probabilities of a yes that were found before the first step."""
        keys = gather_rows(sample_keys(batch.ids).to(self.device, non_blocking=True))
        answers = table.of(keys, scores.detach().sigmoid(), hard=self.config.answers == "hard")
        return answers.roll(1, 0) if self.config.answers == "shuffled" else answers

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

"""CMAPKD itself: what is trained, and the terms of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cmapkd.data.types import Batch
from cmapkd.features import (
    AlignmentBridge,
    EmbeddingBank,
    KeyTokens,
    LevelMatcher,
    PairProjector,
    References,
    Role,
)
from cmapkd.methods.banked import draw_references, embeddings_against_bank, keys_in_bank, make_bank
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.cmapkd.bank import level_against_bank, pairs_against_bank
from cmapkd.methods.cmapkd.card import CARD
from cmapkd.methods.cmapkd.config import CMAPKDConfig
from cmapkd.methods.cmapkd.cross_modal import Bridges, layer_relation
from cmapkd.methods.cmapkd.levels import INTRA, LevelRows
from cmapkd.methods.cmapkd.reading import LevelPlan, read_levels
from cmapkd.methods.cmapkd.selection import Context, Selecting
from cmapkd.methods.dual import TeacherDetail, task_loss
from cmapkd.methods.in_batch import embeddings_of, similarity_loss
from cmapkd.methods.own_scales import keep_in_range, new_scale
from cmapkd.methods.step import StepInfo
from cmapkd.methods.terms import Term
from cmapkd.models import DualEncoder, Features, FrozenTeacher, LevelRequest
from cmapkd.objectives import embedding_distance, interactive_loss, relation_distance

Losses = dict[str, dict[str, Float[Tensor, " batch"]]]  # of all processes' samples, by term and level or pair
Values = dict[str, Float[Tensor, ""]]  # of terms, by name; each a mean over all processes' samples

BANK_TERMS = ("bank", "bank_within", "bank_level", "bank_pair")


class CMAPKD(Selecting):
    """Distances at levels of both modalities beside interactive, relational and bank distillation of embeddings."""

    Config: ClassVar[type[MethodConfig]] = CMAPKDConfig
    contrasts = ("contrastive", "interactive", "alignment", "bridge")
    card: ClassVar[MethodCard] = CARD

    def __init__(self, config: CMAPKDConfig, *, student: DualEncoder, teacher: FrozenTeacher | None = None) -> None:
        super().__init__(config, student=student, teacher=teacher)
        assert teacher is not None
        self.config, self.term_weights = config, config.term_weights()
        ablations = config.ablations
        self.match = LevelMatcher(
            student,
            teacher.model,
            levels=config.compared(),
            grids=ablations.grids,
            top_down=ablations.top_down,
            phrase_window=ablations.phrase_window,
            places=config.places,
            key_tokens=KeyTokens(config.key_tokens, ablations.key_tokens_by),
            depths=ablations.depths,
        )
        has_bank = {*BANK_TERMS} & {*self.term_weights}
        self.project: PairProjector | None = None
        if {"P5", "L4"} & {*config.compared()} or config.interactive_weight or has_bank:
            shared = ablations.projector == "shared"
            self.project = PairProjector(student.embed_dim, teacher.embed_dim, shared=shared)
        self.interactive_scale = new_scale() if config.interactive_weight else None
        self.bank: EmbeddingBank | None = None
        if has_bank:
            self.bank = make_bank(config.bank, teacher, self._widths("teacher", config.levels_in_bank()))
        banked = config.levels_against_bank()
        student_widths, teacher_widths = self._widths("student", banked), self._widths("teacher", banked)
        self.project_levels = nn.ModuleDict(
            {level: nn.Linear(student_widths[level], teacher_widths[level]) for level in banked}
        )
        if config.bridged():
            self.bridge, self.teacher_bridge = self._make_bridge("student"), self._make_bridge("teacher")
            self.bridge_scale, self.teacher_bridge_scale = new_scale(), new_scale()
        self.items = config.weighed_items()
        self.weighting = self._make_weightings()

    def _make_bridge(self, role: Role) -> AlignmentBridge:
        widths = self._widths(role, self.config.bridged())
        visual, language = ({n: widths[n] for n in levels if n in widths} for levels in INTRA.values())
        return AlignmentBridge(visual, language, dim=self.config.ablations.bridge_dim)

    def _widths(self, role: Role, levels: Sequence[str]) -> dict[str, int]:
        """Of the vector that stands for each level of a model."""
        model = self.student if role == "student" else self.teacher
        assert model is not None
        visual, language = self.match.widths(role, levels)
        widths = visual | language | {"P5": model.embed_dim, "L4": model.embed_dim}
        return {level: widths[level] for level in levels}

    @property
    def plan(self) -> LevelPlan:
        """What the terms of the current stage read of the levels."""
        return LevelPlan(self.config, self.stage)

    @property
    def bridges(self) -> Bridges | None:
        """Both models' bridges; None where no term has any."""
        if not self.config.bridged():
            return None
        scales = self.bridge_scale, self.teacher_bridge_scale
        return Bridges(self.bridge, self.teacher_bridge, *scales, self.config.ablations.coupling)

    @property
    def term_names(self) -> tuple[str, ...]:
        return tuple(self.term_weights)

    @property
    def level_names(self) -> tuple[str, ...]:
        """Every level that some term reads."""
        return self.config.level_names()

    @property
    def matches_words(self) -> bool:
        return self.match.reads_words

    @property
    def student_needs(self) -> LevelRequest:
        return self.match.needs("student", self.plan.read())

    @property
    def teacher_needs(self) -> LevelRequest:
        return self.match.needs("teacher", self.plan.read())

    @property
    def teacher_detail(self) -> TeacherDetail:
        needs = self.teacher_needs
        return self.plan.detail(has_inner_levels=bool(needs.image_levels or needs.text_levels))

    @property
    def key_tokens(self) -> KeyTokens | None:
        return self.match.key_tokens if self.config.places == "key_tokens" else None

    def terms(self, batch: Batch) -> dict[str, Term]:
        """The terms of the stage. Embeddings and `LevelRows` are of all processes' samples, levels of this one's."""
        self._measure(batch)
        student, teacher, rows = self.encode_both(batch, self._read_levels)
        self.measurements = {}
        if self.training:
            self._observe(batch, student, teacher)
        projected = None if self.project is None else self.project(student)
        values: Values = {}
        if self._wants("contrastive"):
            values["contrastive"] = task_loss(student)
        if self._wants("relational"):
            values["relational"] = similarity_loss(student, teacher)
        if projected is not None:
            values |= self._embedding_terms(batch, projected, teacher, rows)
        models = {"teacher": teacher, "student": student}
        read = [role for role in self.config.ablations.selection_reads if role in models]
        context: Context = {role: _directions(models[role]) for role in read}
        levels = self._intra_modal_levels(projected, teacher, rows)
        cross_modal, pairs = self._cross_modal_terms(student, rows)
        self._look(levels | pairs)
        values |= {term: self._weigh(term, losses, context, rows) for term, losses in levels.items()}
        values |= cross_modal
        values |= {term: self._weigh(term, losses, context, rows) for term, losses in pairs.items()}
        counts = self._weights_of_terms()
        return {term: Term(value, self.term_weights[term] * counts.get(term, 1.0)) for term, value in values.items()}

    def _wants(self, term: str) -> bool:
        return term in self.term_weights and self.stage.wants_term(term)

    def _read_levels(self, part: Batch, student: Features, teacher: Features) -> LevelRows:
        return read_levels(self.match, self.plan, part, student, teacher)

    # ------------------------------------------------------------------------------------- embeddings, and the bank

    def _embedding_terms(self, batch: Batch, projected: Features, teacher: Features, rows: LevelRows) -> Values:
        """The student's projected embeddings against the teacher's: of this batch, and of the bank, with its levels."""
        values: Values = {}
        of_student, of_teacher = embeddings_of(projected), embeddings_of(teacher)
        if self.interactive_scale is not None and self._wants("interactive"):
            values["interactive"] = interactive_loss(
                *of_student,
                *of_teacher,
                logit_scale=self.interactive_scale.exp(),
                pictures=projected.pictures,
            )
        if self.bank is None:
            return values
        assert self.teacher is not None
        keys = keys_in_bank(self.bank, batch, self.teacher, of_teacher[0].device)
        generator = self.step.generator("bank")
        references = draw_references(self.bank, self.config.bank, keys, of_teacher[0], generator)
        for term in ("bank", "bank_within"):
            if self._wants(term):
                values[term] = embeddings_against_bank(
                    of_student, of_teacher, references, scale=teacher.logit_scale, same_modality=term == "bank_within"
                )
        values |= self._bank_level_terms(references, rows)
        if self.training and not self.bank.fixed:  # after they were compared with the bank, not before
            known = {level: rows.teacher[level] for level in self.bank.levels if level in rows.teacher}
            self.bank.push(*of_teacher, keys, known)
        return values

    def _bank_level_terms(self, references: References, rows: LevelRows) -> Values:
        """Inner levels against a bank of the teacher's: of the same level, and by the bridges of the other modality."""
        values: Values = {}
        levels = [level for level in self.project_levels if self.stage.wants_level(level)]
        if levels and self._wants("bank_level"):
            scale = self.config.ablations.bank_level_scale
            of_levels = [
                level_against_bank(
                    self.project_levels[level](rows.student[level]), rows.teacher[level], references, level, scale=scale
                )
                for level in levels
            ]
            values["bank_level"] = torch.stack(of_levels).mean()
        pairs = [pair for pair in self.config.coupled() if all(map(self.stage.wants_level, pair.split("-")))]
        if pairs and self.bridges is not None and self._wants("bank_pair"):
            values["bank_pair"] = pairs_against_bank(self.bridges, pairs, references, rows)
        return values

    # ----------------------------------------------------------------------------------------------------- the levels

    def _intra_modal_levels(self, projected: Features | None, teacher: Features, rows: LevelRows) -> Losses:
        """Each level against the teacher's same level, by term; the selection weighs them for each sample."""
        found: Losses = {}
        for term in INTRA:
            levels = self.plan.compared(term)
            if not levels:
                continue
            distances = {level: rows.distance[level] for level in levels if level in rows.distance}
            if projected is not None and levels[-1] == "P5":
                distances["P5"] = embedding_distance(projected.image.embedding, teacher.image.embedding)
            if projected is not None and levels[-1] == "L4":
                distances["L4"] = embedding_distance(projected.text.embedding, teacher.text.embedding)
            self.measurements |= {f"distance/{level}": value.detach().mean() for level, value in distances.items()}
            counts = self.config.visual_levels if term == "visual" else self.config.language_levels
            found[term] = {level: counts[level] * distance for level, distance in distances.items()}
        return found

    def _cross_modal_terms(self, student: Features, rows: LevelRows) -> tuple[Values, Losses]:
        """Levels of one modality against those of the other, and relations; each level as one vector a sample.

        Returns:
            The terms, and the losses of the coupled pairs by theirs, which the selection weighs for each sample.
        """
        values: Values = {}
        if not self.plan.pools():
            return values, {}
        levels = self.plan.of_stage()
        of_student, of_teacher = rows.vectors("student", levels), rows.vectors("teacher", levels)
        if self._wants("relation"):
            values["relation"] = torch.stack(
                [relation_distance(of_student[n], of_teacher[n]).mean() for n in of_student]
            ).mean()
        pairs = [pair for pair in self.config.coupled() if {*pair.split("-")} <= {*levels}]
        divergences: dict[str, Float[Tensor, " batch"]] = {}
        bridges = self.bridges
        if bridges is not None:
            mapped, targets = bridges.of_student(of_student), bridges.of_teacher(of_teacher)
            if pairs and self._wants("alignment"):
                values["alignment"] = bridges.contrast(pairs, mapped, bridges.student_scale, student.pictures)
            if pairs and self._wants("bridge"):
                values["bridge"] = bridges.contrast(pairs, targets, bridges.teacher_scale, student.pictures)
            if self._wants("layer_relation"):
                values["layer_relation"] = layer_relation(mapped, targets)
            if self._wants("pyramid"):
                divergences = bridges.divergences(pairs, mapped, targets)
        coupling = self.config.ablations.coupling
        weighed = {pair: coupling[pair] * divergence for pair, divergence in divergences.items()}
        return values, {"pyramid": weighed} if weighed else {}

    @torch.no_grad()
    def after_step(self, step: StepInfo | None = None) -> None:
        super().after_step(step)
        own = self.named_parameters(recurse=False)
        keep_in_range((parameter for name, parameter in own if name.endswith("_scale")), "exp")


def _directions(features: Features) -> Float[Tensor, "batch both"]:
    """Image and text embedding of each sample, at length one, one after the other."""
    return torch.cat([F.normalize(tower.embedding, dim=-1) for tower in (features.image, features.text)], dim=-1)

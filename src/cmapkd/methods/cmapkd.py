"""CMAPKD: a pyramid of levels in both modalities, aligned across them, weighted for each sample by a learned selection.

The terms follow the design: within a modality, across modalities, relations, and the embedding-level terms that carry
most. Equations, and the measurement behind every default: docs/methods/cmapkd.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, SerializeAsAny, field_validator, model_validator
from torch import Tensor, nn

from cmapkd.config import closest
from cmapkd.data.types import Batch
from cmapkd.features import (
    LANGUAGE_LEVELS,
    VISUAL_LEVELS,
    AlignmentBridge,
    BankStore,
    Depths,
    EmbeddingBank,
    KeyTokens,
    KeyTokensBy,
    LevelMatcher,
    PairProjector,
    Places,
    References,
    Role,
    gather_rows,
    sample_keys,
    standardise,
)
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.dual import DualEncoderMethod, TeacherDetail, task_loss
from cmapkd.methods.step import StepInfo
from cmapkd.methods.terms import Term
from cmapkd.models import MAX_LOGIT_SCALE, DualEncoder, Features, FrozenTeacher, Needs
from cmapkd.objectives import (
    bank_divergence,
    contrastive_loss,
    embedding_distance,
    interactive_loss,
    layer_relation_distance,
    level_distance,
    prior_coupling,
    pyramid_divergence,
    relation_distance,
)
from cmapkd.weighting import WEIGHTINGS, Weighting, WeightingConfig, for_items, make_weighting, weighting_config

Reading = Literal["teacher", "student", "losses"]
LEVELS = (*VISUAL_LEVELS, *LANGUAGE_LEVELS)
JOINT = "P5-L4"  # the pair that meets in the models' own joint space and needs no bridge
PAIRS = tuple(f"{visual}-{language}" for visual, language in product(VISUAL_LEVELS, LANGUAGE_LEVELS))
INTRA = {"visual": VISUAL_LEVELS, "language": LANGUAGE_LEVELS}
POOLING = ("bank_level", "bank_pair", "pyramid", "alignment", "bridge", "relation", "layer_relation")
"""Terms that read each level as one vector."""
INNER = tuple(level for level in LEVELS if level not in ("P5", "L4"))


def _prior() -> dict[str, float]:
    return {pair: value for pair, value in zip(PAIRS, prior_coupling().flatten().tolist(), strict=True) if value}


class CMAPKDConfig(MethodConfig):
    """What each term counts and which levels it reads; a weight of zero switches a computation off."""

    task_weight: float = Field(1.0, ge=0, description="Weight of the student's own contrastive loss.")
    interactive_weight: float = Field(1.0, ge=0, description="Weight of InfoNCE against the teacher's other modality.")
    bank_weight: float = Field(1.0, ge=0, description="Weight of the KL over a bank of the other modality.")
    bank_within_weight: float = Field(0.0, ge=0, description="Weight of the KL over a bank of the same modality.")
    bank_level_weight: float = Field(
        0.0, ge=0, description="Weight of the KL over a bank of the teacher's vectors of the same inner level."
    )
    bank_level_scale: float = Field(
        14.3, gt=0, description="Logit scale of these cosines, which are taken about the bank's mean."
    )
    bank_pair_weight: float = Field(
        0.0, ge=0, description="Weight of the KL at the coupled inner pairs, over a bank of the other modality's level."
    )
    bank_size: int = Field(8192, ge=1, description="Pairs of teacher embeddings in the bank.")
    bank_from: Literal["run", "cache"] = Field(
        "run", description="run: the pairs it has seen last; cache: a fixed draw from the teacher's cache."
    )
    bank_store: BankStore = Field("fp16", description="Of the bank's numbers; fp16 is off by one part in 2048.")
    bank_sample: int | None = Field(
        2048, ge=2, description="Pairs drawn from the bank at each step to compare with; none: all of it."
    )
    bank_duplicates: float | None = Field(
        None, gt=0, lt=1, description="Cosine of two images above which they count as the same; none: by name only."
    )
    projector: Literal["shared", "own"] = Field(
        "shared", description="Of the embeddings to the teacher's width: one map for both modalities, or one each."
    )
    visual_weight: float = Field(1.0, ge=0, description="Weight of the visual pyramid within its modality.")
    language_weight: float = Field(1.0, ge=0, description="Weight of the language hierarchy within its modality.")
    visual_levels: dict[str, float] = Field(
        {"P2": 16.0, "P5": 1.0}, description="What each visual level counts before the selection; others are not read."
    )
    language_levels: dict[str, float] = Field(
        {"L1": 16.0, "L2": 16.0, "L3": 16.0, "L4": 1.0}, description="What each language level counts, likewise."
    )
    pyramid_weight: float = Field(0.0, ge=0, description="Weight of the KL between coupled levels of both modalities.")
    coupling: dict[str, float] = Field(
        default_factory=_prior, description="What each pair of levels counts there; P5-L4 uses the joint space."
    )
    alignment_weight: float = Field(0.0, ge=0, description="Weight of the student's InfoNCE at the coupled pairs.")
    relation_weight: float = Field(0.0, ge=0, description="Weight of the Gram matrices over the batch, by level.")
    layer_relation_weight: float = Field(0.0, ge=0, description="Weight of the cosines between a sample's levels.")
    weighting: SerializeAsAny[WeightingConfig] = Field(
        default_factory=lambda: weighting_config("uniform"), description="Who decides how much each level counts."
    )
    selection_reads: tuple[Reading, ...] = Field(
        ("teacher",),
        min_length=1,
        description="What a gate or policy sees of a sample: embeddings of teacher or student, losses of the levels.",
    )
    grids: Literal["native"] | dict[str, float] = Field(
        "native", description="native: the student's own grids; or factors of its patch grid by level (P2: 4, ...)."
    )
    places: Places = Field(
        "dense", description="Where inner levels are compared: every place, the key tokens, or one pooled vector each."
    )
    key_tokens: int = Field(16, ge=1, description="Key tokens of a level, for places: key_tokens.")
    key_tokens_by: KeyTokensBy = Field("class", description="What makes a token key: see `features.KeyTokens`.")
    depths: Depths = Field(
        "last", description="What an inner level is of its depth group: the last block's output, or the blocks' mean."
    )
    top_down: bool = Field(False, description="A feature pyramid network in place of one linear map for each level.")
    phrase_window: int = Field(3, ge=1, description="Words in a phrase of L2.")
    bridge_dim: int = Field(256, ge=1, description="Width of the space in which levels of both modalities meet.")

    @field_validator("weighting", mode="before")
    @classmethod
    def _selection_by_name(cls, value: Any) -> Any:
        return value if isinstance(value, WeightingConfig) else weighting_config(value)

    @model_validator(mode="after")
    def _selection_reads_it(self) -> Self:
        read, name = self.selection_reads, self.weighting.name
        if len({*read}) < len(read):
            raise ValueError(f"selection_reads names something twice: {', '.join(read)}")
        if read != ("teacher",) and not WEIGHTINGS[name].reads_context:
            raise ValueError(
                f"selection_reads is for weightings that look at such a context, and {name} does not: leave it out, or "
                "take weighting gate or policy"
            )
        return self

    @model_validator(mode="after")
    def _levels_are_known(self) -> Self:
        for name, known in (
            ("visual_levels", VISUAL_LEVELS),
            ("language_levels", LANGUAGE_LEVELS),
            ("coupling", PAIRS),
        ):
            for level, weight in getattr(self, name).items():
                if level not in known:
                    raise ValueError(f"{name}: unknown {level!r}{closest(level, known)}; known: {', '.join(known)}")
                if weight < 0:
                    raise ValueError(f"{name}: {level} is {weight:g}, weights are not negative")
        return self

    @model_validator(mode="after")
    def _places_fit(self) -> Self:
        if self.places != "dense" and (self.top_down or self.grids != "native"):
            raise ValueError(f"places: {self.places} has no grids to resample: leave top_down and grids as they are")
        if self.places == "key_tokens" and self.depths == "mean":
            raise ValueError("each block has key tokens of its own, so their mean has none: take depths: last")
        return self

    @model_validator(mode="after")
    def _bank_has_levels(self) -> Self:
        if self.bank_from == "cache" and (self.bank_level_weight or self.bank_pair_weight):
            raise ValueError(
                "bank_from: cache holds embeddings only: for bank_level_weight and bank_pair_weight take bank_from: run"
            )
        return self

    def weight_of(self, level: str) -> float:
        """What a level counts within its modality; 0: it is not compared with the teacher's."""
        of_modality = (
            (self.visual_weight, self.visual_levels)
            if level in VISUAL_LEVELS
            else (self.language_weight, self.language_levels)
        )
        return of_modality[0] and of_modality[1].get(level, 0.0)

    def coupled(self) -> dict[str, float]:
        """What each pair of levels counts where modalities meet; pairs that count nothing are left out."""
        wanted = self.pyramid_weight or self.alignment_weight or self.bank_pair_weight
        return {pair: self.coupling[pair] for pair in PAIRS if self.coupling.get(pair)} if wanted else {}

    def bridged(self) -> tuple[str, ...]:
        """Levels that are mapped into the space which both modalities share."""
        levels = {level for pair in self.coupled() if pair != JOINT for level in pair.split("-")}
        return tuple(level for level in LEVELS if level in levels or self.layer_relation_weight)

    def inner_pairs(self) -> tuple[str, ...]:
        """The coupled pairs that meet in the bridges' space."""
        return tuple(pair for pair in self.coupled() if pair != JOINT)

    def banked_levels(self) -> tuple[str, ...]:
        """Inner levels that are compared with a bank of the teacher's."""
        return tuple(level for level in INNER if self.bank_level_weight and self.weight_of(level))

    def term_weights(self) -> dict[str, float]:
        """The terms that count, with their weights."""
        inner_pairs = self.inner_pairs()
        weights = {
            "contrastive": self.task_weight,
            "interactive": self.interactive_weight,
            "bank": self.bank_weight,
            "bank_within": self.bank_within_weight,
            "bank_level": self.bank_level_weight if self.banked_levels() else 0.0,
            "bank_pair": self.bank_pair_weight if inner_pairs else 0.0,
            **{
                term: weight if any(map(self.weight_of, INTRA[term])) else 0.0
                for term, weight in (("visual", self.visual_weight), ("language", self.language_weight))
            },
            "pyramid": self.pyramid_weight if self.coupled() else 0.0,
            "alignment": self.alignment_weight if inner_pairs else 0.0,
            "bridge": 1.0 if inner_pairs and (self.pyramid_weight or self.bank_pair_weight) else 0.0,
            "relation": self.relation_weight,
            "layer_relation": self.layer_relation_weight,
        }
        return {term: weight for term, weight in weights.items() if weight}


class CMAPKD(DualEncoderMethod):
    """Levels of both modalities, aligned and weighted, on top of interactive and bank distillation of embeddings."""

    Config: ClassVar[type[MethodConfig]] = CMAPKDConfig
    card: ClassVar[MethodCard] = MethodCard(
        title="CMAPKD: cross-modal adaptive pyramid knowledge distillation",
        paper="this project's own (docs/methods/cmapkd.md), on the embedding terms of CLIP-KD, arXiv:2307.12732",
        equations=(
            "L_v = mean_b Σ_i w_v[b,i] λ_i d_i[b], d_i = mean |LN(proj_i(S_i)) - LN(T_i)|² for P2 to P4, "
            "d_P5 = |N(s) - N(t)|²; L_l the same over L1 to L4",
            "L_pyr = mean_b Σ_ij w_c[b,ij] α_ij KL(P_T(v_i, l_j) ‖ P_S(v_i, l_j)), both directions, P the in-batch "
            "softmax of the bridged levels; (P5, L4) in the joint space",
            "L_int = 1/2 [CE(c v̂ t_Tᵀ, diag) + CE(c t̂ v_Tᵀ, diag)]",
            "L_bank = 1/2 mean_b [KL(σ(s_T v_T Bᵀ) ‖ σ(s_T v̂ Bᵀ)) + the same for texts], B a bank of the teacher's "
            "embeddings of the other modality; by level B the teacher's vectors of that level, or bridged of the other "
            "modality's",
            "L_rel = |G_T - G_S|²_F / B² by level; L_lrel = |R_T - R_S|² / 16, R the cosines between a sample's levels",
            "L = λ_task L_contrastive + λ_int L_int + λ_bank L_bank + λ_v L_v + λ_l L_l + λ_pyr L_pyr + λ_rel L_rel + "
            "λ_lrel L_lrel",
        ),
        needs="embeddings, logit scales and the tapped levels of both towers of both models",
        trainable="the student, projectors of its levels, both bridges and their scales, the selection network",
        departures=(
            "The teacher's side of the pyramid has no parameters; a shared trainable pyramid is a moving target.",
            "Losses are kept by sample until they are weighted; per-sample weights on an averaged loss do nothing.",
            "Interactive and bank terms are added: they carry most of the gain.",
            "Levels meet on the student's own grid; enlarging a grid adds cost and no information.",
        ),
        checked_against="every objective written out in loops, gradcheck; no published code exists",
    )

    def __init__(self, config: CMAPKDConfig, *, student: DualEncoder, teacher: FrozenTeacher | None = None) -> None:
        super().__init__(config, student=student, teacher=teacher)
        assert teacher is not None
        self.config, self.term_weights = config, config.term_weights()
        compared = [level for level in LEVELS if config.weight_of(level)]
        self.match = LevelMatcher(
            student,
            teacher.model,
            levels=compared,
            grids=config.grids,
            top_down=config.top_down,
            phrase_window=config.phrase_window,
            places=config.places,
            key_tokens=KeyTokens(config.key_tokens, config.key_tokens_by),
            depths=config.depths,
        )
        has_bank = {"bank", "bank_within", "bank_level", "bank_pair"} & {*self.term_weights}
        projected = {"P5", "L4"} & {*compared} or config.interactive_weight or has_bank
        self.project = (
            PairProjector(student.embed_dim, teacher.embed_dim, shared=config.projector == "shared")
            if projected
            else None
        )
        self.interactive_scale = _log_scale() if config.interactive_weight else None
        banked = config.banked_levels()
        of_pairs = {level for pair in config.inner_pairs() if config.bank_pair_weight for level in pair.split("-")}
        self.bank = (
            EmbeddingBank(
                config.bank_size,
                teacher.embed_dim,
                store=config.bank_store,
                fixed=config.bank_from == "cache",
                levels=self._widths("teacher", [level for level in LEVELS if level in {*banked, *of_pairs}]),
            )
            if has_bank
            else None
        )
        ours, theirs = self._widths("student", banked), self._widths("teacher", banked)
        self.project_levels = nn.ModuleDict({level: nn.Linear(ours[level], theirs[level]) for level in banked})
        if config.bridged():
            self.bridge, self.teacher_bridge = self._bridge("student"), self._bridge("teacher")
            self.bridge_scale, self.teacher_bridge_scale = _log_scale(), _log_scale()
        self.items = {
            **{term: tuple(level for level in INTRA[term] if config.weight_of(level)) for term in INTRA},
            "pyramid": tuple(config.coupled()),
        }
        weighted = {term: items for term, items in self.items.items() if term in self.term_weights}
        configs = for_items(config.weighting, weighted)
        self.weighting = nn.ModuleDict(
            {
                term: make_weighting(
                    configs[term],
                    items=items,
                    context_dim=self._context_width(len(items)),
                    level_widths=self._item_widths(items),
                )
                for term, items in weighted.items()
            }
        )

    def _widths(self, role: Role, levels: Sequence[str]) -> dict[str, int]:
        """Of the vector that stands for each level of a model."""
        model = self.student if role == "student" else self.teacher
        assert model is not None
        visual, language = self.match.widths(role, levels)
        widths = visual | language | {"P5": model.embed_dim, "L4": model.embed_dim}
        return {level: widths[level] for level in levels}

    def _context_width(self, num_items: int) -> int:
        """Of what a gate or policy sees of a sample."""
        assert self.teacher is not None
        widths = {"teacher": 2 * self.teacher.embed_dim, "student": 2 * self.student.embed_dim, "losses": num_items}
        return sum(widths[each] for each in self.config.selection_reads)

    def _item_widths(self, items: Sequence[str]) -> list[int]:
        """Of the teacher's vectors of each level, or of both levels of a pair together."""
        widths = self._widths("teacher", LEVELS)
        return [sum(widths[level] for level in item.split("-")) for item in items]

    def _bridge(self, role: Role) -> AlignmentBridge:
        widths = self._widths(role, self.config.bridged())
        visual, language = ({n: widths[n] for n in levels if n in widths} for levels in INTRA.values())
        return AlignmentBridge(visual, language, dim=self.config.bridge_dim)

    @property
    def term_names(self) -> tuple[str, ...]:
        return tuple(self.term_weights)

    @property
    def level_names(self) -> tuple[str, ...]:
        """Every level that some term reads."""
        config = self.config
        of_pairs = {level for pair in config.coupled() for level in pair.split("-")}
        everything = config.relation_weight or config.layer_relation_weight
        return tuple(level for level in LEVELS if everything or config.weight_of(level) or level in of_pairs)

    @property
    def student_needs(self) -> Needs:
        return self.match.needs("student", self._levels_read())

    @property
    def teacher_needs(self) -> Needs:
        return self.match.needs("teacher", self._levels_read())

    @property
    def teacher_detail(self) -> TeacherDetail:
        """Only distances place by place need more than one vector a level; L3 is one."""
        places = {level for term, levels in INTRA.items() if self._wants(term) for level in self.items[term]}
        needs = self.teacher_needs
        if places - {"P5", "L4", "L3"}:
            return self.config.places
        return "pooled" if needs.image_levels or needs.text_levels else "global"

    @property
    def key_tokens(self) -> KeyTokens | None:
        return self.match.key_tokens if self.config.places == "key_tokens" else None

    def _levels_read(self) -> set[str]:
        """Levels that the terms of this stage read."""
        read = {*self.level_names} if self._pooling() else set[str]()
        read = {level for level in read if self.stage.wants_level(level)}
        return read.union(*map(self._compared, INTRA))

    def _pooling(self) -> bool:
        """Whether some term of this stage reads each level as one vector."""
        return any(map(self._wants, POOLING))

    def _attending(self) -> bool:
        """Whether the selection of this stage looks at the teacher's levels, each as one vector."""
        return any(
            isinstance(weighting, Weighting) and weighting.reads_levels and self._wants(term)
            for term, weighting in self.weighting.items()
        )

    def _compared(self, term: str) -> list[str]:
        """Levels that an intra-modal term compares with the teacher's in this stage."""
        return [level for level in self.items[term] if self._wants(term) and self.stage.wants_level(level)]

    def _wants(self, term: str) -> bool:
        return term in self.term_weights and self.stage.wants_term(term)

    def terms(self, batch: Batch) -> dict[str, Term]:
        student, teacher, rows = self.encode_both(batch, self._read_levels)
        self.measurements = {}
        if self.training:
            self._observe(student, teacher)
        projected = None if self.project is None else self.project(student)
        values: dict[str, Tensor] = {}
        if self._wants("contrastive"):
            values["contrastive"] = task_loss(student)
        if projected is not None:
            values |= self._embedding_terms(batch, projected, teacher, rows)
        models = {"teacher": teacher, "student": student}
        seen: dict[str, Tensor] = {
            each: _directions(models[each]) for each in self.config.selection_reads if each in models
        }
        values |= self._intra_modal_terms(projected, teacher, rows, seen)
        values |= self._cross_modal_terms(student, teacher, rows, seen)
        return {term: Term(value, self.term_weights[term]) for term, value in values.items()}

    def _read_levels(self, batch: Batch, student: Features, teacher: Features) -> dict[str, Tensor]:
        """What the terms need of each sample's levels: distances from the teacher's, and each level as one vector."""
        rows: dict[str, Tensor] = {}
        for term in INTRA:
            levels = self._compared(term)
            if not levels:
                continue
            matched = (
                self.match.match_visual(student, teacher, levels)
                if term == "visual"
                else self.match.match_language(batch, student, teacher, levels)
            )
            rows |= {f"distance/{n}": level_distance(it.student, it.teacher, it.mask) for n, it in matched.items()}
        levels = [level for level in self.level_names if self.stage.wants_level(level)]
        if self._pooling():
            ours = self.match.pooled("student", student, levels)
            rows |= {f"student/{level}": vectors for level, vectors in ours.items()}
        if self._pooling() or self._attending():
            read = {*self._levels_read(), "P5", "L4"}
            theirs = self.match.pooled("teacher", teacher, [level for level in levels if level in read])
            rows |= {f"teacher/{level}": vectors for level, vectors in theirs.items()}
        return rows

    def _embedding_terms(
        self, batch: Batch, projected: Features, teacher: Features, rows: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The student's projected embeddings against the teacher's: of this batch, and of the bank, with its levels."""
        values: dict[str, Tensor] = {}
        ours, theirs = ((each.image.embedding, each.text.embedding) for each in (projected, teacher))
        if self.interactive_scale is not None and self._wants("interactive"):
            values["interactive"] = interactive_loss(*ours, *theirs, logit_scale=self.interactive_scale.exp())
        if self.bank is None:
            return values
        keys = gather_rows(self._keys_in_bank(self.bank, batch).to(teacher.image.embedding.device))
        found = self.bank.references(
            keys, num=self.config.bank_sample, images=theirs[0], duplicates_above=self.config.bank_duplicates
        )
        banks = (found.image, found.text)
        for term, references in (("bank", banks[::-1]), ("bank_within", banks)):
            if self._wants(term):
                divergences = [
                    bank_divergence(
                        anchors,
                        targets,
                        reference,
                        student_scale=teacher.logit_scale,
                        teacher_scale=teacher.logit_scale,
                        exclude=found.exclude,
                        frozen=True,
                    ).mean()
                    for anchors, targets, reference in zip(ours, theirs, references, strict=True)
                ]
                values[term] = torch.stack(divergences).mean()
        values |= self._bank_level_terms(found, rows)
        if self.training and not self.bank.fixed:  # after they were compared with the bank, not before
            known = {name: rows[row] for name in self.bank.levels if (row := f"teacher/{name}") in rows}
            self.bank.push(*theirs, keys, known)
        return values

    def _bank_level_terms(self, found: References, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inner levels against a bank of the teacher's: of the same level, and by the bridges of the other modality."""
        values: dict[str, Tensor] = {}
        levels = [level for level in self.project_levels if self.stage.wants_level(level)]
        if levels and self._wants("bank_level"):
            values["bank_level"] = torch.stack([self._bank_within_level(level, found, rows) for level in levels]).mean()
        pairs = [pair for pair in self.config.inner_pairs() if all(map(self.stage.wants_level, pair.split("-")))]
        if pairs and self._wants("bank_pair"):
            values["bank_pair"] = self._bank_of_pairs(pairs, found, rows)
        return values

    def _bank_within_level(self, level: str, found: References, rows: Mapping[str, Tensor]) -> Tensor:
        entries, exclude = found.of_level(level)
        entries, known = standardise(entries), entries.any(-1, keepdim=True)
        # every picture's early features have much in common: what tells them apart is what lies about their mean
        middle = (entries * known).sum(0) / known.sum().clamp_min(1)
        ours, theirs = self.project_levels[level](rows[f"student/{level}"]), rows[f"teacher/{level}"]
        scale = self.config.bank_level_scale
        return bank_divergence(
            standardise(ours) - middle,
            standardise(theirs) - middle,
            entries - middle,
            student_scale=scale,
            teacher_scale=scale,
            exclude=exclude,
        ).mean()

    def _bank_of_pairs(self, pairs: Sequence[str], found: References, rows: Mapping[str, Tensor]) -> Tensor:
        ours, theirs = ({n: rows[f"{role}/{n}"] for n in _levels_of(pairs)} for role in ("student", "teacher"))
        mapped, targets = self._bridge_all(ours, theirs)
        banks = {level: found.of_level(level) for level in theirs}
        with torch.no_grad():
            entries = self._bridge_all({}, {level: vectors for level, (vectors, _) in banks.items()})[1]
        total = torch.zeros((), device=self.bridge_scale.device)
        for pair in pairs:
            for anchor, other in (pair.split("-"), pair.split("-")[::-1]):
                divergence = bank_divergence(
                    mapped[anchor],
                    targets[anchor],
                    entries[other],
                    student_scale=self.bridge_scale.exp(),
                    teacher_scale=self.teacher_bridge_scale.exp().detach(),
                    exclude=banks[other][1],
                )
                total = total + self.config.coupling[pair] / 2 * divergence.mean()
        return total / sum(self.config.coupling[pair] for pair in pairs)

    def _keys_in_bank(self, bank: EmbeddingBank, batch: Batch) -> Tensor:
        """What names this process's samples in the bank; fills a fixed one when it is first asked for."""
        if not bank.fixed:
            return sample_keys(batch.ids)
        assert self.teacher is not None
        if not bank.filled:
            bank.fill(self.teacher.reference_embeddings(bank.size))
        return batch.stored["teacher"].samples

    def _intra_modal_terms(
        self, projected: Features | None, teacher: Features, rows: Mapping[str, Tensor], seen: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Each level against the teacher's same level, weighted for each sample."""
        values: dict[str, Tensor] = {}
        for term in INTRA:
            levels = self._compared(term)
            if not levels:
                continue
            distances = {level: rows[name] for level in levels if (name := f"distance/{level}") in rows}
            if projected is not None and levels[-1] == "P5":
                distances["P5"] = embedding_distance(projected.image.embedding, teacher.image.embedding)
            if projected is not None and levels[-1] == "L4":
                distances["L4"] = embedding_distance(projected.text.embedding, teacher.text.embedding)
            self.measurements |= {f"distance/{level}": value.detach().mean() for level, value in distances.items()}
            counts = self.config.visual_levels if term == "visual" else self.config.language_levels
            counted = {level: counts[level] * distance for level, distance in distances.items()}
            values[term] = self._weigh(term, counted, seen, rows)
        return values

    def _cross_modal_terms(
        self, student: Features, teacher: Features, rows: Mapping[str, Tensor], seen: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Levels of one modality against those of the other, and relations; each level as one vector a sample."""
        values: dict[str, Tensor] = {}
        if not self._pooling():
            return values
        levels = [level for level in self.level_names if self.stage.wants_level(level)]
        ours, theirs = ({level: rows[f"{role}/{level}"] for level in levels} for role in ("student", "teacher"))
        if self._wants("relation"):
            values["relation"] = torch.stack([relation_distance(ours[n], theirs[n]).mean() for n in ours]).mean()
        pairs = [pair for pair in self.config.coupled() if {*pair.split("-")} <= {*levels}]
        inner = [pair for pair in pairs if pair != JOINT]
        mapped, targets = self._bridge_all(ours, theirs)
        if inner and self._wants("alignment"):
            values["alignment"] = self._contrast(inner, mapped, self.bridge_scale)
        if inner and self._wants("bridge"):
            values["bridge"] = self._contrast(inner, targets, self.teacher_bridge_scale)
        if self._wants("layer_relation"):
            values["layer_relation"] = _layer_relation(mapped, targets)
        if pairs and self._wants("pyramid"):
            divergences = self._divergences(inner, mapped, targets)
            if JOINT in pairs:
                divergences[JOINT] = _joint_divergence(student, teacher)
            counts = self.config.coupling
            counted = {pair: counts[pair] * divergences[pair] for pair in pairs}
            values["pyramid"] = self._weigh("pyramid", counted, seen, rows)
        return values

    def _bridge_all(
        self, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Both models' levels in the space of their own bridge. No gradient reaches a model through the teacher's."""
        wanted = self.config.bridged()
        if not wanted:
            return {}, {}
        mapped, targets = (
            bridge(*({n: vectors[n] for n in levels if n in wanted and n in vectors} for levels in INTRA.values()))
            for bridge, vectors in ((self.bridge, ours), (self.teacher_bridge, theirs))
        )
        return mapped[0] | mapped[1], targets[0] | targets[1]

    def _contrast(self, pairs: list[str], vectors: Mapping[str, Tensor], log_scale: Tensor) -> Tensor:
        """InfoNCE at the coupled pairs, each counting what its coupling says."""
        total = torch.zeros((), device=log_scale.device)
        for pair in pairs:
            visual, language = (vectors[level] for level in pair.split("-"))
            loss = contrastive_loss(visual, language, logit_scale=log_scale.exp())
            total = total + self.config.coupling[pair] * loss
        return total / sum(self.config.coupling[pair] for pair in pairs)

    def _divergences(
        self, pairs: list[str], mapped: Mapping[str, Tensor], targets: Mapping[str, Tensor]
    ) -> dict[str, Float[Tensor, " batch"]]:
        """KL between the models' similarities at each of the pairs, for each sample."""
        if not pairs:
            return {}
        visual, language = ([n for n in levels if any(n in pair for pair in pairs)] for levels in INTRA.values())
        values = pyramid_divergence(
            *(torch.stack([side[n] for n in names]) for side in (mapped, targets) for names in (visual, language)),
            coupling=torch.tensor([[float(f"{v}-{t}" in pairs) for t in language] for v in visual]),
            student_scale=self.bridge_scale.exp(),
            teacher_scale=self.teacher_bridge_scale.exp(),
        )
        places = {f"{v}-{t}": (i, j) for (i, v), (j, t) in product(enumerate(visual), enumerate(language))}
        return {pair: values[:, *places[pair]] for pair in pairs}

    def _weigh(
        self,
        term: str,
        losses: Mapping[str, Float[Tensor, " batch"]],
        seen: Mapping[str, Tensor],
        rows: Mapping[str, Tensor],
    ) -> Tensor:
        """A term's levels or pairs as one number, each sample's by the weights that the selection gives it."""
        weighting, items = self.weighting[term], self.items[term]
        assert isinstance(weighting, Weighting)
        none = torch.zeros_like(next(iter(losses.values())))
        columns = torch.stack([losses.get(item, none) for item in items], dim=-1)
        parts = [columns if each == "losses" else seen[each] for each in self.config.selection_reads]
        context = torch.cat(self._vectors(items, rows, none) if weighting.reads_levels else parts, dim=-1)
        active = torch.tensor([item in losses for item in items])
        weighted = weighting(columns, context, None if len(losses) == len(items) else active)
        self.measurements |= {f"{term}/{name}": value for name, value in weighted.log.items()}
        loss: Tensor = weighted.loss
        return loss

    def _vectors(self, items: Sequence[str], rows: Mapping[str, Tensor], like: Tensor) -> list[Tensor]:
        """The teacher's vectors of the items' levels; zeros for a level that the stage does not read."""
        widths = self._widths("teacher", LEVELS)
        return [
            rows.get(f"teacher/{level}", like.new_zeros(len(like), widths[level]))
            for item in items
            for level in item.split("-")
        ]

    @torch.no_grad()
    def _observe(self, student: Features, teacher: Features) -> None:
        """Tells the selection how far the student is from the teacher on this batch, which it has not trained on."""
        listening = [each for each in self.weighting.values() if isinstance(each, Weighting) and each.listens]
        if listening:
            held_out = _joint_divergence(student, teacher).mean()
            for weighting in listening:
                weighting.observe(held_out)

    @torch.no_grad()
    def after_step(self, step: StepInfo) -> None:
        super().after_step(step)
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("_scale"):
                parameter.clamp_(0.0, math.log(MAX_LOGIT_SCALE))


def _directions(features: Features) -> Float[Tensor, "batch both"]:
    """Image and text embedding of each sample, at length one, beside each other."""
    return torch.cat([F.normalize(tower.embedding, dim=-1) for tower in (features.image, features.text)], dim=-1)


def _log_scale() -> nn.Parameter:
    return nn.Parameter(torch.tensor(math.log(1 / 0.07)))


def _levels_of(pairs: Sequence[str]) -> list[str]:
    """The levels of pairs, each once, fine to coarse."""
    return [level for level in LEVELS if any(level in pair.split("-") for pair in pairs)]


def _joint_divergence(student: Features, teacher: Features) -> Float[Tensor, " batch"]:
    """Contrastive relational distillation, for each sample: KL of the similarities in the models' own joint spaces."""
    towers = (student.image, student.text, teacher.image, teacher.text)
    values = pyramid_divergence(
        *(tower.embedding[None] for tower in towers),
        coupling=torch.ones(1, 1),
        student_scale=student.logit_scale,
        teacher_scale=teacher.logit_scale,
    )
    return values[:, 0, 0]


def _layer_relation(mapped: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
    """Cosines between the levels of a sample within each modality, student's against teacher's."""
    values = []
    for levels in INTRA.values():
        names = [name for name in levels if name in mapped]
        ours, theirs = (torch.stack([side[name] for name in names], dim=1) for side in (mapped, targets))
        values.append(layer_relation_distance(ours, theirs).mean())
    return torch.stack(values).mean()

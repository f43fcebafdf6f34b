"""MST-Distill (Li et al., ACM MM 2025, arXiv:2507.07015): a mixture of specialised teachers of other modalities.

Small networks on frozen embeddings of picture and caption learn the classes beside the student. Masks then make several
specialists of each, and a gate sends each picture to one. Departures: the card below and docs/methods/mst_distill.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from math import ceil, floor
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.data.templates import ClassPrompts
from cmapkd.data.types import Batch
from cmapkd.features.specialists import Specialists
from cmapkd.methods.card import MethodCard, MethodConfig
from cmapkd.methods.classifying import LABELS_HEAD, ClassifierMethod
from cmapkd.methods.mst_config import STAGES, TOWERS, TRAINED_BY, MstDistillConfig, Reads
from cmapkd.methods.stages import StageConfig
from cmapkd.methods.terms import Term
from cmapkd.models import Classifier, FrozenTeacher, LevelRequest
from cmapkd.models.classifier import ClassHeadConfig
from cmapkd.objectives import (
    balance_divergence,
    kl_divergence,
    labelled_cross_entropy,
    mutual_divergence,
    routed_divergence,
)
from cmapkd.objectives.common import unit


class MstDistill(ClassifierMethod):
    """The student learns beside networks of other modalities, then from that specialist which its gate chooses."""

    Config: ClassVar[type[MethodConfig]] = MstDistillConfig
    several_teachers: ClassVar[bool] = True
    pictures_alone: ClassVar[bool] = True
    card: ClassVar[MethodCard] = MethodCard(
        title="MST-Distill: a mixture of specialised teachers for cross-modal distillation",
        paper="Li et al., ACM MM 2025, arXiv:2507.07015",
        equations=(
            "z: the student's scores of the classes; z_n: those of network n, on embeddings of caption and picture",
            "KL(a ‖ b) at T: T² KL(σ(a/T) ‖ σ(b/T)), T = 4",
            "z_n,j: z_n with m_j(h_j) h_j in place of layer j's values h_j; g = σ(gate(z)), e = argmax g of E",
            "L = CE(z, y) + Σ_n CE(z_n, y) + Σ KL(a ‖ b) over ordered pairs of z and the z_n (stage together)",
            "L = Σ_n,j KL(z ‖ z_n,j), z detached (stage masks)",
            "L = CE(z, y) + w KL(z_e ‖ z) + b KL(uniform ‖ mean g) / E, z_e detached (stage distil)",
        ),
        needs="labels and names of the classes, captions; embeddings of one or more teachers",
        trainable="the student: its image tower and a linear head; networks, masks and gate (dropped)",
        departures=(
            "Networks read embeddings of frozen towers, as published for CrisisMMD alone. Elsewhere the published "
            "teachers are whole networks that learn with the student.",
            "Stages have 20, 10 and 70 % of the steps. Published: 1, 1 and 100 epochs.",
            "Each specialist has one mask. In the published last stage later ones keep those before: stacked.",
            "Masks of one step learn together, and those of the last step stay. Published: those of the best epoch.",
            "A joint network reads both embeddings beside each other; published, each has two layers of its own first.",
            "A sample without label counts in all terms but the cross-entropies.",
            "AdamW with this toolkit's schedule. Published: Adam without one.",
        ),
        checked_against="the published losses, masking network, gate and routing, run on random input: values and "
        "gradients of all three stages, tests/methods/fixtures/mst_distill.json",
    )

    def __init__(
        self,
        config: MstDistillConfig,
        *,
        student: Classifier,
        teacher: FrozenTeacher | None = None,
        more_teachers: Sequence[FrozenTeacher] = (),
        classes: ClassPrompts | None = None,
    ) -> None:
        super().__init__(config, student=student, teacher=teacher, more_teachers=more_teachers, classes=classes)
        self.config, number = config, len(self.classes.names)
        self.set_heads({LABELS_HEAD: ClassHeadConfig()})
        self.read: dict[str, tuple[str, Reads]] = {}  # role and modalities of each network
        for role, each in self.teachers.items():
            kinds: tuple[Reads, ...] = config.networks if "text" in each.model.towers else ("image",)
            self.read |= {f"{role}_{kind}": (role, kind) for kind in kinds}
        widths = {name: len(TOWERS[kind]) * self.teachers[role].embed_dim for name, (role, kind) in self.read.items()}
        self.specialists = Specialists(
            widths, number, hidden=config.hidden, mask_layers=config.mask_layers, heads=config.mask_heads
        )
        ways = len(self.specialists.keys)
        if config.top > ways:
            raise ConfigError(f"method.top is {config.top}, and there are {ways} specialists: give at most as many")
        # one map after the other, as published
        sizes = (number, 2 * number, ways)
        self.gate = nn.Sequential(nn.Linear(*sizes[:2]), nn.Linear(*sizes[1:])) if config.routing == "gate" else None

    @property
    def weights_now(self) -> dict[str, float]:
        """Weights of the terms by name, where the run stands: two of them fade."""
        config, percent = self.config, floor(100 * self.step.progress + 1e-6)
        routed, balance = (0.5 ** ceil(percent / 30), 0.9 ** ceil(percent / 10)) if config.fade else (1.0, 1.0)
        weights = {
            "labels": config.label_weight,
            "network_labels": config.label_weight,
            "mutual": config.mutual_weight,
            "masks": 1.0 if config.mask_layers else 0.0,
            "routed": config.distill_weight * routed,
            "balance": config.balance_weight * balance if self.gate is not None else 0.0,
        }
        return {name: weight for name, weight in weights.items() if weight}

    @property
    def term_names(self) -> tuple[str, ...]:
        return tuple(self.weights_now)

    @property
    def needs_labels(self) -> bool:
        return True

    @property
    def default_stages(self) -> tuple[StageConfig, ...]:
        weights = self.weights_now
        found = [(stage, tuple(term for term in stage.terms or () if term in weights)) for stage in STAGES]
        total = sum(stage.share or 0.0 for stage, terms in found if terms)
        return tuple(
            stage.model_copy(update={"share": (stage.share or 0.0) / total, "terms": terms})
            for stage, terms in found
            if terms
        )

    def learning_in(self, stage: StageConfig) -> frozenset[str]:
        """Of the modules only those that a term of the stage trains: networks stay while their masks learn."""
        idle = tuple(start for start, terms in TRAINED_BY.items() if not any(map(stage.wants_term, terms)))
        return frozenset(name for name in super().learning_in(stage) if not name.startswith(idle))

    def shared_parameters(self) -> Mapping[str, nn.Parameter]:
        """Also a layer of the networks and one of the masks, for terms that do not reach the student."""
        return {**super().shared_parameters(), **self.specialists.last_layers()}

    @property
    def teacher_needs(self) -> LevelRequest:
        read = {tower for _, kind in self.read.values() for tower in TOWERS[kind]}
        return LevelRequest(towers=tuple(tower for tower in TOWERS["joint"] if tower in read))

    def terms(self, batch: Batch) -> dict[str, Term]:
        temperature, weights, values = self.config.temperature, self.weights_now, dict[str, Tensor]()
        student, labels = self.student.logits(LABELS_HEAD, self.features(batch)), self.labels(batch)
        wanted = {name for name in weights if self.wants(name, weights[name])}
        inputs = self._inputs(batch) if wanted - {"labels", "balance"} else {}
        if "labels" in wanted:
            values["labels"] = labelled_cross_entropy(student, labels)
        if wanted & {"network_labels", "mutual"}:
            told = self.specialists.plain(inputs)
            if "network_labels" in wanted:
                values["network_labels"] = torch.stack([labelled_cross_entropy(each, labels) for each in told]).sum()
            if "mutual" in wanted:
                values["mutual"] = mutual_divergence([student, *told], temperature=temperature)
        if "masks" in wanted:
            each = self.specialists(inputs).unbind(1)
            found = [kl_divergence(told, student, temperature=temperature) for told in each]
            values["masks"] = torch.stack(found).sum()
        values |= self._taught(student, inputs, wanted)
        return {name: Term(value, weights[name]) for name, value in values.items()}

    def _taught(self, student: Tensor, inputs: Mapping[str, Tensor], wanted: Set[str]) -> dict[str, Tensor]:
        """The terms by which specialists teach the student."""
        config, values = self.config, dict[str, Tensor]()
        likely = self.gate(student).softmax(1) if self.gate is not None and wanted & {"routed", "balance"} else None
        if likely is not None and "balance" in wanted:
            values["balance"] = balance_divergence(likely)
        if "routed" in wanted:
            with torch.no_grad():
                experts = self.specialists(inputs, stacked=config.stacked)
            chosen = self._chosen(experts, likely)
            values["routed"] = routed_divergence(student, experts, chosen, temperature=config.temperature)
            for place, key in enumerate(self.specialists.keys):
                self.measurements[f"chosen/{key}"] = (chosen == place).float().mean()
        return values

    def _chosen(
        self, experts: Float[Tensor, "batch experts classes"], likely: Float[Tensor, "batch experts"] | None
    ) -> Int[Tensor, "batch chosen"]:
        """Places of the specialists that teach each sample."""
        batch, number = experts.shape[:2]
        if self.config.routing == "mean":
            return torch.arange(number, device=experts.device).expand(batch, -1)
        if likely is None:
            drawn = torch.rand(batch, number, generator=self.step.generator("routing"))
            likely = drawn.to(experts.device, non_blocking=True)
        return likely.topk(self.config.top, dim=1).indices

    def _inputs(self, batch: Batch) -> dict[str, Float[Tensor, "batch width"]]:
        """What each network reads: unit embeddings beside each other, times the root of the width."""
        teachers = self.encode_teachers(batch)
        found: dict[str, Tensor] = {}
        for name, (role, kind) in self.read.items():
            rows = [getattr(teachers[role], tower).embedding for tower in TOWERS[kind]]
            found[name] = torch.cat([unit(each) * each.shape[1] ** 0.5 for each in rows], dim=1)
        return found

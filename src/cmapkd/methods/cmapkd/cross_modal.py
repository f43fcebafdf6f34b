"""Levels of one modality against those of the other: through bridges into one space, or in the joint space.

Everything here is of all processes' samples; each level is one vector a sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cmapkd.features import AlignmentBridge
from cmapkd.methods.cmapkd.levels import INTRA
from cmapkd.objectives import contrastive_loss, layer_relation_distance, pyramid_divergence

Vectors = Mapping[str, Float[Tensor, "batch width"]]  # by level
Bridged = dict[str, Float[Tensor, "batch bridge_dim"]]  # by level, unit vectors


@dataclass(frozen=True, slots=True)
class Bridges:
    """Both models' bridges with their log scales, and what each pair of levels counts. The method owns the modules."""

    student: AlignmentBridge
    teacher: AlignmentBridge
    student_scale: nn.Parameter
    teacher_scale: nn.Parameter
    coupling: Mapping[str, float]

    def of_student(self, vectors: Vectors) -> Bridged:
        """The student's levels in the space that both modalities share; levels without a bridge are left out."""
        return _through(self.student, vectors)

    def of_teacher(self, vectors: Vectors) -> Bridged:
        """The teacher's levels, likewise, in a space of its own. No gradient reaches a model through them."""
        return _through(self.teacher, vectors)

    def contrast(
        self,
        pairs: Sequence[str],
        vectors: Bridged,
        log_scale: Float[Tensor, ""],
        pictures: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, ""]:
        """InfoNCE at the coupled pairs, each counting what its coupling says; `pictures` as of `contrastive_loss`."""
        total = torch.zeros((), device=log_scale.device)
        for pair in pairs:
            visual, language = (vectors[level] for level in pair.split("-"))
            loss = contrastive_loss(visual, language, logit_scale=log_scale.exp(), pictures=pictures)
            total = total + self.coupling[pair] * loss
        return total / sum(self.coupling[pair] for pair in pairs)

    def divergences(
        self, pairs: Sequence[str], student: Bridged, teacher: Bridged
    ) -> dict[str, Float[Tensor, " batch"]]:
        """KL between the models' similarities at each of the pairs, for each sample."""
        if not pairs:
            return {}
        visual, language = ([n for n in levels if any(n in pair for pair in pairs)] for levels in INTRA.values())
        values = pyramid_divergence(
            *(torch.stack([side[n] for n in names]) for side in (student, teacher) for names in (visual, language)),
            coupling=torch.tensor([[float(f"{v}-{t}" in pairs) for t in language] for v in visual]),
            student_scale=self.student_scale.exp(),
            teacher_scale=self.teacher_scale.exp(),
        )
        places = {f"{v}-{t}": (i, j) for (i, v), (j, t) in product(enumerate(visual), enumerate(language))}
        return {pair: values[:, *places[pair]] for pair in pairs}


def _through(bridge: AlignmentBridge, vectors: Vectors) -> Bridged:
    maps = (bridge.visual, bridge.language)
    visual, language = bridge(
        *(
            {name: vectors[name] for name in levels if name in known and name in vectors}
            for levels, known in zip(INTRA.values(), maps, strict=True)
        )
    )
    return {**visual, **language}


def layer_relation(student: Bridged, teacher: Bridged) -> Float[Tensor, ""]:
    """Cosines between the levels of a sample within each modality, student's against teacher's."""
    values = []
    for levels in INTRA.values():
        names = [name for name in levels if name in student]
        of_student, of_teacher = (torch.stack([side[name] for name in names], dim=1) for side in (student, teacher))
        values.append(layer_relation_distance(of_student, of_teacher).mean())
    return torch.stack(values).mean()

"""The student against a bank of the teacher's inner levels: of the same level, of the other modality's levels.

Everything here is of all processes' samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from cmapkd.features import References, standardise
from cmapkd.methods.cmapkd.cross_modal import Bridges
from cmapkd.methods.cmapkd.levels import LevelRows, levels_of
from cmapkd.objectives import bank_divergence


def level_against_bank(
    student: Float[Tensor, "batch width"],
    teacher: Float[Tensor, "batch width"],
    references: References,
    level: str,
    *,
    scale: float,
) -> Float[Tensor, ""]:
    """KL over the bank's vectors of one level, all of them standardised and taken about the bank's mean.

    Args:
        student: the level at the teacher's width.
    """
    entries, exclude = references.of_level(level)
    entries, known = standardise(entries), entries.any(-1, keepdim=True)
    # every picture's early features have much in common: what tells them apart is what lies about their mean
    middle = (entries * known).sum(0) / known.sum().clamp_min(1)
    return bank_divergence(
        standardise(student) - middle,
        standardise(teacher) - middle,
        entries - middle,
        student_scale=scale,
        teacher_scale=scale,
        exclude=exclude,
    ).mean()


def pairs_against_bank(
    bridges: Bridges, pairs: Sequence[str], references: References, rows: LevelRows
) -> Float[Tensor, ""]:
    """KL of each level of the coupled pairs over the bank's vectors of the other level, all of them bridged."""
    levels = levels_of(pairs)
    student = bridges.of_student(rows.vectors("student", levels))
    teacher = bridges.of_teacher(rows.vectors("teacher", levels))
    banks = {level: references.of_level(level) for level in levels}
    with torch.no_grad():
        entries = bridges.of_teacher({level: vectors for level, (vectors, _) in banks.items()})
    total = torch.zeros((), device=bridges.student_scale.device)
    for pair in pairs:
        for anchor, other in (pair.split("-"), pair.split("-")[::-1]):
            divergence = bank_divergence(
                student[anchor],
                teacher[anchor],
                entries[other],
                student_scale=bridges.student_scale.exp(),
                teacher_scale=bridges.teacher_scale.exp().detach(),
                exclude=banks[other][1],
            )
            total = total + bridges.coupling[pair] / 2 * divergence.mean()
    return total / sum(bridges.coupling[pair] for pair in pairs)

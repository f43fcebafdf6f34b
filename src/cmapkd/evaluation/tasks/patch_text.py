"""Task `patch_text`: cells of pictures in the joint space against the names of the boxes that they lie in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cmapkd.evaluation.patch_text import PatchScores, patch_text_scores, score_patches
from cmapkd.evaluation.probes.detector import box_targets
from cmapkd.evaluation.probes.features import whole_picture
from cmapkd.evaluation.subject import Subject
from cmapkd.evaluation.tasks.base import Column, Headline, Task
from cmapkd.features.pyramid import Grid, grid_of
from cmapkd.models.base import DualEncoder
from cmapkd.models.texts import evaluating


class PatchText(Task):
    """No head is trained: the tower's own norm and projection lead from every token to the joint space."""

    alone = True
    title = "Cells of pictures by names, percent"
    headline = Headline("patch_text", ("pointing",), "pointing")
    columns = (
        Column("pointing", ("pointing",)),
        Column("a cell at random", ("pointing_chance",)),
        Column("cells", ("cells",)),
        Column("always the commonest", ("cells_commonest",)),
        Column("of cells", ("num_cells",), 0),
    )

    def missing(self, subject: Subject) -> str | None:
        if not any(sample.boxes for sample in subject.bench.first_samples):
            return f"none of its first {len(subject.bench.first_samples)} samples has a box"
        model = subject.dual
        if not model.image_levels:
            return f"{model.name} exposes no image level"
        try:
            with evaluating(model, subject.bench.device, None):
                joint_tokens(model, model.log_logit_scale.new_zeros(1, 3, *[model.image_spec.size] * 2))
        except ValueError as error:
            return str(error)
        return None

    def score(self, subject: Subject) -> dict[str, Any]:
        bench, annotations = subject.bench, subject.bench.annotations
        names = tuple(sorted({box.name for boxes in annotations.boxes for box in boxes if not box.crowd}))
        weights = subject.name_weights(names).to(bench.device)
        place = {name: number for number, name in enumerate(names)}
        rows = [row for row, boxes in enumerate(annotations.boxes) if boxes]
        bench.say(f"{subject.name}: cells of {len(rows):,} images of {bench.scored.name}")

        def scores() -> Iterator[PatchScores]:
            size = bench.config.batch_size
            for part in (rows[first : first + size] for first in range(0, len(rows), size)):
                cells, grid = self._cells(subject, [annotations.indices[row] for row in part])
                for row, of_picture in zip(part, cells, strict=True):
                    boxes, labels = box_targets(annotations.boxes[row], annotations.sizes[row], place)
                    yield score_patches(of_picture, grid, weights.cpu(), boxes, labels)

        return patch_text_scores(scores()) | {"num_images": len(rows), "num_classes": len(names)}

    @staticmethod
    def _cells(subject: Subject, indices: list[int]) -> tuple[Float[Tensor, "images cells dim"], Grid]:
        model, bench = subject.dual, subject.bench
        pixels = torch.stack([whole_picture(model.image_spec, bench.scored[index].image) for index in indices])
        with evaluating(model, bench.device, bench.autocast):
            cells, grid = joint_tokens(model, model.image_spec.to_model(pixels.to(bench.device)))
        return F.normalize(cells.float(), dim=-1).cpu(), grid


def joint_tokens(model: DualEncoder, pixels: Tensor) -> tuple[Float[Tensor, "batch cells dim"], Grid]:
    """The cells of the last level in the joint space, row by row without prefix tokens, and their grid.

    Raises:
        ValueError: the tower has no such tokens.
    """
    level = model.encode_image(pixels, (model.image_levels[-1].name,)).levels[model.image_levels[-1].name]
    tokens = model.tokens_in_joint_space(level)
    return tokens[:, level.num_prefix :], grid_of(level)

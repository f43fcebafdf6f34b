"""Pictures of which a step shows some cells alone: which ones, and a model's features of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from jaxtyping import Float, Int
from torch import Tensor

from cmapkd.config import ConfigError
from cmapkd.data.types import Batch
from cmapkd.features.drawn_places import drawn_places
from cmapkd.methods.step import StepInfo
from cmapkd.models import DualEncoder, Features, Level
from cmapkd.models.visible_tokens import TokenGrid, only_visible, token_grid, visible_pixels


class VisibleCells:
    """The student's grid, and how many of its cells are shown.

    Raises:
        ValueError: the student is no plain ViT.
        ConfigError: none or all of its cells would be shown.
    """

    def __init__(self, student: DualEncoder, *, hidden_share: float) -> None:
        self.tokens = token_grid(student)
        self.count = int(self.tokens.cells * (1 - hidden_share))
        if not 0 < self.count < self.tokens.cells:
            raise ConfigError(
                f"a picture of {student.name} has {self.tokens.cells} cells, of which method.mask_ratio "
                f"{hidden_share:g} shows {self.count}: some must be hidden and some seen, so take another share, or a "
                "student with smaller patches"
            )

    def drawn(self, part: Batch, step: StepInfo) -> Int[Tensor, "batch visible"]:
        """Numbers of the cells of each picture that the step shows, ascending; on the CPU."""
        return drawn_places(part.ids, count=self.count, of=self.tokens.cells, key=("visible", step.seed, step.step))

    def tokens_of(self, teacher: DualEncoder) -> TokenGrid:
        """The tokens of a teacher that computes the same cells.

        Raises:
            ValueError: it is no plain ViT.
            ConfigError: it has another grid.
        """
        theirs = token_grid(teacher)
        if theirs.grid != self.tokens.grid:
            ours, other = (" x ".join(map(str, tokens.grid)) for tokens in (self.tokens, theirs))
            raise ConfigError(
                f"the student's pictures have {ours} cells and the teacher's {other}, and with method.teacher_sees: "
                "visible both compute the same ones: set teacher_sees: whole, or choose models of one grid"
            )
        return theirs


def features_of_visible(
    model: DualEncoder,
    tokens: TokenGrid,
    keep: Int[Tensor, "batch visible"],
    pixels: Float[Tensor, "batch 3 height width"],
    ask: Callable[[Float[Tensor, "batch 3 height width"]], Features],
    *,
    blocks: Mapping[str, int],
) -> Features:
    """What `ask` gives of the pictures while the model's image tower computes the kept cells alone.

    Args:
        model: whose tower `ask` lets compute.
        pixels: normalised.
        blocks: names of the levels to give, and the numbers of the blocks whose outputs they are. Their tokens are
            prefix tokens and the kept cells, without a grid.
    """
    with only_visible(model, tokens, keep) as seen:
        features = ask(visible_pixels(pixels, keep, tokens.grid))
    levels = {name: Level(seen[number], "tokens", tokens.num_prefix) for name, number in blocks.items()}
    return replace(features, image=replace(features.image, levels=levels))

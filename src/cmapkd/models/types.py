"""What a model exposes of a batch: joint-space embeddings and named intermediate levels of both towers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

Layout = Literal["tokens", "map"]
Tower = Literal["image", "text"]
BOTH: tuple[Tower, ...] = ("image", "text")
LAST = "last tokens"
"""The level of a tower as a part that a reader head reads: what the tower's own pooling would pool."""
MIDDLE = "middle"
"""The level of a tower as a part that its last frozen block returns, and from which the others go on."""


@dataclass(frozen=True, slots=True)
class LevelInfo:
    """A level a tower can expose: its name (`blocks.3`, `stages.1`), channel width and layout."""

    name: str
    width: int
    layout: Layout


@dataclass(frozen=True, slots=True)
class Level:
    """One intermediate output of a tower, raw: not pooled, not projected, prefix tokens still on it.

    Attributes:
        values: Float[batch tokens width] for `tokens` (prefix tokens first, then the grid row by row, or the words of
            a text), Float[batch width height width] for `map`.
        layout: which of the two.
        num_prefix: class and register tokens at the start of `values`; 0 for maps and for texts.
        grid: (rows, columns) of the patch tokens or of the map; None for texts. Need not be square.
        mask: True where a token is real; None where all are.
        places: of key tokens only: where in the grid, or in the text, each of `values` stands; -1 where there is none.
        mean: the level pooled over all its tokens; None where nobody has computed it. Key tokens always bring it.
    """

    values: Tensor
    layout: Layout
    num_prefix: int = 0
    grid: tuple[int, int] | None = None
    mask: Bool[Tensor, "batch tokens"] | None = None
    places: Int[Tensor, "batch tokens"] | None = None
    mean: Float[Tensor, "batch width"] | None = None


@dataclass(frozen=True, slots=True)
class StatedCosts:
    """What a model costs as its files state it, for towers that torch cannot look into.

    Attributes:
        parameters: counts by what uses them, as `evaluation.efficiency.parameter_counts` names them.
        macs: multiply-adds of one sample, by tower.
        file_bytes: of both towers' files together.
        device: where they run.
    """

    parameters: Mapping[str, int]
    macs: Mapping[Tower, int]
    file_bytes: int
    device: str


@dataclass(frozen=True, slots=True)
class TowerFeatures:
    """One tower's view of a batch: `embedding` in the joint space, not normalised, and the levels asked for."""

    embedding: Float[Tensor, "batch dim"]
    levels: dict[str, Level] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Features:
    """Both towers of one model on one batch, with its logit scale (already exponentiated) and bias (SigLIP).

    `more_texts` has the embeddings of the further texts that the batch brings, by pool, those of a sample together; no
    levels. `more_images` has those of further views by name, likewise. `pictures` has a number for each pair where
    pairs that show one picture are no negatives of each other; None: all are negatives.
    """

    image: TowerFeatures
    text: TowerFeatures
    logit_scale: Float[Tensor, ""]
    logit_bias: Float[Tensor, ""] | None = None
    more_texts: dict[str, TowerFeatures] = field(default_factory=dict)
    more_images: dict[str, TowerFeatures] = field(default_factory=dict)
    pictures: Int[Tensor, " batch"] | None = None

    def with_texts(self, pool: str) -> Features:
        """The same with the texts of a pool in the place of the captions."""
        return replace(self, text=self.more_texts[pool], more_texts={})


@dataclass(frozen=True, slots=True)
class LevelRequest:
    """The towers, levels, further views and pools somebody will read; a model computes and returns no others.

    The embedding of a tower that nobody reads has width 0. `pools` is None where every pool of the batch is read.
    """

    image_levels: tuple[str, ...] = ()
    text_levels: tuple[str, ...] = ()
    towers: tuple[Tower, ...] = BOTH
    views: tuple[str, ...] = ()
    pools: tuple[str, ...] | None = None

    def union(self, other: LevelRequest) -> LevelRequest:
        """What either reads, each once, in order of first mention."""
        return LevelRequest(
            tuple(dict.fromkeys(self.image_levels + other.image_levels)),
            tuple(dict.fromkeys(self.text_levels + other.text_levels)),
            tuple(tower for tower in BOTH if tower in self.towers + other.towers),
            tuple(dict.fromkeys(self.views + other.views)),
            None if self.pools is None or other.pools is None else tuple(dict.fromkeys(self.pools + other.pools)),
        )


def text_list(texts: str | Sequence[str]) -> list[str]:
    """Texts as a list; one `str` is one text, not a sequence of its letters."""
    return [texts] if isinstance(texts, str) else list(texts)

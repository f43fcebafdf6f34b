"""Worlds in which the selection of levels must matter: CMAPKD with some of its teacher's answers made wrong.

    uv pip install ./benchmarks/worlds
    uv run cmapkd distill cmapkd_scenes cache=auto method=world_cmapkd method.world.kind=hidden --out runs/hidden

In a corrupted world the inner levels of one tower in a sample's stored answer are another sample's. That other sample
is always the same one. Embeddings stay true, because the bank and the interactive term read them, and no weight of a
level could mend these. Where the truth lies:

- `visible`: the background's colour says whether and which tower is wrong, so a gate on the embedding could learn it.
- `hidden`: a hash of the sample's id says it. Only losses or gradients can tell.

`oracle: true` gives the wrong levels weight 0. `stream_weights` counts the levels of some streams' samples more than
those of others: the oracle of a world in which one kind of samples is worth more (`examples/selection_ceiling.yaml`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from cmapkd.cache import CacheReader
from cmapkd.config import Config, ConfigError
from cmapkd.data.batches import Answers
from cmapkd.data.random import key_of, uniforms
from cmapkd.data.scenes.world import scene_at
from cmapkd.data.types import Batch, StoredRows
from cmapkd.features import VISUAL_LEVELS, gather_rows
from cmapkd.methods import MethodCard, MethodConfig, Term
from cmapkd.methods.cmapkd import CMAPKD, CMAPKDConfig
from cmapkd.methods.cmapkd.card import CARD
from cmapkd.methods.cmapkd.levels import INNER

Tower = Literal["image", "text"]
BACKGROUNDS: dict[Tower, tuple[str, ...]] = {
    "image": ("black", "navy", "maroon", "gray"),
    "text": ("white", "beige", "mint", "lavender"),
}
"""Which tower is wrong on which background, in the order in which a growing share takes them."""
_SCENE = re.compile(r"scenes/(\w+)/(\w+)/(\d+)$")


class WorldConfig(Config):
    """Which answers of the teacher are wrong, and what the student is told of it."""

    kind: Literal["clean", "visible", "hidden"] = Field("clean", description="What says which answers are wrong.")
    share: float = Field(
        0.5, gt=0, le=1, description="Of the samples with a wrong tower; visible: of the backgrounds, in quarters."
    )
    oracle: bool = Field(False, description="Whether wrong levels get weight 0 before the selection sees them.")
    stream_weights: dict[str, NonNegativeFloat] = Field(
        default_factory=dict, description="What the levels of each stream's samples count, scaled to a batch mean of 1."
    )

    def wrong_tower(self, sample_id: str) -> Tower | None:
        """Whose inner levels are another sample's; None: both are true.

        Raises:
            ConfigError: the visible world is asked about a sample that is no scene.
        """
        if self.kind == "clean":
            return None
        if self.kind == "hidden":
            corrupted, which = uniforms(2, "hidden corruption", sample_id)
            return None if corrupted >= self.share else "image" if which < 0.5 else "text"
        found = _SCENE.search(sample_id)
        if found is None:
            raise ConfigError(
                f"world.kind visible reads a scene's background, and {sample_id!r} is no scene: take data.train=scenes"
            )
        colour = scene_at(found[1], found[2], int(found[3])).background.colour
        taken = max(1, round(4 * self.share))
        return next((tower for tower, colours in BACKGROUNDS.items() if colour in colours[:taken]), None)


class WrongAnswers:
    """A cache's answers with the levels of some towers exchanged; see `data.batches.Answers`.

    Raises:
        CacheError: in `read`, the cache lacks the other sample: `cmapkd cache build --all` adds every sample.
    """

    def __init__(self, reader: CacheReader, world: WorldConfig) -> None:
        self.reader, self.world = reader, world
        self.needs_texts = reader.needs_texts
        length = reader.cache.length
        if length < 2:
            raise ConfigError("a world with wrong answers needs at least two samples: raise the length of data.train")
        self.offset = 1 + key_of("wrong answers") % (length - 1)

    def other(self, index: int) -> int:
        """The sample whose levels stand in for those of the sample at `index`: a fixed one, and never itself."""
        return (index + self.offset) % self.reader.cache.length

    def has(self, view: int, index: int) -> bool:
        return self.reader.has(view, index)

    def read(
        self,
        view: int | Sequence[int],
        indices: Sequence[int],
        ids: Sequence[str],
        captions: Sequence[str],
        missing: Sequence[int],
    ) -> StoredRows:
        rows = self.reader.read(view, indices, ids, captions, missing)
        views = [view] * len(indices) if isinstance(view, int) else view
        lacking = {*missing}  # the live teacher answers for these, truly
        for tower in BACKGROUNDS:
            if not any(name.startswith(f"{tower}:") for name in rows.arrays):  # a run without inner levels
                continue
            at = [
                place
                for place, each in enumerate(ids)
                if place not in lacking and self.world.wrong_tower(each) == tower
            ]
            if not at:
                continue
            names = [f"the one that stands in for {ids[place]}" for place in at]
            others = self.reader.rows(
                [views[place] for place in at], [self.other(indices[place]) for place in at], names
            )
            wrong = self.reader.cache.layout.tensors(others)
            for name in wrong:
                if name.startswith(f"{tower}:"):  # a level's values and what belongs to them; not the embedding
                    rows.arrays[name][at] = wrong[name]
        return rows


class WorldCMAPKDConfig(CMAPKDConfig):
    """CMAPKD's settings, and the world."""

    world: WorldConfig = Field(default_factory=WorldConfig, description="Which answers of the teacher are wrong.")


class WorldCMAPKD(CMAPKD):
    """CMAPKD in a world with wrong answers, or with the true weights of its samples."""

    Config: ClassVar[type[MethodConfig]] = WorldCMAPKDConfig
    card: ClassVar[MethodCard] = CARD
    truth: Mapping[str, Tensor]

    def __init__(self, config: WorldCMAPKDConfig, **models: Any) -> None:
        super().__init__(config, **models)
        self.world = config.world

    def answers(self, role: str, stored: Answers) -> Answers:
        if self.world.kind == "clean":
            return stored
        assert isinstance(stored, CacheReader), role
        return WrongAnswers(stored, self.world)

    def terms(self, batch: Batch) -> dict[str, Term]:
        """The terms, in which each sample's levels count what the world says.

        Raises:
            ConfigError: a live teacher, whose answers are all true, in a world with wrong ones.
        """
        if self.world.kind != "clean" and (self.teacher is None or not self.teacher.from_disk):
            raise ConfigError(
                f"world.kind {self.world.kind} changes stored answers, and there are none: set cache=auto"
            )
        self.truth = self.true_weights(batch)
        return super().terms(batch)

    def true_weights(self, batch: Batch) -> dict[str, Tensor]:
        """What each level counts for each of all processes' samples, Float[batch]; {} where nothing is told."""
        world = self.world
        towers = [world.wrong_tower(each) if world.oracle else None for each in batch.ids]
        known = [(float(tower != "image"), float(tower != "text")) for tower in towers]
        samples = [world.stream_weights.get(stream, 1.0) for stream in batch.streams] or [1.0] * len(batch)
        if not (world.oracle or world.stream_weights):
            return {}
        rows = torch.tensor([(*pair, each) for pair, each in zip(known, samples, strict=True)], device=self.device)
        image, text, sample = gather_rows(rows).unbind(1)
        sample = sample / sample.mean()
        tower_of = {level: image if level in VISUAL_LEVELS else text for level in INNER}
        return {level: tower_of.get(level, torch.ones_like(sample)) * sample for level in (*INNER, "P5", "L4")}

    def _weigh(self, term: str, losses: Mapping[str, Tensor], *rest: Any) -> Tensor:
        if self.truth and term in ("visual", "language"):
            losses = {level: column * self.truth[level] for level, column in losses.items()}
        return super()._weigh(term, losses, *rest)

"""Several image towers that stand for one: each reads the same picture, and their pooled features are joined."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.models.image_tower import ImageTower
from cmapkd.models.image_towers import rebuild_image_tower
from cmapkd.models.images import ImageSpec
from cmapkd.models.types import LAST, MIDDLE, Level, LevelInfo, TowerFeatures

_OWN = (LAST, MIDDLE)  # levels of each tower by itself


class SeveralTowers(ImageTower):
    """Pooled features are joined in the order of the towers. Levels are those of the first tower.

    A picture is resized as the first tower says, and normalised for each. Each tower learns, or answers from a cache,
    as it was made to. `LAST` and `MIDDLE` of a later tower have its number behind their name.

    Raises:
        ConfigError: the towers take pictures of different sizes.
    """

    def __init__(self, towers: Iterable[ImageTower]) -> None:
        super().__init__()
        self.towers = nn.ModuleList(towers)
        sizes = {tower.name: tower.spec.size for tower in self._each}
        first = self._each[0]
        if len({tower.spec.size for tower in self._each}) > 1:
            listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise ConfigError(
                f"image towers of one model read the same picture, and these take other sizes in pixels: {listed}. Set "
                "image_size of each to one number"
            )
        self.name = " + ".join(tower.name for tower in self._each)
        self.spec, self.levels = first.spec, first.levels
        self.width = sum(tower.width for tower in self._each)
        self.random = any(tower.random for tower in self._each)
        self.normalised = nn.ModuleList(Normalised(first.spec, tower.spec) for tower in self._each)

    @property
    def _each(self) -> list[ImageTower]:
        return [tower for tower in self.towers if isinstance(tower, ImageTower)]

    def forward(self, images: Float[Tensor, "batch 3 height width"], levels: Sequence[str] = ()) -> TowerFeatures:
        return joined(
            tower(own(images), asked(levels, number))
            for number, (tower, own) in enumerate(zip(self._each, self.normalised, strict=True))
        )

    @property
    def specs(self) -> list[ImageSpec]:
        """Each tower's own."""
        return [tower.spec for tower in self._each]

    def last_levels(self) -> tuple[LevelInfo, ...]:
        each = (tower.last_levels()[0] for tower in self._each)
        return tuple(LevelInfo(numbered(LAST, n), last.width, last.layout) for n, last in enumerate(each))

    @property
    def needs_input(self) -> str | None:
        return next((named for tower in self._each if (named := tower.needs_input) is not None), None)

    @property
    def frozen_levels(self) -> tuple[str, ...]:
        return self._each[0].frozen_levels

    def freeze(self, blocks: int | None = None) -> None:
        """Freezes all of them; blocks are frozen in each tower by itself.

        Raises:
            ValueError: a number of blocks, of which nobody knows whose they are.
        """
        if blocks is not None:
            raise ValueError(f"{self.name} are {len(self._each)} towers: freeze {blocks} blocks in one of them")
        for tower in self._each:
            tower.freeze()

    def freezing(self) -> Any:
        return [tower.freezing() for tower in self._each]

    def settle(self, training: bool) -> None:
        self.training = training and self.learns
        for tower in self._each:
            tower.settle(training)

    def stored_levels(self, read: Sequence[LevelInfo]) -> tuple[LevelInfo, ...]:
        found: list[LevelInfo] = []
        for number, tower in enumerate(self._each):
            own = tower.stored_levels(read[number : number + 1])
            found += [
                LevelInfo(numbered(MIDDLE, number), level.width, level.layout) if level.name == MIDDLE else level
                for level in own
            ]
        return tuple(found)

    def stored_part(self) -> nn.Module:
        return _StoredParts(self)

    def go_on(self, stored: TowerFeatures, levels: Sequence[str] = ()) -> TowerFeatures:
        first, found = 0, []
        for number, tower in enumerate(self._each):
            held = {
                name: stored.levels[numbered(name, number)] for name in _OWN if numbered(name, number) in stored.levels
            }
            width = 0 if held else tower.width
            part = TowerFeatures(stored.embedding[:, first : first + width], held)
            found.append(tower.go_on(part, asked(levels, number)))
            first += width
        return joined(found)

    def describe(self) -> dict[str, Any]:
        return {"kind": "several", "towers": [tower.describe() for tower in self._each]}

    def save_config(self, folder: Path) -> None:
        for number, tower in enumerate(self._each):
            tower.save_config(_folder_of(folder, number))


class _StoredParts(nn.Module):
    """What is stored of each of `SeveralTowers`."""

    def __init__(self, towers: SeveralTowers) -> None:
        super().__init__()
        self.parts = nn.ModuleList(tower.stored_part() for tower in towers.towers if isinstance(tower, ImageTower))
        self.normalised = towers.normalised
        self.specs = [[*spec.mean, *spec.std] for spec in towers.specs]

    def forward(self, images: Float[Tensor, "batch 3 height width"], levels: Sequence[str] = ()) -> TowerFeatures:
        return joined(
            part(own(images), asked(levels, number))
            for number, (part, own) in enumerate(zip(self.parts, self.normalised, strict=True))
        )

    def describe(self) -> dict[str, Any]:
        described: list[Any] = [part.describe() for part in self.parts]  # type: ignore[operator]
        return {"kind": "several", "towers": described, "specs": self.specs}


class Normalised(nn.Module):
    """From pixels as one tower reads them to those of another; equal ones stay as they are."""

    scale: Tensor
    shift: Tensor

    def __init__(self, before: ImageSpec, wanted: ImageSpec) -> None:
        super().__init__()
        self.equal = (before.mean, before.std) == (wanted.mean, wanted.std)
        mean, std, new_mean, new_std = (
            torch.tensor(each)[:, None, None] for each in (before.mean, before.std, wanted.mean, wanted.std)
        )
        self.register_buffer("scale", std / new_std, persistent=False)
        self.register_buffer("shift", (mean - new_mean) / new_std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return images if self.equal else images * self.scale + self.shift


def rebuild_several(description: Mapping[str, Any], folder: Path) -> ImageTower:
    """The untrained tower, or towers, that `describe` described, of a model folder."""
    if description["kind"] != "several":
        return rebuild_image_tower(description, folder)
    each = enumerate(description["towers"])
    return SeveralTowers(rebuild_image_tower(one, _folder_of(folder, number)) for number, one in each)


def _folder_of(folder: Path, number: int) -> Path:
    return folder / f"image_{number}"


def numbered(name: str, number: int) -> str:
    """A level's name of the tower with this number."""
    return f"{name} {number}" if number else name


def asked(levels: Sequence[str], number: int) -> tuple[str, ...]:
    """Of the levels of all towers those of one of them, under its own names."""
    own = {numbered(name, number): name for name in _OWN}
    others = {name for name in levels if name.startswith(_OWN)}
    return tuple(own.get(name, name) for name in levels if name in own or (not number and name not in others))


def joined(several: Iterable[TowerFeatures]) -> TowerFeatures:
    """What the towers gave as one: pooled features side by side, levels by name."""
    embeddings, levels = [], dict[str, Level]()
    for number, tower in enumerate(several):
        embeddings.append(tower.embedding)
        levels |= {numbered(name, number) if name in _OWN else name: level for name, level in tower.levels.items()}
    return TowerFeatures(torch.cat(embeddings, 1), levels)

"""`PartTower`: what image towers and text encoders have in common as parts: how much learns, and what can be stored."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from cmapkd.config import ConfigError
from cmapkd.models.types import MIDDLE, LevelInfo, TowerFeatures

CAN_BE_ENTERED = (
    "timm's plain ViTs, EfficientNets, MobileNets, ResNets and networks with a stem and stages (ConvNeXt), open_clip's "
    "and transformers' plain ViTs, and text encoders built like BERT (MiniLM, E5, RoBERTa, ModernBERT)"
)
_FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class PartTower(nn.Module):
    """A tower that learns whole, from some block on, or not at all.

    What is frozen is in eval mode, so its answer depends on its input alone and can be stored.

    Attributes:
        levels: shallow to deep; blocks are counted by them.
        frozen_blocks: how many blocks never learn, and with them what stands before them; 0: it is not cut.
        frozen_whole: whether nothing of it learns in the whole run. A stage that leaves it out is no such case.
    """

    name: str
    levels: tuple[LevelInfo, ...]
    frozen_blocks: int = 0
    frozen_whole: bool = False
    _frozen_modules: tuple[str, ...] = ()

    @property
    def learns(self) -> bool:
        """Whether anything in it does, now: a stage may train other parts alone."""
        return any(parameter.requires_grad for parameter in self.parameters())

    @property
    def needs_input(self) -> str | None:
        """Which tower needs its input in every step, because it learns from its first block on; None: none does."""
        return self.name if self.learns and not self.frozen_blocks else None

    @property
    def frozen_levels(self) -> tuple[str, ...]:
        """Levels behind which nothing learns."""
        return tuple(level.name for level in self.levels[: self.frozen_blocks if self.learns else None])

    def freezing(self) -> Any:
        """What `freeze` was told: True for everything, else the number of frozen blocks; of several, each one's."""
        return True if self.frozen_whole else self.frozen_blocks

    def freeze(self, blocks: int | None = None) -> None:
        """Freezes the first blocks and what stands before them, or with None everything; for good.

        Raises:
            ConfigError: there are not so many blocks, the tower cannot be entered behind one, or nothing would learn.
        """
        if blocks is None:
            self.frozen_whole = True
            self.requires_grad_(False)
            return
        if not self.levels:
            raise self._closed()
        if blocks > len(self.levels):
            raise ConfigError(
                f"frozen_blocks is {blocks}, and {self.name} has {len(self.levels)} blocks ({self.levels[0].name} to "
                f"{self.levels[-1].name}): give fewer"
            )
        self.frozen_blocks = blocks
        try:
            self._check_entry()
        except _FAILURES:
            raise self._closed() from None
        below = self.below()
        for parameter in below.parameters():
            parameter.requires_grad_(False)
        if not self.learns:
            raise ConfigError(
                f"frozen_blocks: {blocks} leaves nothing of {self.name} that learns: give fewer, or set "
                "frozen: true in its place"
            )
        shared = {id(module) for module in below.modules()}
        self._frozen_modules = tuple(name for name, module in self.named_modules() if id(module) in shared)

    @torch.no_grad()
    def _check_entry(self) -> None:
        """Compares the way over the middle with the whole way.

        Raises:
            ArithmeticError: the answers differ.
        """
        self.eval()
        example = self.example()
        whole, entered = self(example).embedding, self.go_on(self.below()(example)).embedding
        if not torch.allclose(whole, entered, rtol=1e-4, atol=1e-4 * float(whole.abs().amax())):
            raise ArithmeticError("another answer")

    def _closed(self) -> ConfigError:
        return ConfigError(
            f"{self.name} cannot be entered behind one of its blocks: leave frozen_blocks out, or set frozen: true. "
            f"These can: {CAN_BE_ENTERED}"
        )

    def settle(self, training: bool) -> None:
        """Puts what is frozen into eval mode, and the rest into the model's.

        Args:
            training: of the model.
        """
        mode = training and self.learns
        if self.training != mode:
            self.train(mode)
        if self._frozen_modules and self.get_submodule(self._frozen_modules[0]).training:
            for name in self._frozen_modules:
                self.get_submodule(name).training = False

    def stored_levels(self, read: Sequence[LevelInfo]) -> tuple[LevelInfo, ...]:
        """What is stored of a tower that needs no input: the middle; or of one that is frozen, what its head reads.

        The answer is the same in every stage: a cache has one layout for the whole run.

        Args:
            read: by the head; none: pooled features.
        """
        if not self.frozen_blocks:
            return tuple(read)
        level = self.levels[self.frozen_blocks - 1]
        return (LevelInfo(MIDDLE, level.width, level.layout),)

    def stored_part(self) -> nn.Module:
        """What answers with `stored_levels`, or with pooled features: frozen modules alone, shared with this tower."""
        return self.below() if self.frozen_blocks else self

    def go_on(self, stored: TowerFeatures, levels: Sequence[str] = ()) -> TowerFeatures:
        """What the tower would have answered, from what its `stored_part` did.

        Args:
            levels: as of the tower's own pass; none of `frozen_levels`.
        """
        return self.above(stored, levels) if MIDDLE in stored.levels else stored

    @abstractmethod
    def example(self) -> Any:
        """Some inputs on the CPU, always the same ones, that show whether two ways are one. Draws nothing."""

    @abstractmethod
    def below(self) -> nn.Module:
        """From the input to features of width 0 and the level `MIDDLE`, what the last frozen block returns."""

    @abstractmethod
    def above(self, stored: TowerFeatures, levels: Sequence[str]) -> TowerFeatures:
        """From the level `MIDDLE` on."""

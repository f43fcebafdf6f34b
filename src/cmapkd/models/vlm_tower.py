"""An image tower of any library in the place of LLaVA's vision tower, and the projector behind it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from cmapkd.config import ConfigError, closest
from cmapkd.models.base import eval_mode
from cmapkd.models.image_tower import ImageTower
from cmapkd.models.types import Level

ProjectorKind = Literal["linear", "mlp"]
_GELU_SQUARE = 0.425  # mean square of gelu(x) where x is standard normal


class VisualTokens(nn.Module):
    """An image tower whose tokens at one level are read: patches of a ViT, or places of a convolutional network's map.

    Args:
        level: the name of that level; None: the last one.
    Attributes:
        width, count: of the tokens of a picture.
    Raises:
        ConfigError: the tower has no such level, or none at all.
    """

    def __init__(self, tower: ImageTower, level: str | None) -> None:
        super().__init__()
        known = [info.name for info in tower.levels]
        if not known:
            raise ConfigError(f"{tower.name} shows no tokens or maps of its blocks: take another image tower")
        if level is not None and level not in known:
            raise ConfigError(f"{tower.name} has no level {level!r}{closest(level, known)}; it has: {', '.join(known)}")
        self.tower, self.level = tower, level or known[-1]
        self._asked: tuple[str, ...] = ()
        self._kept: dict[str, Tensor] = {}
        with torch.no_grad(), eval_mode(tower):
            tokens = self(torch.zeros(1, 3, tower.spec.size, tower.spec.size)).last_hidden_state
        self.count, self.width = int(tokens.shape[1]), int(tokens.shape[2])

    def forward(self, pixel_values: Float[Tensor, "pictures 3 size size"], **_settings: Any) -> Any:
        """transformers' form of a vision tower's output."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        names = tuple(dict.fromkeys((*self._asked, self.level)))
        found = self.tower(pixel_values, names).levels
        self._kept.update({name: _tokens(found[name]) for name in self._asked})
        tokens = _tokens(found[self.level])
        return BaseModelOutputWithPooling(last_hidden_state=tokens, hidden_states=(tokens,))

    @contextmanager
    def keeping(self, levels: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """Float[pictures tokens width] of these levels by name, of a forward pass inside this context."""
        self._asked, self._kept = tuple(levels), {}
        try:
            yield self._kept
        finally:
            self._asked, self._kept = (), {}


class Projector(nn.Module):
    """From visual tokens to the language model's width: a norm, and a linear layer or two with GELU between them.

    LLaVA-1.5 (arXiv:2310.03744) has the two layers. The norm in front is ours, as in InternVL: outputs of other towers
    than CLIP's have other scales. At first its outputs have the size of word embeddings.

    Args:
        scale: root mean square of word embeddings, as the language model is fed with them.
    """

    def __init__(self, kind: ProjectorKind, width: int, out: int, *, scale: float) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, out) if kind == "mlp" else nn.Identity()
        self.out = nn.Linear(out if kind == "mlp" else width, out)
        if kind == "mlp":
            nn.init.normal_(self.hidden.weight, std=width**-0.5)  # type: ignore[arg-type]
            nn.init.zeros_(self.hidden.bias)  # type: ignore[arg-type]
        fan = _GELU_SQUARE * out if kind == "mlp" else width
        nn.init.normal_(self.out.weight, std=scale / math.sqrt(fan))
        nn.init.zeros_(self.out.bias)

    def forward(self, tokens: Float[Tensor, "pictures tokens width"]) -> Float[Tensor, "pictures tokens out"]:
        tokens = self.norm(tokens)
        projected: Tensor = self.out(F.gelu(self.hidden(tokens)) if self.kind == "mlp" else tokens)
        return projected


def _tokens(level: Level) -> Float[Tensor, "pictures tokens width"]:
    """Without class and register tokens; a map row by row."""
    if level.layout == "map":
        return level.values.flatten(2).transpose(1, 2)
    return level.values[:, level.num_prefix :]

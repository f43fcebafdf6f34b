"""Heads: the small modules that lead from what a tower gives, or from another space, to the joint space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, model_serializer, model_validator
from torch import Tensor, nn

from cmapkd.config import Config, ConfigError
from cmapkd.models.types import Level, LevelInfo, TowerFeatures

ProjectorKind = Literal["none", "linear", "two_layer"]
READER_HEAD_WIDTH = 64  # channels of each attention head where the config does not say how many heads there are


class HeadConfig(Config):
    """A head behind a tower. In a recipe its kind alone is enough: `image_head: mlp`."""

    kind: Literal["linear", "mlp", "reader"] = Field(
        "linear",
        description="One matrix; two with a GELU between them; or learned queries that attend over the last tokens.",
    )
    hidden: int | None = Field(
        None,
        ge=1,
        description="Units between the matrices of an mlp, or channels of a reader's keys and values. None: as "
        "open_clip has them, see docs/models.md; of a reader the tower's width.",
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Probability; of an mlp's hidden units, of a linear head's input, of what is read."
    )
    bias: bool | None = Field(
        None, description="Whether the first matrix has a bias. None: an image tower's mlp has one, as in open_clip."
    )
    queries: int | None = Field(None, ge=1, le=1024, description="Of a reader: how many things it reads. None: one.")
    heads: int | None = Field(
        None, ge=1, description="Of a reader: attention heads. None: one for each 64 channels, as far as they divide."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_kind(cls, values: Any) -> Any:
        if isinstance(values, str):
            return {"kind": values}
        if isinstance(values, dict) and "name" in values:  # what an override makes of a kind alone
            return {"kind": values["name"]} | {key: value for key, value in values.items() if key != "name"}
        return values

    @model_serializer(mode="wrap")
    def _without_reader(self, handler: Any) -> dict[str, Any]:
        """Settings of a reader are left out where they say nothing, so that caches know heads from before readers."""
        values: dict[str, Any] = handler(self)
        return {key: each for key, each in values.items() if key not in ("queries", "heads") or each is not None}

    @model_validator(mode="after")
    def _settings_of_the_kind(self) -> Self:
        if self.kind == "linear" and self.hidden is not None:
            raise ValueError("hidden is the width inside an mlp or a reader, and this head is linear: set kind: mlp")
        for setting in ("queries", "heads"):
            if self.kind != "reader" and getattr(self, setting) is not None:
                raise ValueError(f"{setting} belongs to a reader, and this head is {self.kind}: set kind: reader")
        if self.kind == "reader" and self.bias is not None:
            raise ValueError("a reader's matrices have biases, as those of any attention: leave bias out")
        return self


class Head(nn.Module):
    """A linear map, or linear, GELU, dropout, linear; the last matrix has no bias.

    Args:
        width: of what comes in; `dim`: of the joint space.
        hidden: where the config names no number.
        bias: of the first matrix, where the config does not say.
    """

    reads: ClassVar[tuple[LevelInfo, ...]] = ()

    def __init__(self, config: HeadConfig, width: int, dim: int, *, hidden: int, bias: bool) -> None:
        super().__init__()
        self.config, self.width = config, width
        bias = bias if config.bias is None else config.bias
        self.drop = nn.Dropout(config.dropout)
        if config.kind == "linear":
            self.out = nn.Linear(width, dim, bias=bias)
            return
        self.hidden = nn.Linear(width, config.hidden or hidden, bias=bias)
        self.act = nn.GELU()
        self.out = nn.Linear(self.hidden.out_features, dim, bias=False)

    def forward(self, pooled: Float[Tensor, "batch width"]) -> Float[Tensor, "batch dim"]:
        inner = pooled if self.config.kind == "linear" else self.act(self.hidden(pooled))
        embedding: Tensor = self.out(self.drop(inner))
        return embedding


class Reader(nn.Module):
    """Learned queries attend over a tower's last tokens; what they read is joined, and projected without a bias.

    Tokens are normalised first, so a tower's last norm may be missing from them. Queries begin small: what is read is
    then the mean of the tokens, and with it of the values.

    Args:
        level: what is read; `dim`: of the joint space.
    Raises:
        ConfigError: the channels cannot be shared out among the heads.
    """

    def __init__(self, config: HeadConfig, level: LevelInfo, dim: int) -> None:
        super().__init__()
        self.config, self.reads, width = config, (level,), level.width
        inner = config.hidden or width
        most = max(1, inner // READER_HEAD_WIDTH)
        self.heads = config.heads or next(n for n in range(most, 0, -1) if inner % n == 0)
        if inner % self.heads:
            raise ConfigError(f"a reader of {inner} channels cannot have {self.heads} heads: set heads to a divisor")
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(config.queries or 1, inner) * 0.02)
        self.keys, self.values = nn.Linear(width, inner), nn.Linear(width, inner)
        self.drop = nn.Dropout(config.dropout)
        self.out = nn.Linear(len(self.queries) * inner, dim, bias=False)

    def no_weight_decay(self) -> set[str]:
        return {"queries"}

    def forward(self, last: Level) -> Float[Tensor, "batch dim"]:
        """Reads all tokens or cells of a level, prefix tokens too, and no padding."""
        tokens = last.values.flatten(2).transpose(1, 2) if last.layout == "map" else last.values
        tokens = self.norm(tokens)
        keys, values = (
            layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.keys, self.values)
        )
        queries = self.queries.to(keys.dtype).unflatten(-1, (self.heads, -1)).transpose(0, 1)
        mask = None
        if last.mask is not None:  # added, and finite: a text without any token gives the mean of its padding
            mask = torch.zeros_like(last.mask, dtype=keys.dtype).masked_fill(~last.mask, torch.finfo(keys.dtype).min)
            mask = mask[:, None, None, :]
        read = F.scaled_dot_product_attention(queries.expand(keys.shape[0], -1, -1, -1), keys, values, attn_mask=mask)
        embedding: Tensor = self.out(self.drop(read.transpose(1, 2).flatten(1)))
        return embedding


class Readers(nn.Module):
    """A reader for each of several towers. What all of them read is joined, and projected without a bias."""

    def __init__(self, config: HeadConfig, levels: Sequence[LevelInfo], dim: int) -> None:
        super().__init__()
        self.config, self.reads = config, tuple(levels)
        self.readers = nn.ModuleList(Reader(config, level, dim) for level in levels)

    def forward(self, *last: Level) -> Float[Tensor, "batch dim"]:
        """As `Reader`; the matrix behind what is joined is that of each reader beside the others'."""
        several = [reader(level) for reader, level in zip(self.readers, last, strict=True)]
        return torch.stack(several).sum(0)


AnyHead: TypeAlias = Head | Reader | Readers


def make_head(config: HeadConfig, tower: Any, dim: int, *, hidden: int, bias: bool) -> AnyHead:
    """The head that a config asks for behind a tower, an `ImageTower` or a `TextTower`.

    Raises:
        ConfigError: the tower gives no tokens, and a reader is asked for.
    """
    if config.kind == "reader":
        levels = tower.last_levels()
        return Reader(config, levels[0], dim) if len(levels) == 1 else Readers(config, levels, dim)
    return Head(config, tower.width, dim, hidden=hidden, bias=bias)


def behind(head: AnyHead, tower: TowerFeatures) -> TowerFeatures:
    """What a tower gave, with the head's embedding in the place of pooled features or of last tokens."""
    read = [level.name for level in head.reads]
    levels = {name: level for name, level in tower.levels.items() if name not in read}
    return TowerFeatures(head(*(tower.levels[name] for name in read)) if read else head(tower.embedding), levels)


def asked_of(head: AnyHead, levels: Sequence[str] = ()) -> tuple[str, ...]:
    """What a tower is asked for, so that the head can go on from there: these levels, for a reader the last tokens."""
    return (*levels, *(level.name for level in head.reads))


def make_projector(kind: ProjectorKind, width: int, to: int) -> nn.Module:
    """What takes image embeddings into another space; `two_layer` normalises over the batch, as PromptKD's does."""
    if kind == "none":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(width, to)
    return nn.Sequential(nn.Linear(width, to), nn.BatchNorm1d(to), nn.ReLU(), nn.Linear(to, to))

"""Heads: the small modules that lead from a tower's pooled features, or from another space, to the joint space."""

from __future__ import annotations

from typing import Any, Literal, Self

from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from cmapkd.config import Config

ProjectorKind = Literal["none", "linear", "two_layer"]


class HeadConfig(Config):
    """A head behind a tower. In a recipe its kind alone is enough: `image_head: mlp`."""

    kind: Literal["linear", "mlp"] = Field("linear", description="One matrix, or two with a GELU between them.")
    hidden: int | None = Field(
        None, ge=1, description="Units between the matrices of an mlp. None: as open_clip has them, see docs/models.md."
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Probability; of an mlp's hidden units, of a linear head's input."
    )
    bias: bool | None = Field(
        None, description="Whether the first matrix has a bias. None: an image tower's mlp has one, as in open_clip."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_kind(cls, values: Any) -> Any:
        if isinstance(values, str):
            return {"kind": values}
        if isinstance(values, dict) and "name" in values:  # what an override makes of a kind alone
            return {"kind": values["name"]} | {key: value for key, value in values.items() if key != "name"}
        return values

    @model_validator(mode="after")
    def _hidden_of_an_mlp(self) -> Self:
        if self.kind == "linear" and self.hidden is not None:
            raise ValueError("hidden is the width inside an mlp, and this head is linear: set kind: mlp")
        return self


class Head(nn.Module):
    """A linear map, or linear, GELU, dropout, linear; the last matrix has no bias.

    Args:
        width: of what comes in; `dim`: of the joint space.
        hidden: where the config names no number.
        bias: of the first matrix, where the config does not say.
    """

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


def make_projector(kind: ProjectorKind, width: int, to: int) -> nn.Module:
    """What takes image embeddings into another space; `two_layer` normalises over the batch, as PromptKD's does."""
    if kind == "none":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(width, to)
    return nn.Sequential(nn.Linear(width, to), nn.BatchNorm1d(to), nn.ReLU(), nn.Linear(to, to))

"""The table of model families, and the settings of a model: name, first weights, its family's own options."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_serializer, model_validator

from cmapkd.config import Config, Registry, closest
from cmapkd.models.inherit import DepthRule

_GROUP = "cmapkd.models"


def _own(*names: str) -> dict[str, Any]:
    """cmapkd's families stand in the table as those of other packages do, and are imported when they are asked for."""
    return {name: EntryPoint(name, f"cmapkd.models.{name}_family", _GROUP) for name in names}


FAMILIES: Registry[Any] = Registry(
    _GROUP,
    _own("open_clip", "hf", "timm", "tiny", "parts", "pictures", "classifier", "onnx", "tiny_vlm", "vlm", "linear"),
)
"""Families by the name before the colon. A package adds one by an entry point of the group `cmapkd.models`."""


class InheritConfig(Config):
    """Where a model's first weights are cut from. In a recipe the name alone is enough: `inherit: teacher`."""

    name: str = Field(description="teacher: the run's first teacher; or a larger model by name or folder.")
    depth: DepthRule = Field(
        "official", description="official: every n-th layer, as TinyCLIP's code; uniform: spread from first to last."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, values: Any) -> Any:
        return {"name": str(values)} if isinstance(values, str | Path) else values


class ModelConfig(Config):
    """A model by name. In a recipe the name alone is enough: `teacher: open_clip:ViT-L-14/openai`."""

    name: str = Field(description="family:model, or a folder saved by cmapkd. See docs/models.md.")
    init: Literal["auto", "scratch"] = Field(
        "auto", description="auto: the weights the name stands for; scratch: its architecture with random weights."
    )
    checkpoint: Path | None = Field(None, description="Weight file loaded over the built model (every name must fit).")
    weights: Literal["last", "ema"] = Field(
        "last", description="Of a checkpoint: last, as training left them; ema, the moving average it kept beside."
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="The family's own settings, for example image_size."
    )
    dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="Of the weights of a model that writes: bf16 halves the memory of a teacher."
    )
    inherit: InheritConfig | None = Field(None, description="Begin with slices of a larger model's weights.")
    vocabulary: Literal["whole", "texts"] = Field(
        "whole",
        description="Of a student that embeds. texts: its word table and tokenizer keep the tokens of the training "
        "texts, control tokens, and bytes or letters.",
    )

    @property
    def freezes_parts(self) -> bool:
        """Whether options of a tower say that it, or its first blocks, never learn."""
        listed = [self.options.get(part) for part in ("image", "text")]
        towers = [each for one in listed for each in (one if isinstance(one, list) else [one])]
        return any(isinstance(each, dict) and (each.get("frozen") or each.get("frozen_blocks")) for each in towers)

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, values: Any) -> Any:
        return {"name": str(values)} if isinstance(values, str | Path) else values

    @model_serializer(mode="wrap")
    def _without_default(self, handler: Any) -> dict[str, Any]:
        """What a model does not use is left out, so that it is written as before there were such settings."""
        values: dict[str, Any] = handler(self)
        unused = {"inherit": self.inherit is None, "weights": self.weights == "last", "dtype": self.dtype == "fp32"}
        unused["vocabulary"] = self.vocabulary == "whole"
        return {key: value for key, value in values.items() if not unused.get(key, False)}

    @model_validator(mode="after")
    def _weights_have_one_origin(self) -> Self:
        if self.inherit is not None and self.checkpoint is not None:
            raise ValueError("checkpoint replaces every weight that inherit would set: give one of the two")
        if self.weights == "ema" and self.checkpoint is None:
            raise ValueError("weights: ema says which weights of a checkpoint to take, but no checkpoint is named")
        return self

    @model_validator(mode="after")
    def _known_family(self) -> Self:
        family, colon, rest = self.name.partition(":")
        if colon and family not in FAMILIES and not Path(self.name).exists():
            raise ValueError(
                f"unknown model family {family!r} in {self.name!r}{closest(family, FAMILIES)}; "
                f"known: {', '.join(FAMILIES)}"
            )
        if colon and family in FAMILIES and not rest:
            raise ValueError(f"{self.name!r} names no model after the colon, write for example tiny:small")
        return self

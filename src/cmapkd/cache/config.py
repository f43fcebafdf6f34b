"""The knobs of a teacher's cache. In a recipe `cache: auto` is enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from cmapkd.config import RESUMABLE, Config

Store = Literal["fp16", "fp32", "int8"]
Check = Literal["first_use", "open", "sizes"]
DEFAULT_VIEWS = 4
"""Views of a sample that a run with a cache cycles through where the recipe does not say: docs/cache.md says why."""


class CacheConfig(Config):
    """Where the teacher's answers are kept, how, and what a run does about those that are missing."""

    mode: Literal["auto", "require"] = Field(
        "auto",
        description="auto: build before training what is missing; require: refuse to start if anything is.",
        json_schema_extra=RESUMABLE,
    )
    folder: Path | None = Field(
        None,
        description="Where; none: one folder for each teacher and data set, found again.",
        json_schema_extra=RESUMABLE,
    )
    store: Store = Field("fp16", description="Of stored numbers; int8 has a scale for each vector.")
    kind: Literal["auto", "global", "pooled", "key_tokens", "dense"] = Field(
        "auto", description="auto: what the method reads; or more than that, for other methods to read as well."
    )
    top_k: int | None = Field(
        None,
        ge=1,
        description="Of a teacher that writes: likeliest tokens to hold; none: as many as the method reads.",
    )
    max_answer_tokens: int | None = Field(
        None,
        ge=1,
        description="Of a teacher that writes: room of a row; none: the data's longest answer, found in a pass.",
    )
    check: Check = Field(
        "first_use",
        description="When checksums are compared: of rows when first read, of all on opening, or never (sizes are).",
        json_schema_extra=RESUMABLE,
    )
    max_gib: float = Field(
        20.0, gt=0, description="Refuse to build more than this many GiB.", json_schema_extra=RESUMABLE
    )
    batch_size: int = Field(
        128, ge=1, description="Pairs that the teacher answers at once while building.", json_schema_extra=RESUMABLE
    )
    shard_mib: float = Field(
        64.0,
        gt=0,
        description="About the size of a shard in MiB: what a killed build can lose.",
        json_schema_extra=RESUMABLE,
    )

    @model_validator(mode="before")
    @classmethod
    def _from_mode(cls, values: Any) -> Any:
        """`cache: auto`; and `{name: auto, ...}`, which an override makes of it."""
        if values is True:
            return {"mode": "auto"}  # YAML reads `on` so
        if isinstance(values, str):
            return {"mode": values}
        if isinstance(values, dict) and "name" in values:
            return {"mode": values["name"]} | {key: value for key, value in values.items() if key != "name"}
        return values

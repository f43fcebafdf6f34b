"""Where a run's samples come from and how they are shown."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from cmapkd.config import RESUMABLE, Config
from cmapkd.data.views import WHOLE, ViewSpec

DEFAULT_TIMEOUT = 900.0


class DataConfig(Config):
    """Training, validation and test data, by name (see docs/data.md)."""

    train: str = Field(description="Source of the training pairs, for example scenes or webdataset:train-*.tar.")
    val: str | None = Field(None, description="Source that decisions are made on: best checkpoint, hyper-parameters.")
    test: str | None = Field(None, description="Source of the final numbers; none: the validation source.")
    views: ViewSpec | None = Field(
        None, description="Crops and flips of the training pictures; none: 90-100 % crops, whole pictures for scenes."
    )
    mix_synthetic: float = Field(
        0.0, ge=0, le=1, description="Share of the views that show a synthetic caption in place of the sample's own."
    )
    workers: int = Field(
        0,
        ge=0,
        description="Processes that read and decode; 0: the training process itself.",
        json_schema_extra=RESUMABLE,
    )
    memory: int = Field(
        64,
        ge=0,
        description="MiB of decoded samples that each reading process keeps for later epochs; 0: none.",
        json_schema_extra=RESUMABLE,
    )
    timeout: float = Field(
        DEFAULT_TIMEOUT,
        ge=0,
        description="Seconds that a batch may take to be read before the run stops; 0: any time.",
        json_schema_extra=RESUMABLE,
    )
    on_bad_sample: Literal["skip", "error"] = Field(
        "skip", description="What a sample that cannot be read does.", json_schema_extra=RESUMABLE
    )
    max_bad_share: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Share of unreadable samples above which the run stops (from 100 samples on).",
        json_schema_extra=RESUMABLE,
    )

    @model_validator(mode="after")
    def _default_views(self) -> Self:
        if self.views is None:
            # a crop of a built scene could cut off an object that its captions count
            views = WHOLE if self.train.partition(":")[0].startswith("scenes") else ViewSpec()
            object.__setattr__(self, "views", views)
        return self

    @property
    def final(self) -> str | None:
        """The source of the final numbers."""
        return self.test or self.val

"""Where a run's samples come from and how they are shown."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from cmapkd.config import RESUMABLE, Config
from cmapkd.data.ordering import Ordering
from cmapkd.data.prompting import Prompting
from cmapkd.data.regions import FurtherViewSpec
from cmapkd.data.streams import MAIN_STREAM
from cmapkd.data.types import MAIN_VIEW
from cmapkd.data.views import WHOLE, ViewSpec

DEFAULT_TIMEOUT = 900.0
PREFETCH_MIB = 2048


class StreamConfig(Config):
    """A further source that is read beside `data.train`."""

    source: str = Field(description="Source of the samples, as for data.train.")
    share: float = Field(gt=0, lt=1, description="Fraction of every batch that are its samples.")
    labels: Literal["read", "hidden"] = Field(
        "read", description="hidden: its samples count as unlabelled, and may be of other classes than data.train's."
    )
    captions: Literal["read", "none"] = Field(
        "read",
        description="none: its pictures may have no captions. The student's image tower alone learns from them, what "
        "the teacher's embeddings are.",
    )


class PromptConfig(Config):
    """How samples become dialogues, for models that write."""

    kind: Literal["auto", "turns", "questions", "captions", "both"] = Field(
        "auto",
        description="What is asked; auto: a sample's dialogue, else its questions, else its captions; both: questions "
        "and a caption.",
    )
    share: float = Field(
        1.0, gt=0, le=1, description="Share of the training questions that are kept, chosen by sample and question."
    )
    unanswered: Literal["leave_out", "student"] = Field(
        "leave_out",
        description="Questions outside the share, and those without an answer. leave_out: they are not asked; student: "
        "they are, and the student writes the answer, which the teacher judges (method.on_policy).",
    )
    suffix: str = Field(
        "", description="Line after every question, such as: Answer the question using a single word or phrase."
    )
    plain_captions: bool = Field(
        False, description="Whether a caption follows the picture alone, without an instruction."
    )
    join: bool = Field(
        False,
        description="Whether all questions of a picture (of kind both also a caption) stand in one dialogue, in an "
        "order that the view draws; else each view asks one of them.",
    )
    learn: Literal["all", "last"] = Field(
        "all", description="all: every answer of a dialogue is learned, but for those that the data exclude; last: one."
    )
    captions: int = Field(
        1, ge=1, description="Captions of a picture that stand in a joined dialogue, of kind captions or both."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, values: Any) -> Any:
        """`prompts: questions` names the kind alone; an override makes `{name: ...}` of it."""
        if isinstance(values, str):
            return {"kind": values}
        if isinstance(values, dict) and "name" in values and "kind" not in values:
            return {"kind": values["name"]} | {key: value for key, value in values.items() if key != "name"}
        return values

    @model_validator(mode="after")
    def _several_captions_are_joined(self) -> Self:
        self.prompting()
        return self

    def prompting(self, *, training: bool = True) -> Prompting:
        """The choice of dialogues; without `training` all questions are kept."""
        share = self.share if training else 1.0
        return Prompting(
            self.kind,
            share,
            self.suffix,
            self.plain_captions,
            self.join,
            self.learn,
            self.captions,
            self.unanswered if training else "leave_out",
        )


class DataConfig(Config):
    """Training, validation and test data, by name (see docs/data.md)."""

    train: str = Field(description="Source of the training pairs, for example scenes or webdataset:train-*.tar.")
    val: str | None = Field(None, description="Source that decisions are made on: best checkpoint, hyper-parameters.")
    test: str | None = Field(None, description="Source of the final numbers; none: the validation source.")
    views: ViewSpec | None = Field(
        None, description="Crops and flips of the training pictures; none: 90-100 % crops, whole pictures for scenes."
    )
    teacher_view: Literal["same", "whole"] = Field(
        "same",
        description="What teachers see. same: the student's view; whole: the picture as it is, of which a cache holds "
        "one answer for each sample where the method reads none of the teacher's texts.",
    )
    more_views: dict[str, FurtherViewSpec] = Field(
        default_factory=dict,
        description="Further views by name, for methods that read several of a sample; num_views stays none.",
    )
    prompts: PromptConfig = Field(
        default_factory=PromptConfig,
        description="How samples become dialogues, for models that write: a kind, or settings.",
    )
    max_tokens: int | None = Field(
        None,
        ge=8,
        description="Longest dialogue in tokens, those of the picture included; a longer one is a bad sample. None: as "
        "many as the model can read.",
    )
    more: dict[str, StreamConfig] = Field(
        default_factory=dict,
        description="Further sources by name, each with its share of every batch; data.train has the rest.",
    )
    held_out: int | str | None = Field(
        None,
        description="Pairs never trained on, for weightings that read a loss on them: the last so many of data.train, "
        "or a source of their own.",
    )
    mix_synthetic: float = Field(
        0.0, ge=0, le=1, description="Share of the views that show a synthetic caption in place of the sample's own."
    )
    unpaired_weight: float = Field(
        2000 / 512,
        gt=0,
        description="What pictures of streams with captions: none count: weight of the squared distance between unit "
        "embeddings of student and teacher; by default that of clip_kd's feature term.",
    )
    order: Literal["auto", "global", "window"] = Field(
        "auto",
        description="How an epoch is mixed. global: all samples; window: all shards, and the samples within windows of "
        "shards, so that few are read at a time; auto: window for remote shards and above 20 million samples.",
    )
    lanes: int | None = Field(
        None,
        ge=1,
        description="Windows that each batch reads side by side (order: window); none: the largest power of two that "
        "divides the batch, 64 at most.",
    )
    window: int = Field(16, ge=1, description="Shards whose samples are mixed in one window.")
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
    prefetch_mib: int = Field(
        PREFETCH_MIB,
        ge=1,
        description="MiB of shared memory (/dev/shm) in which what the workers of a process made waits to be taken.",
        json_schema_extra=RESUMABLE,
    )
    timeout: float = Field(
        DEFAULT_TIMEOUT,
        ge=0,
        description="Seconds in which nothing may be read before the run stops; 0: any time.",
        json_schema_extra=RESUMABLE,
    )
    on_bad_sample: Literal["skip", "error"] = Field(
        "skip", description="What a sample that cannot be read does.", json_schema_extra=RESUMABLE
    )
    max_bad_share: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Share of unreadable samples above which the run stops: from 100 readings on, and at its end.",
        json_schema_extra=RESUMABLE,
    )

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, values: Any) -> Any:
        """`data: csv:train.csv` names the training data alone; an override makes `{name: ...}` of it."""
        if isinstance(values, str):
            return {"train": values}
        if isinstance(values, dict) and "name" in values and "train" not in values:
            return {"train": values["name"]} | {key: value for key, value in values.items() if key != "name"}
        return values

    @field_validator("more", "more_views", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("held_out")
    @classmethod
    def _some_pairs(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, int) and value < 2:
            raise ValueError(f"{value} pairs have nothing to be told apart from: give 2 or more, 512 for example")
        return value

    @model_validator(mode="after")
    def _names_of_their_own(self) -> Self:
        for where, names, taken in (("more", self.more, MAIN_STREAM), ("more_views", self.more_views, MAIN_VIEW)):
            for name in names:
                if name == taken or not name.isidentifier():
                    raise ValueError(
                        f"{name!r} cannot be a name in data.{where}: use a word of letters, digits and underscores "
                        f"that is not {taken}"
                    )
        for name, spec in self.more_views.items():
            if spec.num_views is not None:
                raise ValueError(
                    f"data.more_views.{name} sets num_views, but further views are as many as the main ones: set "
                    "data.views.num_views instead"
                )
            if spec.reading != "exact":
                raise ValueError(
                    f"data.more_views.{name} sets reading, but all views of a run are read alike: set "
                    "data.views.reading instead"
                )
        total = sum(stream.share for stream in self.more.values())
        if total >= 1:
            raise ValueError(
                f"the shares of data.more add up to {total:g}, which leaves nothing of a batch to data.train: together "
                "they must be below 1"
            )
        return self

    @model_validator(mode="after")
    def _default_views(self) -> Self:
        if self.views is None:
            # a crop of a built scene could cut off an object that its captions count
            sources = (self.train, *(stream.source for stream in self.more.values()))
            scenes = any(source.partition(":")[0].startswith("scenes") for source in sources)
            views = WHOLE if scenes else ViewSpec()
            object.__setattr__(self, "views", views)
            self.model_fields_set.discard("views")  # so that `for_dialogues` knows that nobody set them
        return self

    def for_dialogues(self) -> Self:
        """The same with whole pictures, unless views are set: a crop or flip can make an answer wrong."""
        return self if "views" in self.model_fields_set else self.model_copy(update={"views": WHOLE})

    @property
    def ordering(self) -> Ordering:
        """How the training samples are mixed."""
        return Ordering(self.order, self.lanes, self.window)

    @property
    def final(self) -> str | None:
        """The source of the final numbers."""
        return self.test or self.val

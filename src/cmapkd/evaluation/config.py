"""What is measured, and by which protocol: the settings of a run's final evaluation, and of `cmapkd evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import Field, field_validator, model_serializer

from cmapkd.config import RESUMABLE, Config
from cmapkd.data.config import DEFAULT_TIMEOUT, PromptConfig
from cmapkd.data.prompting import INSTRUCTIONS
from cmapkd.evaluation.drafting import DraftingConfig
from cmapkd.evaluation.efficiency import EfficiencyConfig
from cmapkd.evaluation.generation import WritingCostConfig
from cmapkd.evaluation.probes.config import CaptioningConfig, DetectionConfig, ProbeDataConfig, VQAConfig

C = TypeVar("C", bound=Config)


class WritingConfig(Config):
    """How models that write are asked. Everything here belongs to the protocol: scores depend on it."""

    batch_size: int = Field(
        16,
        ge=1,
        description="Dialogues at once. In half precision other batches round differently, and answers change.",
    )
    answer_tokens: int = Field(10, ge=1, description="Most tokens of an answer to a question.")
    caption_tokens: int = Field(64, ge=1, description="Most tokens of a description.")
    validation_samples: int | None = Field(
        256,
        ge=1,
        description="Most samples that a validation during the training asks about, as answers take long; none: all.",
    )
    asks: Literal["auto", "turns", "questions", "captions", "both"] | None = Field(
        None,
        description="What of a sample is asked, as data.prompts.kind in training; none: data.prompts in a run, else "
        "auto.",
    )
    question_suffix: str | None = Field(
        None,
        description="Text on a line of its own after every question; none: data.prompts.suffix in a run, else no text.",
    )
    instruction: str | None = Field(
        None,
        description="What asks for a description, empty: the picture alone; none: as data.prompts says in a run, else "
        "Describe the image.",
    )

    def like(self, prompts: PromptConfig) -> WritingConfig:
        """With the prompts of a training where no others are set here."""
        as_trained = {
            "asks": prompts.kind,
            "question_suffix": prompts.suffix,
            "instruction": "" if prompts.plain_captions else INSTRUCTIONS[0],
        }
        return self.model_copy(update={key: as_trained[key] for key in as_trained if getattr(self, key) is None})

    @property
    def resolved(self) -> WritingConfig:
        """With the defaults of an evaluation that belongs to no run."""
        return self.like(PromptConfig())


class EvaluationConfig(Config):
    """What is measured, and by which protocol (see docs/evaluation.md)."""

    words: ClassVar[tuple[str, ...]] = ("auto",)
    alone: ClassVar[bool] = True  # only tasks that need nothing but one model, the source and the run's teacher

    tasks: Literal["auto", "all"] | tuple[str, ...] = Field(
        "auto",
        description="What is measured; auto: retrieval and zero_shot, of models that write answering, yes_no, "
        "describing and perplexity, as far as the source serves them.",
    )
    templates: str = Field(
        "auto",
        description="Prompts of zero-shot classes: openai_imagenet, simple, photo, plain, scenes or a text file; "
        "auto: the source's own, else photo; none: only texts of class_prompts.",
    )
    class_prompts: str | None = Field(
        None,
        description="Texts of each class by itself, besides the templates: own, the source's; a JSON file {name: "
        "[text, ...]}; none: no such texts.",
    )
    class_names: str | None = Field(
        None, description="Names of the labels: imagenet, or a text or JSON file; none: the source's own."
    )
    batch_size: int = Field(
        256,
        ge=1,
        description="Images, and texts, encoded at once; no influence on the scores.",
        json_schema_extra=RESUMABLE,
    )
    workers: int = Field(
        0,
        ge=0,
        description="Processes that read and decode; 0: the evaluating process itself.",
        json_schema_extra=RESUMABLE,
    )
    timeout: float = Field(
        DEFAULT_TIMEOUT,
        ge=0,
        description="Seconds that a batch may take to be read before it stops; 0: any time.",
        json_schema_extra=RESUMABLE,
    )
    limit: int | None = Field(None, ge=1, description="Only the first so many samples; none: all.")
    shared_captions: bool = Field(
        False, description="Whether identical captions of other images count as right; no in the standard protocol."
    )
    negatives: int = Field(
        4, ge=1, description="compositional: false texts that a sample's first caption is compared with, at most."
    )
    writing: WritingConfig = Field(default_factory=WritingConfig, description="How models that write are asked.")
    drafting: DraftingConfig = Field(
        default_factory=DraftingConfig, description="How drafts of a model that writes are measured."
    )

    settings: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Settings of tasks that installed packages add, by the task's name."
    )

    @field_validator("tasks", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        """Shape only: `tasks.check_tasks` knows the names."""
        if isinstance(value, str) and value in cls.words:
            return value
        if isinstance(value, str):
            return (value,)
        if not isinstance(value, Sequence) or not value:
            raise ValueError(f"must be {' or '.join(cls.words)}, or one or more tasks; got {value!r}")
        return tuple(dict.fromkeys(value))

    @model_serializer(mode="wrap")
    def _without_empty_settings(self, handler: Any) -> dict[str, Any]:
        """An evaluation is written as it was before packages could add tasks, before models that write, and so on.

        So runs and comparisons of earlier versions are still found by what their configs hold.
        """
        values: dict[str, Any] = handler(self)
        if not self.settings:
            del values["settings"]
        if self.class_prompts is None:
            del values["class_prompts"]
        if self.writing == WritingConfig():
            del values["writing"]
        if self.drafting == DraftingConfig():
            del values["drafting"]
        if self.negatives == type(self).model_fields["negatives"].default:
            del values["negatives"]
        return values

    def of_task(self, name: str, kind: type[C]) -> C:
        """The settings of a task: the section of its name, or what `settings` holds for it.

        Raises:
            ConfigError: they do not fit.
        """
        section = getattr(self, name, None)
        if isinstance(section, kind) and name in type(self).model_fields:
            return section
        return kind.from_mapping(self.settings.get(name, {}), where=f"settings of task {name}")


class SuiteConfig(EvaluationConfig):
    """Settings of `cmapkd evaluate`: every task, and the probes that some of them train."""

    words: ClassVar[tuple[str, ...]] = ("auto", "all")
    alone: ClassVar[bool] = False

    efficiency: EfficiencyConfig = Field(default_factory=EfficiencyConfig, description="How the cost is measured.")
    generation: WritingCostConfig = Field(
        default_factory=WritingCostConfig, description="How the cost of writing is measured."
    )
    probes: ProbeDataConfig = Field(default_factory=ProbeDataConfig, description="What all probes learn from.")
    vqa: VQAConfig = Field(default_factory=VQAConfig, description="The probe that answers questions.")
    captioning: CaptioningConfig = Field(
        default_factory=CaptioningConfig, description="The probe that writes captions."
    )
    detection: DetectionConfig = Field(default_factory=DetectionConfig, description="The probe that finds objects.")

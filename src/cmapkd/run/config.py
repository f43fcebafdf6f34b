"""Everything a run depends on, as one config."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from cmapkd.cache import DEFAULT_VIEWS, CacheConfig
from cmapkd.config import Config, closest
from cmapkd.data.config import DataConfig, PromptConfig
from cmapkd.evaluation.probes.config import HeadsConfig
from cmapkd.evaluation.run import EvaluationConfig
from cmapkd.evaluation.tasks import TASKS, check_tasks
from cmapkd.methods import METHODS, MethodConfig, check_teachers
from cmapkd.methods.classifying import ClassifyingConfig
from cmapkd.methods.generative import GenerativeConfig
from cmapkd.models import Classifier, ModelConfig
from cmapkd.models.generative import GenerativeModel
from cmapkd.training import OptimConfig, TrainConfig

_LATER = (
    "more_teachers",
    "heads",
    "cache",
    "data.mix_synthetic",
    "data.more",
    "data.more_views",
    "data.teacher_view",
    "data.views.reading",
    "data.held_out",
    "data.timeout",
    "data.unpaired_weight",
    "data.order",
    "data.lanes",
    "data.window",
    "evaluation.timeout",
    "training.activation_checkpointing",
    "training.checkpoint_form",
    "training.local_loss",
    "training.mean_every",
    "training.sharding",
    "training.shard_teacher",
)
"""Settings that came later than the first runs. At its default each is left out: the run is what it was before."""

_COPY = "student"
"""The word for a teacher that is a frozen copy of the student as it begins; a folder of that name is ./student."""

_OF_WRITERS = ("cache.top_k", "cache.max_answer_tokens", "data.prompts", "data.max_tokens")
"""Settings that came with models that write. Runs of other models leave them out in the same way."""


class RunConfig(Config):
    """Everything a run depends on. The run folder holds it resolved, so that it can be repeated."""

    teacher: ModelConfig | None = Field(
        None,
        description="The model that teaches; none for methods contrastive and sft. student: a frozen copy of the "
        "student's first weights.",
    )
    more_teachers: dict[str, ModelConfig] = Field(
        default_factory=dict, description="Further teachers by names of their own, for methods that take several."
    )
    student: ModelConfig = Field(description="The model that learns.")
    data: DataConfig = Field(description="What it learns from and is measured on.")
    method: SerializeAsAny[MethodConfig] = Field(description="How it learns: a name, or a name with its settings.")
    heads: HeadsConfig | None = Field(
        None, description="Small heads that learn with the student: vqa, captioning, detection, each with its weight."
    )
    training: TrainConfig = Field(description="How long and in what precision.")
    optim: OptimConfig = Field(default_factory=OptimConfig, description="Optimiser and learning rate.")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="What is measured at the end.")
    baseline: Literal["none", "scratch"] | Path = Field(
        "none", description="Compared with: none; scratch, the same student trained here without teacher; a run folder."
    )
    seed: int = Field(0, ge=0, lt=2**64, description="Of initialisation, data order and replacements.")
    cache: CacheConfig | None = Field(
        None, description="off, auto or require: the teacher answers from disk; or with settings."
    )

    @model_validator(mode="before")
    @classmethod
    def _student_teaches(cls, values: Any) -> Any:
        """`teacher: student` becomes the student's own settings, so that a saved config says whose weights taught."""
        if not isinstance(values, dict):
            return values
        resolved = dict(values)
        if _is_copy(values.get("teacher"), "teacher"):
            resolved["teacher"] = _copied(values.get("student"), "teacher")
        more = values.get("more_teachers")
        if isinstance(more, dict):
            copies = {role: _is_copy(model, f"more_teachers.{role}") for role, model in more.items()}
            resolved["more_teachers"] = {
                role: _copied(values.get("student"), f"more_teachers.{role}") if copies[role] else model
                for role, model in more.items()
            }
        return resolved

    @field_validator("more_teachers", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("more_teachers")
    @classmethod
    def _names_of_their_own(cls, value: dict[str, ModelConfig]) -> dict[str, ModelConfig]:
        for name in value:
            if name in ("student", "teacher") or not name.isidentifier():
                raise ValueError(
                    f"{name!r} cannot name a further teacher: use a word of letters, digits and underscores that is "
                    "not student or teacher"
                )
        return value

    @field_validator("cache", mode="before")
    @classmethod
    def _cache_may_be_off(cls, value: Any) -> Any:
        mode = value.get("mode", value.get("name")) if isinstance(value, dict) else value
        return None if mode in ("off", False) else value  # YAML reads `off` as false

    @field_validator("evaluation")
    @classmethod
    def _known_tasks(cls, value: EvaluationConfig) -> EvaluationConfig:
        check_tasks(value)
        return value

    @model_validator(mode="after")
    def _whole_pictures_of_dialogues(self) -> Self:
        if self.writes:
            object.__setattr__(self, "data", self.data.for_dialogues())
            if self.data.views is not None and self.data.views.reading != "exact":
                raise ValueError(
                    f"data.views.reading: {self.data.views.reading} is for models of two towers, and a model that "
                    "writes resizes pictures by its own processor: leave reading out"
                )
            return self
        unread = {"data.prompts": self.data.prompts != PromptConfig(), "data.max_tokens": self.data.max_tokens}
        for name, given in unread.items():
            if given:
                raise ValueError(
                    f"{name} is for models that write, and method {self.method.name} trains none: leave it out"
                )
        return self

    @model_validator(mode="after")
    def _unanswered_questions_are_judged(self) -> Self:
        if self.data.prompts.unanswered == "student" and getattr(self.method, "on_policy", None) is None:
            raise ValueError(
                f"data.prompts.unanswered: student lets the student answer, and method {self.method.name} learns from "
                "given answers alone here: set method.on_policy (token_kd), or leave unanswered out"
            )
        gate = getattr(getattr(self.method, "on_policy", None), "gate", None)
        if self.data.prompts.unanswered == "student" and gate is not None:
            raise ValueError(
                "method.on_policy.gate compares answers of the student's own with those of the data, and with "
                "data.prompts.unanswered: student some have none: leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _views_cycle_with_a_cache(self) -> Self:
        """A new view in every epoch would be stored and read once: with a cache they cycle, unless the recipe says."""
        views = self.data.views
        if self.cache is not None and views is not None and views.num_views is None:
            cycled = views.model_copy(update={"num_views": DEFAULT_VIEWS})
            object.__setattr__(self, "data", self.data.model_copy(update={"views": cycled}))
        return self

    @field_validator("method", mode="before")
    @classmethod
    def _method_by_name(cls, value: Any) -> Any:
        values = {"name": value} if isinstance(value, str) else value
        if not isinstance(values, dict):
            return value
        name = str(values.get("name"))
        if name not in METHODS:
            raise ValueError(f"unknown method {name!r}{closest(name, METHODS)}; known: {', '.join(METHODS)}")
        return METHODS[name].Config.from_mapping(values, where=f"method {name}")

    @model_validator(mode="after")
    def _teacher_fits_method(self) -> Self:
        uses_teacher = METHODS[self.method.name].uses_teacher
        if uses_teacher and self.teacher is None:
            raise ValueError(f"method {self.method.name} distils from a teacher: add teacher: MODEL")
        if uses_teacher:
            check_teachers(self.method.name, self.more_teachers)
        if self.method.name == METHODS[self.method.name].scratch and self.baseline == "scratch":
            raise ValueError(
                f"method {self.method.name} has no teacher: it is the scratch baseline itself, drop baseline"
            )
        return self

    @model_validator(mode="after")
    def _cache_serves_method(self) -> Self:
        """What the settings alone tell is told before a teacher is loaded."""
        name, reason = self.method.name, METHODS[self.method.name].not_cached or self.method.not_cached
        if self.cache is not None and self.teacher is not None and reason is not None:
            raise ValueError(f"method {name} takes no teacher cache as it is set: {reason}. Set cache: off")
        return self

    @model_validator(mode="after")
    def _mixing_is_read(self) -> Self:
        name, share, reason = self.method.name, self.data.mix_synthetic, self.method.why_unmixed
        if share and reason is not None:
            raise ValueError(
                f"data.mix_synthetic is {share:g}, and with method {name} that changes nothing: {reason}. Leave it out"
            )
        return self

    @model_validator(mode="after")
    def _pictures_without_captions(self) -> Self:
        """Has a teacher, and pairs beside them."""
        silent = [name for name, stream in self.data.more.items() if stream.captions == "none"]
        if silent and self.method.reads_captions and not METHODS[self.method.name].uses_teacher:
            raise ValueError(
                f"stream {silent[0]!r} has captions: none, and method {self.method.name} has no teacher that such "
                "pictures could be learned from: leave the stream out"
            )
        alone = [stage.name for stage in self.training.stages if silent and stage.data is not None]
        if alone:
            raise ValueError(
                f"stream {silent[0]!r} has captions: none, and its pictures are learned from beside pairs, but stage "
                f"{alone[0]!r} reads one stream alone: leave data out of the stage"
            )
        return self

    @model_validator(mode="after")
    def _weights_to_inherit(self) -> Self:
        for role, model in self.teachers.items():
            if model.inherit is not None:
                raise ValueError(f"teacher {role} would inherit weights: only the student does")
        inherit = self.student.inherit
        if inherit is not None and inherit.name == "teacher" and self.teacher is None:
            raise ValueError(
                f"student.inherit is teacher, and method {self.method.name} has none here: add teacher: MODEL, or name "
                "the model to inherit from"
            )
        return self

    @model_validator(mode="after")
    def _tasks_fit_method(self) -> Self:
        reads, tasks = METHODS[self.method.name].reads, self.evaluation.tasks
        other = [name for name in tasks if not self._measures(name)] if isinstance(tasks, tuple) else []
        if other:
            able = ", ".join(name for name, task in TASKS.own.items() if task.alone and self._measures(name))
            raise ValueError(
                f"evaluation.tasks names {', '.join(other)}, and method {self.method.name} trains a {reads.__name__}, "
                f"which cannot be measured so: choose among {able}, or auto"
            )
        beside = [name for name in tasks if TASKS[name].needs_reference] if isinstance(tasks, tuple) else []
        if beside and self.teacher is None:
            raise ValueError(
                f"evaluation.tasks names {', '.join(beside)}, which compares with the teacher, and there is none: add "
                "teacher: MODEL"
            )
        return self

    @model_validator(mode="after")
    def _classifiers_have_no_heads_of_tasks(self) -> Self:
        if self.classifies and self.heads is not None:
            raise ValueError(
                f"heads of vqa, captioning and detection learn beside two towers, and method {self.method.name} trains "
                "a classifier: leave heads out"
            )
        return self

    @model_validator(mode="after")
    def _validation_has_data(self) -> Self:
        if self.training.evaluate_every is not None and self.data.val is None:
            raise ValueError("training.evaluate_every is set, but there is nothing to validate on: add data.val")
        tasks = self.evaluation.tasks
        if self.training.evaluate_every is None or not isinstance(tasks, tuple):
            return self
        if not any(TASKS[name].headline for name in tasks):
            able = " or ".join(
                name for name, task in TASKS.own.items() if task.alone and task.headline and self._measures(name)
            )
            raise ValueError(
                f"training.evaluate_every is set, and the best step is chosen by {able}, but evaluation.tasks is "
                f"{', '.join(tasks)}: add one of them"
            )
        return self

    def scratch(self) -> RunConfig:
        """The baseline of this run: same student, data, steps and seed; nothing of a teacher, and so no stages.

        A student that writes may have its teacher's tokenizer: the teacher is still named, though it teaches nothing.
        """
        name = METHODS[self.method.name].scratch
        kept: dict[str, Any] = {}
        if isinstance(self.method, GenerativeConfig):
            kept = {"reduction": self.method.reduction}
        elif isinstance(self.method, ClassifyingConfig):
            kept = {"label_share": self.method.label_share}
        alone_method = METHODS[name].Config(name=name, **kept)
        training = self.training.without_stages()
        # frozen towers of the student answer from disk here as well
        cache = self.cache if self.training.train_parts is not None or self.student.freezes_parts else None
        alone = {"method": alone_method, "training": training, "baseline": "none", "cache": cache}
        student = self.student.model_copy(update={"inherit": None})
        named = self.teacher if self.writes else None
        prompts = self.data.prompts.model_copy(update={"unanswered": "leave_out"})
        # without a teacher nothing is learned from pictures alone
        more = {name: stream for name, stream in self.data.more.items() if stream.captions == "read"}
        data = self.data.model_copy(update={"prompts": prompts, "teacher_view": "same", "more": more})
        return self.model_copy(
            update={**alone, "student": student, "data": data, "teacher": named, "more_teachers": {}}
        )

    def without_teachers(self) -> RunConfig:
        """The same for a method that uses none."""
        data = self.data.model_copy(update={"teacher_view": "same"})
        return self.model_copy(update={"teacher": None, "more_teachers": {}, "data": data})

    def _measures(self, task: str) -> bool:
        """Whether the task reads models such as the method trains."""
        return issubclass(METHODS[self.method.name].reads, TASKS[task].reads)

    @property
    def writes(self) -> bool:
        """Whether the student is a model that writes, by what its method reads."""
        return issubclass(METHODS[self.method.name].reads, GenerativeModel)

    @property
    def classifies(self) -> bool:
        """Whether the student is a classifier."""
        return issubclass(METHODS[self.method.name].reads, Classifier)

    @property
    def teachers(self) -> dict[str, ModelConfig]:
        """All teachers by role: `teacher`, then the further ones by name."""
        return {} if self.teacher is None else {"teacher": self.teacher, **self.more_teachers}

    def plain(self) -> dict[str, Any]:
        """As plain data, every default written out but those of `_LATER` and `_OF_WRITERS`."""
        values = self.model_dump(mode="json")
        if not values["method"]["several_positives"]:
            del values["method"]["several_positives"]
        if (policy := values["method"].get("on_policy")) and policy.get("gate") is None:
            policy.pop("gate", None)
        asks = type(self.method).model_fields.get("asks")  # of makd
        if asks is not None and values["method"]["asks"] == asks.default:
            del values["method"]["asks"]
        for view in values["data"]["more_views"].values():
            del view["reading"]  # that of data.views
            if view["of"] == "picture":  # as before there was another
                del view["of"]
        for stream in values["data"].get("more", {}).values():
            for key in ("labels", "captions"):
                if stream[key] == "read":  # as before there was another
                    del stream[key]
        for path in (*(() if self.writes else _OF_WRITERS), *_LATER):
            *above, name = path.split(".")
            section: Config | None = self
            written = values
            for each in above:
                section, written = getattr(section, each), written[each]
            if section is None:  # no cache
                continue
            if not section.changed(name):
                del written[name]
        return values


def _is_copy(teacher: Any, where: str) -> bool:
    """Whether a teacher is the word `student`: a frozen copy of the student's first weights.

    Raises:
        ValueError: it has settings of its own besides.
    """
    own = isinstance(teacher, dict) and teacher.get("name") == _COPY
    if own and (more := [key for key in teacher if key != "name"]):
        raise ValueError(
            f"{where}: student is the student as it begins, with the student's own settings: leave "
            f"{', '.join(map(str, more))} out, or name the model"
        )
    return own or teacher == _COPY


def _copied(student: Any, where: str) -> Any:
    """The student's settings, for a teacher, which keeps all of its words.

    Raises:
        ValueError: the student begins with weights that no second model could be built with.
    """
    plain = student.model_dump() if isinstance(student, ModelConfig) else student
    settings = plain if isinstance(plain, dict) else {}
    if settings.get("init") == "scratch":
        raise ValueError(f"{where}: student, and the student begins with random weights, which teach nothing")
    if settings.get("inherit") is not None:
        raise ValueError(f"{where}: student, and the student's weights are cut from a larger model: name that model")
    return {key: value for key, value in settings.items() if key != "vocabulary"} if settings else plain

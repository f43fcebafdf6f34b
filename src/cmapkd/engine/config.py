"""The settings of an engine: a recipe of what is proposed, who answers, what is kept and how it is written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from cmapkd.config import Config, ConfigError, closest, load_mapping
from cmapkd.config.resumable import RESUMABLE
from cmapkd.engine.filters import AgreeConfig, FilterConfig
from cmapkd.engine.programs import ProgramsConfig
from cmapkd.engine.proposals import ProposeConfig
from cmapkd.engine.written import AskConfig
from cmapkd.models import ModelConfig

MOST_DRAFTS = 64


class AnswerConfig(AskConfig):
    """Who answers every candidate that is still kept, how often, and what is shown."""

    drafts: int = Field(1, ge=1, le=MOST_DRAFTS, description="Answers to each question, each drawn by itself.")

    @model_validator(mode="after")
    def _drafts_differ(self) -> Self:
        if self.drafts > 1 and self.temperature == 0:
            raise ValueError(f"{self.drafts} drafts at temperature 0 are all the same: set a temperature above 0")
        return self


class WriteConfig(Config):
    """What is written of the candidates that every filter keeps."""

    picture: Literal["whole", "boxed"] = Field(
        "whole", description="whole: as it is; boxed: with a red box around the candidate's region."
    )
    place: Literal["own", "random"] = Field(
        "own", description="Of the box: own, or random: anywhere in the picture. A control, for boxed."
    )
    note: str = Field(
        "",
        description="Stands after every written question, and every one about a boxed picture, behind an empty line.",
    )
    why: str = Field(
        "",
        description="Each question is written a second time, with this on a line of its own, and answered by its "
        "rationale. Empty: once.",
    )
    control: bool = Field(
        False,
        description="Also write random.jsonl: as many candidates with an answer as are kept, and of each relation as "
        "many, whatever filters say.",
    )

    @model_validator(mode="after")
    def _only_boxes_move(self) -> Self:
        if self.place == "random" and self.picture != "boxed":
            raise ValueError("place: random moves the box, and picture: whole draws none: set picture: boxed")
        return self


class EngineConfig(Config):
    """Everything the written data depend on; `manifest.json` of their folder holds it resolved."""

    data: str = Field(description="The source of pictures. See docs/data.md.")
    models: dict[str, ModelConfig] = Field(
        min_length=1, description="Models by names of your choice. Untrained ones take the first one's tokenizer."
    )
    propose: ProposeConfig = Field(description="What is asked of each picture: exactly one kind.")
    answers: dict[str, AnswerConfig] = Field(
        default_factory=dict, description="Name -> who answers. Asked when the first filter reads that name."
    )
    verify: tuple[FilterConfig, ...] = Field((), description="Filters in their order, each of exactly one kind.")
    write: WriteConfig = Field(default_factory=WriteConfig, description="What is written.")
    seed: int = Field(0, description="Of all draws.")
    shard_samples: int = Field(64, ge=1, description="Samples of a shard. A stop loses the shard that is being made.")
    batch_size: int = Field(16, ge=1, description="Questions that are answered at once.")
    on_cpu: bool = Field(False, description="Compute on the CPU where there is a GPU.", json_schema_extra=RESUMABLE)

    @field_validator("models", "answers")
    @classmethod
    def _plain_names(cls, value: dict[str, object]) -> dict[str, object]:
        for name in value:
            if not name.isidentifier():
                raise ValueError(f"the name {name!r} is not made of letters, digits and _: choose another")
        return value

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        problems = list(self._problems())
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _problems(self) -> Iterable[str]:
        asked = [(where, each.by) for where, each in self.propose.asks.items()]
        asked += [(f"answers.{key}", each.by) for key, each in self.answers.items()]
        asked += [("verify", name) for each in self.verify for name in each.models]
        for where, name in asked:
            if name not in self.models:
                yield f"{where} names the model {name!r}{closest(name, self.models)}; models has {_listed(self.models)}"
        read = {name for each in self.verify for name in each.answers}
        for name in sorted(read - self.answers.keys()):
            yield f"verify reads answers {name!r}{closest(name, self.answers)}; answers has {_listed(self.answers)}"
        if unread := sorted(self.answers.keys() - read):
            yield f"no filter reads the answers {_listed(unread)}: leave them out"
        if unused := sorted(self.models.keys() - {name for _, name in asked}):
            yield f"nothing asks the models {_listed(unused)}: leave them out"
        yield from self._without_regions()
        if self.propose.crops is not None and (not self.verify or self.verify[0].majority is None):
            yield "nothing gives the questions of propose.crops an answer: let a majority come first in verify"
        if self.propose.facts is None and any(each.critic is not None for each in self.verify):
            yield "a critic reads statements, which propose.facts alone makes"
        yield from self._without_ways()
        yield from self._idle()

    def _without_regions(self) -> Iterable[str]:
        shown = [self.write.picture, *(each.sees for each in self.answers.values())]
        shown += [each.critic.sees for each in self.verify if each.critic is not None]
        if self.propose.programs is None:  # its tools look at regions of their own
            shown += [each.sees for each in self.propose.asks.values()]
        if not self.propose.regions and any(each != "whole" for each in shown):
            yield (
                "only propose.crops and propose.facts with regions: true have regions that could be shown apart or "
                "boxed: set whole everywhere"
            )

    def _without_ways(self) -> Iterable[str]:
        """Filters that compare answers to one question, and what they need."""
        programs = self.propose.programs
        labelled = programs.asks_the_datas if programs else self.propose.questions is not None
        left: int | None = None  # of a question, behind the filters so far
        for each in self.verify:
            if each.first is not None:
                left = min(each.first.number, left or each.first.number)
            if each.agree is not None and left is not None and each.agree.ways > left:
                yield f"first keeps {left} of each question, and agree behind it asks for more: let agree come before"
            if each.label is not None and not labelled:
                yield "label reads the data's answers, and only questions of the data have any: propose those alone"
            if programs is None and (each.agree or each.first):
                yield f"{each.kind} reads several answers to one question, which propose.programs alone makes"
            if programs is not None and each.agree is not None:
                yield from _lonely(programs, each.agree)
        if self.write.why:
            without = [
                f"{name}.ways.{key}"
                for name, kind in (programs.kinds.items() if programs else ())
                for key, way in kind.ways.items()
                if way.rationale is None
            ]
            if programs is None or without:
                where = f": kinds.{without[0]} has none" if without else ""
                yield f"write.why asks for a rationale, which only programs can have{where}"

    def _idle(self) -> Iterable[str]:
        """What would silently do nothing, or other than it says."""
        for each in self.verify:
            read = {name: self.answers[name] for name in each.answers if name in self.answers}
            if each.parity is not None or each.right is not None:
                for name, how in read.items():
                    if how.drafts > 1:
                        yield f"{each.kind} reads one draft, and answers.{name} has {how.drafts}: set drafts to 1"
            if each.hard is not None:
                for name, how in read.items():
                    if each.hard.most >= how.drafts:
                        yield (
                            f"hard.most is {each.hard.most}, and answers.{name}.drafts {how.drafts}: nothing would be "
                            "dropped. Set more drafts"
                        )
        relations = self.propose.facts.relations if self.propose.facts is not None else {}
        own = {name for each in self.verify if each.critic for name in each.critic.thresholds}
        for name in sorted(own - relations.keys()):
            yield f"thresholds names the relation {name!r}{closest(name, relations)}; there are {_listed(relations)}"

    @property
    def each(self) -> int | None:
        """So many candidates of a question are kept at most; None: any number."""
        return min((one.first.number for one in self.verify if one.first is not None), default=None)

    @property
    def labels(self) -> tuple[str, ...]:
        """A name for each filter: its kind, with a number where a kind comes again."""
        kinds = [each.kind for each in self.verify]
        return tuple(
            kind if kinds.index(kind) == place else f"{kind} {kinds[: place + 1].count(kind)}"
            for place, kind in enumerate(kinds)
        )


def _lonely(programs: ProgramsConfig, agree: AgreeConfig) -> Iterable[str]:
    for name, kind in programs.kinds.items():
        if len(kind.ways) < agree.ways:
            yield (
                f"agree.ways is {agree.ways}, and propose.programs.kinds.{name} has {len(kind.ways)}: all would "
                "be dropped. Add a way"
            )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def list_engine_recipes() -> list[str]:
    """Names of the packaged recipes of `cmapkd engine`."""
    folder = resources.files("cmapkd.recipes") / "engine"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_engine(recipe: str | Path, overrides: Sequence[str] = ()) -> EngineConfig:
    """A packaged recipe by name, or a YAML file, with `key=value` overrides.

    Raises:
        ConfigError: there is none, or any key or value is wrong.
    """
    path = Path(recipe)
    if not path.is_file():
        known = list_engine_recipes()
        if str(recipe) not in known:
            raise ConfigError(
                f"there is no engine recipe {str(recipe)!r}{closest(str(recipe), known)}: give a YAML file or one of "
                f"{', '.join(known)}"
            )
        path = Path(str(resources.files("cmapkd.recipes") / "engine" / f"{recipe}.yaml"))
    values = load_mapping(path, list(overrides))
    return EngineConfig.from_mapping(values, where=f"engine recipe {str(recipe)!r}")

"""A run's models on validation pictures: what the gallery, the confusions and the calibration are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cmapkd.config import ConfigError, counted
from cmapkd.data.config import PromptConfig
from cmapkd.data.open import open_source, split_of
from cmapkd.data.types import BadSampleError, Sample, Source
from cmapkd.evaluation.config import EvaluationConfig
from cmapkd.evaluation.embed import Embedded
from cmapkd.evaluation.subject import Bench, Subject
from cmapkd.models import Classifier, GenerativeModel, Model, build_teacher, dual, load_model, writing
from cmapkd.models.config import ModelConfig
from cmapkd.report.plain import mapping, shortened, string
from cmapkd.report.questioned import MAX_PICTURES as MAX_ASKED
from cmapkd.report.questioned import Questioned, question
from cmapkd.report.read import RunFolder

MAX_PICTURES = 1_000
"""Pictures that a gallery is drawn from: more take minutes of a CPU and show no more."""


class NothingToWatch(Exception):
    """Why there is no gallery, in a sentence that says what to do."""


@dataclass
class Watched:
    """Models of a run on the first pictures of a source.

    Attributes:
        subjects: teacher, student and baseline, those that could be loaded; each has seen the same pictures.
        total: pictures of the whole source.
        notes: models that are missing, and why.
        test: whether the source is a test split, which nobody chooses by.
    """

    source: Source
    subjects: dict[str, Subject]
    total: int
    notes: tuple[str, ...] = ()
    test: bool = False
    _places: dict[int, int] = field(default_factory=dict)

    @property
    def seen(self) -> Embedded:
        return next(iter(self.subjects.values())).embedded

    def sample(self, row: int) -> Sample | None:
        """The picture of a row of the embeddings; None where it cannot be read again."""
        if not self._places:
            self._find_places()
        with suppress(BadSampleError, KeyError):
            sample = self.source[self._places[row]]
            return sample if sample.id == self.seen.ids[row] else None
        return None

    def _find_places(self) -> None:
        """Where each row stands in the source: rows follow its order and lack what could not be read."""
        if not self.seen.bad:
            self._places = {row: row for row in range(len(self.seen.ids))}
            return
        row = 0
        for place in range(min(self.total, len(self.seen.ids) + len(self.seen.bad))):
            with suppress(BadSampleError):
                if row < len(self.seen.ids) and self.source[place].id == self.seen.ids[row]:
                    self._places[row], row = place, row + 1


def watch(
    run: RunFolder, *, data: str | None, split: str, pictures: int = MAX_PICTURES, say: Callable[[str], None]
) -> Watched | Questioned:
    """Loads a run's models and shows them validation pictures; models that write are asked about these.

    Args:
        data: a source; None: the run's own validation source, unless `split` or the source's name makes it test data.
        split: of a source that has several.
    Raises:
        NothingToWatch: the run has no student that loads, or no validation source that can be read and is no test.
        ConfigError: `data` names no source.
    """
    spec = data or string(run.config, "data", "val")
    if spec is None:
        raise NothingToWatch("this run names no validation data: add --data SOURCE")
    if data is None and is_test(spec, split):
        chosen = f" --split {split}" if split != "val" else ""
        raise NothingToWatch(
            f"{spec} with split {split} is test data: to see it all the same, add --data {spec}{chosen}"
        )
    models, notes = _models(run)
    try:
        source = open_source(spec, split=split)
    except Exception as error:
        if data is not None:
            raise
        raise NothingToWatch(f"{spec} cannot be read ({_first(error)}): name other data with --data") from error
    if isinstance(models["student"], GenerativeModel):
        return _questioned(run, models, notes, source, test=is_test(spec, split), say=say)
    if isinstance(models["student"], Classifier):
        raise NothingToWatch("the student is a classifier, and this page shows pictures beside texts")
    bench = Bench(_settings(run, pictures), _device(), source)
    subjects: dict[str, Subject] = {}
    for name, model in models.items():
        say(f"{name}: embedding {counted(min(pictures, len(source)), 'picture')} of {source.name}")
        subject = Subject(name, model, bench)
        try:
            seen = subject.embedded
        except Exception as error:
            if name == "student":
                raise NothingToWatch(f"the student cannot embed {source.name} ({_first(error)})") from error
            notes[name] = f"cannot embed {source.name} ({_first(error)})"
            continue
        if subjects and seen.ids != next(iter(subjects.values())).embedded.ids:
            notes[name] = "could not read the same pictures"
            continue
        subjects[name] = subject
    order = [name for name in ("teacher", "student", "baseline") if name in subjects]
    told = tuple(f"The {name} is not in it: it {why}." for name, why in notes.items())
    return Watched(source, {name: subjects[name] for name in order}, len(source), told, is_test(spec, split))


def _questioned(
    run: RunFolder,
    models: Mapping[str, Model],
    notes: Mapping[str, str],
    source: Source,
    *,
    test: bool,
    say: Callable[[str], None],
) -> Questioned:
    """Raises NothingToWatch: there is nothing to ask, or the student reads no dialogue."""
    bench = Bench(_settings(run, min(MAX_ASKED, len(source))), _device(), source)
    try:
        seen = question(bench, models, say)
    except ValueError as error:
        raise NothingToWatch(f"the student cannot be asked about {source.name} ({_first(error)})") from error
    told = tuple(f"The {name} is not in it: it {why}." for name, why in notes.items())
    return replace(seen, notes=(*told, *seen.notes), test=test)


def is_test(spec: str, split: str) -> bool:
    """Whether a source is a test split."""
    with suppress(ConfigError):
        return (split_of(spec, default=split) or "").startswith("test")
    return False


def _models(run: RunFolder) -> tuple[dict[str, Model], dict[str, str]]:
    """The student first, then the others of its contract that load, and why some do not."""
    try:
        student = load_model(run.path / "student")
    except Exception as error:
        raise NothingToWatch(f"there is no student that loads ({_first(error)})") from error
    models: dict[str, Model] = {"student": student}
    fits = writing if isinstance(student, GenerativeModel) else dual
    notes: dict[str, str] = {}
    teacher = run.config.get("teacher")
    if teacher:
        try:
            config = mapping(run.config, "teacher") or {"name": str(teacher)}
            models["teacher"] = fits(build_teacher(ModelConfig.from_mapping(config, where="teacher")), "this page")
        except Exception as error:
            notes["teacher"] = f"cannot be loaded ({_first(error)})"
    for name in mapping(run.config, "more_teachers"):
        notes[f"teacher {shortened(name, 60)}"] = "is a further teacher, and the page shows the first"
    folder = _baseline_folder(run)
    if folder is not None:
        try:
            models["baseline"] = fits(load_model(folder), "this page")
        except Exception as error:
            notes["baseline"] = f"cannot be loaded ({_first(error)})"
    return models, notes


def _baseline_folder(run: RunFolder) -> Path | None:
    baseline = string(run.config, "baseline", longest=4_096)
    if baseline == "scratch":
        return run.path / "baseline"
    return None if baseline in (None, "none") else Path(baseline)


def _settings(run: RunFolder, pictures: int) -> EvaluationConfig:
    """The run's own templates, class names and texts of classes; defaults where its config cannot be read."""
    own = mapping(run.config, "evaluation")
    kept = {
        key: own[key] for key in ("templates", "class_names", "class_prompts", "batch_size") if own.get(key) is not None
    }
    values: dict[str, Any] = {**kept, "limit": pictures, "writing": mapping(run.config, "evaluation", "writing")}
    try:
        settings = EvaluationConfig.from_mapping(values, where="evaluation")
        prompts = PromptConfig.from_mapping(mapping(run.config, "data", "prompts"), where="data.prompts")
        return settings.model_copy(update={"writing": settings.writing.like(prompts)})
    except ConfigError:
        return EvaluationConfig(limit=pictures)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _first(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n", 1)[0][:200]


def class_names(watched: Watched) -> tuple[str, ...] | None:
    """Names of the labels, where pictures have labels and these have names."""
    subject = next(iter(watched.subjects.values()))
    if not bool((watched.seen.labels >= 0).any()):
        return None
    try:
        names = subject.class_names
    except ValueError:
        return None
    return names if names and int(watched.seen.labels.max()) < len(names) else None


def named(subjects: Mapping[str, Subject], *wanted: str) -> dict[str, Subject]:
    return {name: subjects[name] for name in wanted if name in subjects}

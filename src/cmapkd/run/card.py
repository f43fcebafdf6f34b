"""The card of a student, `student/README.md`: how to use it, where it comes from, and its scores."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cmapkd.config import counted, in_markdown
from cmapkd.evaluation.headline import headlines, retrieval_set
from cmapkd.evaluation.tasks import Headline
from cmapkd.methods import METHODS
from cmapkd.run.config import RunConfig

_EMBEDS = """```python
import cmapkd

student = cmapkd.load("student")  # this folder, or the run folder around it
found = student.embed(images=["a.jpg", "b.jpg"], texts=["a cat", "a dog"])  # unit vectors
print(found.similarity)  # cosines, images x texts
```"""

_CLASSIFIES = """```python
import cmapkd

student = cmapkd.load("student")  # this folder, or the run folder around it
print(student.class_names)
print(student.classify(["a.jpg", "b.jpg"]))  # probabilities, images x classes
```"""

_WRITES = """```python
import cmapkd

student = cmapkd.load("student")  # this folder, or the run folder around it
print(student.answer(["a.jpg", "b.jpg"], {questions}))  # an answer each
```"""


def student_card(config: RunConfig, metrics: Mapping[str, Any]) -> str:
    """The card as Markdown. It names no data, because paths may be private: `config.yaml` of the run does.

    Args:
        metrics: what `metrics.json` holds.
    """
    student = metrics["student"]
    teacher = ""
    if config.teacher is not None and METHODS[config.method.name].uses_teacher:
        teacher = f" from the teacher {_model(config.teacher.name)}"
    what, unit = ("A dual encoder of images and texts", "pair")
    use = _EMBEDS
    if config.classifies:
        what, unit, use = "A classifier of images", "sample", _CLASSIFIES
    if config.writes:
        what, unit = ("A model that answers questions about images,", "sample")
    lines = [
        f"# {_model(config.student.name)}, method {in_markdown(config.method.name)}",
        "",
        f"{what} with {student['params']:,} parameters. It was trained with cmapkd, method "
        f"{in_markdown(config.method.name)}{teacher}: {counted(metrics['steps'], 'step')} of "
        f"{counted(metrics['batch_size'], unit)}, seed {metrics['seed']}.",
        "",
        _asks(config.data.prompts.suffix) if config.writes else use,
        "",
        *_scores(metrics),
        "The licences of the teacher, of the student's first weights and of the data hold for this student too.",
    ]
    return "\n".join(lines) + "\n"


def _asks(suffix: str) -> str:
    """How a model that writes is asked: with the line that ended every question of its training."""
    texts = [f"{text}\n{suffix}" if suffix else text for text in ("What is it?", "Is it red?")]
    return _WRITES.format(questions=json.dumps(texts, ensure_ascii=False))


def _model(name: str) -> str:
    """A model by its name, of a folder the last part alone: where it lies may be private."""
    family, colon, rest = name.rpartition(":")
    is_folder = not colon or rest.startswith(("/", ".", "~"))
    return in_markdown(f"{family}{colon}{Path(rest).name}" if is_folder else name)


def _scores(metrics: Mapping[str, Any]) -> Iterator[str]:
    """A table of all models that were scored; nothing where none was."""
    names = {"student": "this student", "baseline": str(metrics.get("baseline_name")), "teacher": "teacher"}
    found = {role: headlines(metrics.get(role)) for role in names}
    if not found["student"]:
        return
    heads = {task: _head(headline) for task, (headline, _) in found["student"].items()}
    yield "| model | " + " | ".join(map(in_markdown, heads.values())) + " |"
    yield "| --- |" + " ---: |" * len(heads)
    for role, numbers in found.items():
        if numbers:
            shown = {task: f"{number:.{headline.digits}f}" for task, (headline, number) in numbers.items()}
            cells = [shown.get(task, "-") for task in heads]
            yield f"| {in_markdown(names[role])} | " + " | ".join(cells) + " |"
    of = retrieval_set(metrics["student"])
    yield ""
    recall = f" Recall is of {of}." if of else ""
    yield f"Scores are percent, where their head names no other unit.{recall} One seed."
    yield ""


def _head(headline: Headline) -> str:
    """With the unit, where the head does not name it."""
    return headline.unit if headline.unit.startswith(headline.head) else headline.head

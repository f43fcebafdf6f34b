"""The card of a student, `student/README.md`: how to use it, where it comes from, and its scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cmapkd.config import counted, in_markdown
from cmapkd.evaluation.headline import headlines, retrieval_set
from cmapkd.run.config import RunConfig

_USE = """```python
import cmapkd

student = cmapkd.load("student")  # this folder, or the run folder around it
found = student.embed(images=["a.jpg", "b.jpg"], texts=["a cat", "a dog"])  # unit vectors
print(found.similarity)  # cosines, images x texts
```"""


def student_card(config: RunConfig, metrics: Mapping[str, Any]) -> str:
    """The card as Markdown. It names no data, because paths may be private: `config.yaml` of the run does.

    Args:
        metrics: what `metrics.json` holds.
    """
    student = metrics["student"]
    teacher = "" if config.teacher is None else f" from the teacher {_model(config.teacher.name)}"
    lines = [
        f"# {_model(config.student.name)}, method {in_markdown(config.method.name)}",
        "",
        f"A dual encoder of images and texts with {student['params']:,} parameters. It was trained with cmapkd, method "
        f"{in_markdown(config.method.name)}{teacher}: {counted(metrics['steps'], 'step')} of "
        f"{counted(metrics['batch_size'], 'pair')}, seed {metrics['seed']}.",
        "",
        _USE,
        "",
        *_scores(metrics),
        "The licences of the teacher, of the student's first weights and of the data hold for this student too.",
    ]
    return "\n".join(lines) + "\n"


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
    heads = {task: headline.head for task, (headline, _) in found["student"].items()}
    yield "| model | " + " | ".join(map(in_markdown, heads.values())) + " |"
    yield "| --- |" + " ---: |" * len(heads)
    for role, numbers in found.items():
        if numbers:
            cells = [f"{numbers[task][1]:.1f}" if task in numbers else "-" for task in heads]
            yield f"| {in_markdown(names[role])} | " + " | ".join(cells) + " |"
    of = retrieval_set(metrics["student"])
    yield ""
    yield "R@1 and accuracies are per cent" + (f", recall is of {of}" if of else "") + ". One seed."
    yield ""

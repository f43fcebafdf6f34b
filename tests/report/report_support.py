"""Run folders for tests of reports: real models and files, scores that a test can choose, content that is hostile."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "families"))

from cmapkd.evaluation.run import evaluate
from cmapkd.models import DualEncoder
from cmapkd.results import gap_closed
from helpers import make_model

HOSTILE = (
    "<img src=x onerror=\"document.title='taken'\">",
    "</script><script>document.title='taken'</script>",
    '"><svg onload="document.title=\'taken\'">',
    "{{7*7}} {% raw %} ${7*7}",
    "abc \u202egnp.exe\u202c \x00\x1b[31m end",
    "& ' \" < > `",
    "x" * 3_000,
    "مرحبا red cat",
)
CLASSES = ["<b>bold class</b>", "red cat", "green dog", "blue boat", "\u202eclass"]


def write_pictures(folder: Path, *, count: int = 16, captions: tuple[str, ...] = HOSTILE) -> str:
    """Pictures on disk with two captions each and a label; returns the source."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        draws = np.random.default_rng(number)
        path = folder / "pictures" / f"{number}<b>.png"
        Image.fromarray(draws.integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(path)
        said = [captions[number % len(captions)], f"red cat near tree {number}"]
        lines += [{"image": str(path), "caption": each, "label": number % len(CLASSES)} for each in said]
    (folder / "val.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "classes.json").write_text(json.dumps(CLASSES))
    return f"jsonl:{folder / 'val.jsonl'}"


def write_run(
    out: Path,
    *,
    source: str,
    student: DualEncoder | None = None,
    teacher: DualEncoder | None = None,
    baseline: bool = True,
    seed: int = 0,
    lift: float = 0.0,
    weights: bool = True,
) -> Path:
    """A finished run folder as `run` leaves it, of models that were not trained; their scores are measured.

    Args:
        lift: added to the student's mean R@1.
        weights: whether it logged weights of levels.
    """
    from cmapkd.data.open import open_source

    student, teacher = student or make_model(seed=seed), teacher or make_model(dim=24, image_size=24, seed=7)
    student.save(out / "student")
    teacher.save(out.parent / "teacher")
    classes = Path(source.removeprefix("jsonl:")).with_name("classes.json")
    evaluation = {"templates": "plain", "class_names": str(classes)}
    config: dict[str, Any] = {
        "teacher": {"name": str(out.parent / "teacher")},
        "student": {"name": "tiny:<i>student</i>"},
        "data": {"train": source, "val": source, "test": None},
        "method": {"name": "cmapkd", "note": "</style><script>document.title='taken'</script>"},
        "training": {"steps": 900, "batch_size": 8},
        "evaluation": evaluation,
        "baseline": "scratch" if baseline else "none",
        "seed": seed,
    }
    models = {"teacher": teacher, "student": student, "baseline": None}
    if baseline:
        models["baseline"] = make_model(seed=seed + 50)
        models["baseline"].save(out / "baseline" / "student")
    from cmapkd.evaluation.config import EvaluationConfig

    settings = EvaluationConfig.from_mapping(evaluation, where="test")
    scores: dict[str, Any] = {
        role: None if model is None else evaluate(model, open_source(source), settings, device="cpu")
        for role, model in models.items()
    }
    scores["student"]["retrieval"]["mean_r@1"] += lift
    metrics = scores | {
        "baseline_name": "scratch" if baseline else None,
        "gap_closed": gap_closed(*(scores[role] for role in ("teacher", "student", "baseline"))),
        "method": "cmapkd",
        "evaluated_on": "pictures <u>of</u> a test",
        "seed": seed,
        "steps": 900,
        "batch_size": 8,
        "train_seconds": 61.0,
        "best_step": 900,
        "bad_samples": {"num_bad": 2},
    }
    (out / "metrics.json").write_text(json.dumps(metrics))
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    environment = {"command": ["cmapkd", "distill", "<recipe>"], "packages": {"cmapkd": "0.1"}, "git_commit": "a" * 40}
    (out / "environment.json").write_text(json.dumps(environment))
    logged = [_line(step, weights) for step in range(1, 901)]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
    bad = [{"id": f"/home/somebody/{text[:40]}", "reason": f"truncated: {text[:40]}"} for text in HOSTILE[:2]]
    (out / "bad_samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bad))
    return out


def _line(step: int, weights: bool) -> dict[str, float]:
    line = {"step": step, "loss": 5.0 / step + 1, "terms/contrastive": 4.0 / step + 1, "learning_rate": 0.001}
    if step % 300 == 0:
        line |= {"validation/mean_r@1": step / 100, "validation/score": step / 100}
    if weights:
        line |= {"selection/weight/P2": step / 900, "selection/weight/L<1>": 1.0}
    return line

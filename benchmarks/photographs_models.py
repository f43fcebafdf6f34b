"""Parameters of the models that docs/results/photographs.md compares, with and without their tables of words.

    uv run --group pretrained python benchmarks/photographs.py models

The models are built as the comparisons build them: on the first fold, whose captions decide which words a student has.
Writes docs/results/photographs_models.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cmapkd.compare import load_comparison
from cmapkd.config import load_config
from cmapkd.models import DualEncoder
from cmapkd.models.parts import word_tables
from cmapkd.provenance import describe_environment
from cmapkd.run import RunConfig
from cmapkd.run.build import build_student, open_training

JSON = Path("docs/results/photographs_models.json")
EXAMPLES = Path("examples")
FOLD = "data.train=webdataset:../shared/data/flickr8k/train-*.tar?part=0.2-1"
ALONE = ("teacher=null", "method=contrastive")  # no teacher is needed to count what a student has
TEACHERS = {"teacher of a fold": "photographs_teacher", "teacher of three towers": "photographs_teacher_three"}
STUDENTS = {
    "student of a fold": "photographs_folds",
    "mobile student of a fold": "photographs_mobile",
    "pretrained student": "photographs_pretrained",
}


def main() -> None:
    configs = {name: config_of(EXAMPLES / f"{recipe}.yaml", (FOLD,)) for name, recipe in TEACHERS.items()}
    for name, recipe in STUDENTS.items():
        comparison = load_comparison(EXAMPLES / f"{recipe}.yaml")
        configs[name] = config_of(EXAMPLES / Path(comparison.base).name, (*comparison.overrides, FOLD))
    told = {
        "counted": "parameters of the models at their start, with the words of the first fold's captions",
        "models": {name: counted(config) for name, config in configs.items()},
        "environment": {key: value for key, value in describe_environment().items() if key != "command"},
    }
    JSON.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    print(JSON)


def config_of(recipe: Path, overrides: tuple[str, ...]) -> RunConfig:
    return load_config(RunConfig, str(recipe), [*overrides, *ALONE])


def counted(config: RunConfig) -> dict[str, Any]:
    model = build_student(config, open_training(config), {})
    assert isinstance(model, DualEncoder)
    total = sum(parameter.numel() for parameter in model.parameters())
    words = sum(table.weight.numel() for table in word_tables(model, model.tokenizer.vocab_size))
    return {"total": total, "text_embedding": words, "without_words": total - words}


if __name__ == "__main__":
    main()

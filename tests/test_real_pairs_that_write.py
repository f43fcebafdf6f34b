"""The recipes of published pairs that write take real steps: real widths, reduced depth, random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cmapkd.config import load_config
from cmapkd.models import build_model, load_model
from cmapkd.models.generative import GenerativeModel
from cmapkd.run import RunConfig, run
from published_vlms import PUBLISHED, save_pair

CHANGES = [
    "data.train=scenes?length=8",
    "data.val=null",
    "data.max_tokens=512",
    "data.workers=0",
    "data.prompts=questions",
    "baseline=none",
    "cache=off",
    "training.epochs=null",
    "training.steps=2",
    "training.batch_size=2",
    "training.micro_batch=1",
    "training.precision=fp32",
    "training.checkpoint_every=null",
    "optim.warmup_steps=1",
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_recipe_of_a_published_pair_takes_steps(kind: str, tmp_path: Path) -> None:
    teacher, student = save_pair(kind, tmp_path)
    names = [f"teacher.name={teacher}", f"student={student}"]
    config = load_config(RunConfig, f"token_kd_{kind}", [*names, *CHANGES])
    assert config.teacher is not None
    assert config.teacher.dtype == "bf16"
    run(config, out=tmp_path / "run")
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["step"] == 2
    assert {"terms/answers", "terms/distillation"} <= steps[-1].keys()
    trained, before = load_model(tmp_path / "run"), build_model(student)
    assert isinstance(trained, GenerativeModel)
    first = dict(before.named_parameters())
    moved = {name for name, parameter in trained.named_parameters() if not parameter.equal(first[name])}
    for part, names in trained.parts.items():
        assert not names or names & moved, f"nothing of {part} has learned"

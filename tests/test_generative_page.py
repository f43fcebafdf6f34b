"""The first section of docs/generative.md, from a JSONL of questions to scores: its files and commands, letter by
letter, with fewer steps."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cmapkd.cli import app
from cmapkd.data.open import open_source

PAGE = (Path(__file__).parents[1] / "docs" / "generative.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("## From your questions to a small model")[2].partition("\n## ")[0]
FEWER = {"steps": 2, "batch_size": 4, "log_every": 1}

pytestmark = pytest.mark.usefixtures("one_thread")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", SECTION, flags=re.DOTALL | re.MULTILINE)


def write_data(folder: Path) -> None:
    """Lines as the page shows one, of other pictures in each file."""
    (shown,) = (json.loads(each) for each in blocks("json"))
    source, images = open_source("scenes?length=48"), folder / "images"
    images.mkdir()
    number = 0
    for name, count in (("train", 32), ("val", 8), ("test", 8)):
        lines = []
        for index in range(number, number + count):
            source[index].image.save(images / f"{index:04}.png")
            for asked in source[index].questions[:3]:
                values = (f"images/{index:04}.png", asked.question, asked.answers[0])
                lines.append(json.dumps(dict(zip(shown, values, strict=True))))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        number += count


def write_recipes(folder: Path) -> None:
    for text in blocks("yaml"):
        name = re.findall(r"^# (\w+\.yaml)$", text, flags=re.MULTILINE)[0]
        recipe: dict[str, Any] = yaml.safe_load(text)
        recipe["training"] |= FEWER
        recipe["optim"] |= {"warmup_steps": 1}
        (folder / name).write_text(yaml.safe_dump(recipe))


def test_every_command_of_the_page_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    write_data(tmp_path)
    write_recipes(tmp_path)
    (commands,) = blocks("bash")
    said = {}
    for line in commands.strip().split("\n"):
        words = shlex.split(line, comments=True)
        assert words[:3] == ["uv", "run", "cmapkd"]
        done = CliRunner().invoke(app, words[3:])
        assert done.exit_code == 0, (line, done.output[-3000:], done.exception)
        said[words[3]] = done.output
    for role in ("runs/teacher", "runs/first", "runs/first/baseline"):
        assert role in said["evaluate"].replace("\n", "")
    (python,) = blocks("python")
    picture = re.findall(r"images/\d+\.png", python)[0]
    assert (tmp_path / picture).is_file()
    exec(python, {})
    from transformers import AutoModelForImageTextToText, AutoProcessor

    AutoModelForImageTextToText.from_pretrained("runs/first/student")
    AutoProcessor.from_pretrained("runs/first/student")

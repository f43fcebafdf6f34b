"""`teacher: student`: a frozen copy of the student's first weights, written out in the saved config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import cmapkd
from cmapkd.config import ConfigError, load_mapping
from cmapkd.data.open import open_source
from cmapkd.models import build_model
from cmapkd.run import RunConfig, build_student, load_teachers, method_of
from test_run import settings, teacher

__all__ = ["teacher"]  # the fixture


def copied(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in settings(Path("unread")).items() if key != "quiet"} | {
        "teacher": "student",
        "method": "hinton",
        **changes,
    }


def test_the_word_stands_for_the_students_own_settings() -> None:
    student = {"name": "tiny:debug", "options": {"embed_dim": 16}, "checkpoint": "first.safetensors", "weights": "ema"}
    config = RunConfig.from_mapping(copied(student=student, baseline="scratch"))
    assert config.teacher == config.student
    assert config.plain()["teacher"] == config.plain()["student"] == {"init": "auto", **student}
    assert config.scratch().teacher is None
    named = RunConfig.from_mapping(copied(teacher={"name": "student"}, student="tiny:scenes-teacher"))
    assert named.teacher is not None
    assert named.teacher.name == "tiny:scenes-teacher"
    assert RunConfig.from_mapping(copied(teacher="./student")).teacher != named.student
    more = {"teacher": "tiny:scenes-teacher", "more_teachers": {"first": "student"}, "method": "mobileclip"}
    several = RunConfig.from_mapping(copied(**more))
    assert several.more_teachers == {"first": several.student}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": {"name": "tiny:debug", "init": "scratch"}}, "begins with random weights"),
        ({"student": {"name": "tiny:debug", "inherit": "tiny:scenes-teacher"}}, "cut from a larger model"),
        ({"teacher": {"name": "student", "checkpoint": "a.safetensors"}}, "leave checkpoint out"),
    ],
)
def test_what_no_copy_can_be_made_of_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_mapping(copied(**changes))


def test_a_student_with_random_weights_has_no_copy() -> None:
    student = {"name": "timm:test_vit", "options": {"text_width": 16, "text_heads": 2, "text_layers": 1}}
    config = RunConfig.from_mapping(copied(student=student))
    with pytest.raises(ConfigError, match="teacher is the student as it begins, and weights of timm:test_vit are rand"):
        build_student(config, open_source("scenes?length=40&size=32"), load_teachers(config))


SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


def test_the_copy_of_a_student_with_fewer_words_keeps_all(tmp_path: Path) -> None:
    (tmp_path / "small.json").write_text(json.dumps(SMALL))
    named = f"open_clip:{tmp_path / 'small.json'}"
    trained = tmp_path / "trained"
    build_model(named).save(trained)
    data = open_source("scenes?length=40&size=32")

    def begun(name: str) -> tuple[Any, Any]:
        config = RunConfig.from_mapping(copied(student={"name": name, "vocabulary": "texts"}))
        assert config.teacher == config.student.model_copy(update={"vocabulary": "whole"})
        teachers = load_teachers(config)
        return build_student(config, data, teachers), teachers["teacher"].model

    student, whole = begun(str(trained))
    assert student.tokenizer.vocab_size < whole.tokenizer.vocab_size
    with pytest.raises(ConfigError, match="teacher is the student as it begins, and weights of open_clip"):
        begun(named)


def test_a_teacher_of_a_wrong_kind_is_no_copy() -> None:
    """What refuses it names what it is: nobody wrote `student`."""
    config = RunConfig.from_mapping(
        copied(teacher="classifier:timm:test_vit", student="classifier:timm:test_vit", method="dho")
    )
    teachers = load_teachers(config)
    student = build_student(config, open_source("scenes?length=40&size=32"), teachers)
    with pytest.raises(ConfigError, match="needs a teacher that embeds pictures and texts, and classifier:timm:test_v"):
        method_of(config, student, teachers)


def test_a_run_begins_where_its_teacher_stays(teacher: Path, tmp_path: Path) -> None:
    values = settings(
        teacher, teacher="student", student=str(teacher), method="hinton", evaluation={"tasks": ["retrieval"]}
    )
    lines = {}
    for cache in ("off", {"mode": "auto", "folder": str(tmp_path / "cache"), "store": "fp32"}):
        out = tmp_path / ("live" if cache == "off" else "cached")
        cmapkd.distill(**values, cache=cache, out=out)
        saved = load_mapping(out / "config.yaml")
        assert saved["teacher"] == saved["student"]
        written = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        lines[out.name] = [line["terms/similarity"] for line in written if "terms/similarity" in line]
    live, cached = lines["live"], lines["cached"]
    assert abs(live[0]) < 1e-6 < live[-1]  # equal before the first step, and the copy stays behind
    assert cached == pytest.approx(live, abs=1e-6)
    again = cmapkd.distill(**values, out=tmp_path / "live", resume=True)  # the word means the same at a resume
    assert again.folder == tmp_path / "live"

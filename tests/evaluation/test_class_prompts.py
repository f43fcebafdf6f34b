"""Texts of a class by itself: files, the built-in world's own, and the class vectors that they make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cmapkd.config import ConfigError
from cmapkd.data.config import StreamConfig
from cmapkd.data.open import open_source, open_streams
from cmapkd.data.scenes import ScenesSource
from cmapkd.data.templates import ClassPrompts, get_class_prompts
from cmapkd.diagnosis import examine
from cmapkd.evaluation.config import EvaluationConfig
from cmapkd.evaluation.run import evaluate
from cmapkd.models import FrozenTeacher, build_model
from cmapkd.models.texts import LearnedClassVectors, class_vectors, embed_texts, frozen_class_vectors
from cmapkd.run import RunConfig
from cmapkd.run.measure import Measured
from helpers import MemorySource, make_model, make_teacher

NAMES, TEMPLATES = ("red cat", "green dog"), ("{}", "a {} near tree")
OWN = (("cat red", "red under tree", "cat"), ("dog",))
CLASSES = ClassPrompts(NAMES, TEMPLATES, OWN)


def test_texts_of_a_class_stand_behind_its_templates() -> None:
    assert CLASSES.of_class[1] == ("green dog", "a green dog near tree", "dog")
    assert CLASSES.texts == CLASSES.of_class[0] + CLASSES.of_class[1]
    assert ClassPrompts(NAMES, (), OWN).texts == OWN[0] + OWN[1]
    with pytest.raises(ConfigError, match="class 'green dog' has no prompt: with"):
        _ = ClassPrompts(NAMES, (), (("cat",), ())).texts
    with pytest.raises(ValueError, match="texts for 1 classes, and 2 names"):
        ClassPrompts(NAMES, TEMPLATES, (("cat",),))


def test_vectors_are_means_over_all_prompts_of_a_class() -> None:
    model = make_model()
    expected = torch.stack(
        [
            F.normalize(embed_texts(model, prompts, batch_size=9, device="cpu").mean(0), dim=0)
            for prompts in CLASSES.of_class
        ]
    )
    found = class_vectors(model, NAMES, TEMPLATES, own=OWN, device="cpu")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(frozen_class_vectors(FrozenTeacher(model), CLASSES), expected)
    torch.testing.assert_close(LearnedClassVectors(CLASSES, model)(model), expected)


def test_drawn_prompts_are_those_of_each_class_at_the_same_places() -> None:
    """Where a class has fewer, its own are counted again."""
    model = make_model()
    learned = LearnedClassVectors(CLASSES, model, at_once=2)
    for seed in range(4):
        drawn = torch.randperm(5, generator=torch.Generator().manual_seed(seed))[:2].tolist()
        found = learned(model, torch.Generator().manual_seed(seed))
        for row, prompts in zip(found, CLASSES.of_class, strict=True):
            texts = [prompts[place % len(prompts)] for place in drawn]
            mean = embed_texts(model, texts, batch_size=9, device="cpu").mean(0)
            torch.testing.assert_close(row, F.normalize(mean, dim=0))


def test_a_teacher_without_a_trained_text_tower_is_refused() -> None:
    teacher = make_teacher()
    teacher.model.random_towers = ("text",)
    with pytest.raises(ConfigError, match="that of test-24 has random weights"):
        frozen_class_vectors(teacher, CLASSES)


def test_the_worlds_descriptions_are_true_or_anothers() -> None:
    source, shuffled = (open_source(f"scenes@val?length=2{more}") for more in ("", "&descriptions=shuffled"))
    assert isinstance(source, ScenesSource)
    assert isinstance(shuffled, ScenesSource)
    texts = dict(zip(source.class_names, source.class_prompts, strict=True))
    assert texts["purple circle"][:4] == ("a purple object", "a violet object", "a circle", "a disc")
    assert texts["orange star"] == ("an orange object", "a star")
    assert sorted(shuffled.class_prompts) == sorted(source.class_prompts)
    assert all(one != other for one, other in zip(source.class_prompts, shuffled.class_prompts, strict=True))
    assert source.fingerprint() == ScenesSource("val", length=2).fingerprint() != shuffled.fingerprint()
    unknown = build_model("tiny:scenes-teacher").tokenizer
    assert all(int(unknown([text]).mask.sum()) <= 8 for text in texts["purple circle"])
    with pytest.raises(ConfigError, match="unknown descriptions 'tru'"):
        open_source("scenes?descriptions=tru")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("[1]", "must be {name: "),
        ('{"red cat": [""], "green dog": []}', "must be {name: "),
        ('{"red cat": "a"', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (
            '{"red cats": ["a"], "green dog": "b"}',
            r"lacks 1 of 2 classes, 'red cat' among them \(did you mean 'red cats'",
        ),
        (None, "^class_prompts: '[^']*' is no file and none of own"),
    ],
)
def test_files_that_do_not_fit_are_refused(written: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "texts.json"
    if written is not None:
        path.write_text(written)
    with pytest.raises(ConfigError, match=message):
        get_class_prompts(str(path), NAMES, None)


def test_what_files_and_sources_say(tmp_path: Path) -> None:
    path = tmp_path / "texts.json"
    path.write_text(json.dumps({"green dog": "dog", "red cat": [*OWN[0]], "other": []}))
    assert get_class_prompts(str(path), NAMES, None) == OWN
    assert get_class_prompts(None, NAMES, None) == ()
    with pytest.raises(ConfigError, match="own asks for the source's texts of its 2 classes, and memory has none"):
        get_class_prompts("own", NAMES, MemorySource())


def test_what_is_read_of_a_source_keeps_its_texts_of_classes(tmp_path: Path) -> None:
    world = "scenes?length=40&size=32"
    source = open_source(world)
    assert source.class_names is not None
    own = get_class_prompts("own", source.class_names, source)
    (tmp_path / "ids.txt").write_text(source[3].id)
    more = {"b": StreamConfig(source=world, share=0.5, labels="hidden")}
    parts = [open_source(f"{world}&{more}") for more in ("shots=1", f"ids={tmp_path}/ids.txt", "labels=hidden")]
    for part in (*parts, open_streams(world, more), open_streams(world, {}, held_out=4)):
        assert get_class_prompts("own", source.class_names, part) == own


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"class_prompts": "nofile.json"}, "class_prompts: 'nofile.json' is no file and none of own"),
        ({"templates": "nofile.txt"}, "templates: 'nofile.txt' is no file"),
        ({"templates": "none"}, "class 'red circle' has no prompt"),
    ],
)
def test_words_that_cannot_be_had_are_told_before_the_first_step(words: dict[str, str], message: str) -> None:
    data = {"train": "scenes?length=8&size=32", "val": "scenes@val?length=4&size=32"}
    values = {"student": "tiny:debug", "method": "contrastive", "data": data, "evaluation": words}
    config = RunConfig.from_mapping({**values, "training": {"steps": 1, "batch_size": 4}})
    with pytest.raises(ConfigError, match=rf"^data\.val cannot be measured by its classes: {message}"):
        Measured.open(config)
    assert message in next(each.detail for each in examine(config) if each.what == "evaluation")
    only = config.model_copy(update={"evaluation": EvaluationConfig(tasks=("retrieval",), **words)})
    Measured.open(only)  # reads no words


def test_an_evaluation_asks_with_them() -> None:
    source, model = open_source("scenes@val?length=20&size=32"), build_model("tiny:scenes-teacher")
    found: dict[Any, float] = {}
    for templates, prompts in (("auto", None), ("auto", "own"), ("none", "own")):
        config = EvaluationConfig(tasks=("calibration",), templates=templates, class_prompts=prompts)
        found[templates, prompts] = evaluate(model, source, config, device="cpu")["calibration"]["nll"]
    assert len(set(found.values())) == 3
    assert "class_prompts" not in EvaluationConfig().model_dump()
    with pytest.raises(ConfigError, match="class 'red circle' has no prompt"):
        evaluate(model, source, EvaluationConfig(tasks=("zero_shot",), templates="none"), device="cpu")

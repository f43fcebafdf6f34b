"""What needs no model is answered before torch is imported; and the light check says what the full one says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_support import run_commands

import cmapkd
from cmapkd.config import ConfigError, apply_overrides, list_recipes, load_mapping, recipe_summary
from cmapkd.run import RunConfig
from cmapkd.settings import check_evaluation, check_recipe, read_index
from cmapkd.settings.index import FILE, Index
from cmapkd.settings.make import make_index
from cmapkd.settings.page import page

ROOT = Path(cmapkd.__file__).parents[2]
QUICK = (
    (["--version"], 0, f"cmapkd {cmapkd.__version__}"),
    (["distill", "demo", "training.stepz=1", "--out", "x"], 2, "training.stepz: unknown key (did you mean 'steps'?)"),
    (["distill", "demo", "method.task_wieght=1", "--out", "x"], 2, "did you mean 'task_weight'?"),
    (["distill", "demo", "method=clip_kdd", "--out", "x"], 2, "unknown method 'clip_kdd' (did you mean 'clip_kd'?)"),
    (["distill", "demo", "data.train=a/train.csv", "--out", "x"], 2, "did you mean 'csv:a/train.csv'?"),
    (
        ["distill", "demo", "--training.steps=5", "--out", "x"],
        2,
        "settings are written without dashes: training.steps=5",
    ),
    (["doctor", "demo", "student.options.text_widht=8"], 2, "did you mean 'text_width'?"),
    (["demo", "optim.learning_rat=1"], 2, "did you mean 'learning_rate'?"),
    (["cache", "build", "demo", "cache.mod=auto"], 2, "did you mean 'mode'?"),
    (["evaluate", "x", "--data", "scenes", "--tasks", "retreival"], 2, "did you mean 'retrieval'?"),
    (["evaluate", "x", "--data", "scenes", "--set", "limt=3"], 2, "did you mean 'limit'?"),
    (["evaluate", "x", "--data", "scenes", "--json", "."], 2, ". is a folder: name a file"),
    (["evaluate", "x", "--data", "photographs"], 2, "there is no kind of data 'photographs'"),
    (["evaluate", "x", "--data", "scenes", "--train", "cvs:a.csv"], 2, "did you mean 'csv'?"),
    (["report", "src/cmapkd/clii"], 2, "there is no src/cmapkd/clii"),
    (["compare", "demo", "training.stepz=1", "--dry-run"], 2, "did you mean 'steps'?"),
    (["compare", "demo", "--arms", "a: method.task_wieght=1", "--dry-run"], 2, "arm 'a' has 1 problem"),
    (["init", "nowhere"], 2, "there is no file or folder 'nowhere'"),
    (["methods"], 0, "clip_kd"),
    (["methods", "clip_kd"], 0, "task_weight = 1.0"),
    (["models"], 0, "timm:...  any timm image tower"),
    (["models", "tiny"], 0, "tiny:scenes-teacher"),
    (["models", "tinny"], 2, "did you mean 'tiny'?"),
    (["settings"], 0, "optim: AdamW"),
    (["settings", "optim"], 0, "learning_rate = 0.001  (number > 0)"),
    (["settings", "ema"], 0, "training: How long"),
    (["settings", "warmup_stepz"], 2, "did you mean 'warmup_steps'?"),
    (["distill", "list"], 0, "clip_kd_scenes "),
)


@pytest.fixture(scope="module")
def ends() -> list[tuple[int, str, list[str]]]:
    return run_commands([arguments for arguments, _, _ in QUICK])


@pytest.mark.parametrize("place", range(len(QUICK)), ids=[" ".join(arguments) for arguments, _, _ in QUICK])
def test_no_heavy_library_is_waited_for(place: int, ends: list[tuple[int, str, list[str]]]) -> None:
    _, expected, message = QUICK[place]
    code, said, heavy = ends[place]
    assert code == expected, said
    assert " ".join(message.split()) in " ".join(said.split())
    assert not heavy


@pytest.mark.parametrize("name", [each for each in list_recipes() if each != "scenes"])
def test_packaged_recipes_pass_and_say_what_they_are_for(name: str) -> None:
    check_recipe(load_mapping(name), where=name)
    assert len(recipe_summary(name)) > 10


def valid() -> list[dict[str, Any]]:
    """Recipes in every way of writing that the classes take."""
    whole: dict[str, Any] = {"student": "tiny:debug", "data": {"train": "scenes"}, "method": "contrastive"}
    whole |= {"training": {"steps": 1}}
    changes: tuple[dict[str, Any], ...] = (
        {},
        {"teacher": {"name": "tiny:debug", "init": "scratch"}, "method": {"name": "clip_kd", "bank": {"size": 8}}},
        {"data": "csv:train.csv"},
        {"data": {"name": "csv:train.csv", "val": "scenes"}},
        {"teacher": "some/folder", "method": "hinton", "cache": "auto"},
        {"teacher": "some/folder", "method": "hinton", "cache": {"name": "auto", "store": "int8"}},
        {"cache": False},
        {"cache": None, "more_teachers": None, "heads": {"vqa": 0.5, "captioning": {"weight": 1}}},
        {"student": {"name": "tiny:debug", "inherit": "tiny:small", "options": {"embed_dim": "16"}}},
        {"student": {"name": "timm:resnet18", "options": {"text_width": 64, "text_heads": 2}}},
        {"method": {"name": "contrastive", "term_weighting": "uncertainty"}},
        {"teacher": "x", "method": {"name": "cmapkd", "weighting": {"name": "gate"}, "bank_size": 64}},
        {"evaluation": {"tasks": "retrieval", "limit": 5}, "seed": "3"},
        {"evaluation": {"tasks": ["retrieval", "zero_shot"]}},
        {"data": {"train": "scenes", "more": None, "held_out": 8, "views": {"crop_scale": [0.5, 1]}}},
        {"data": {"train": "scenes", "more": {"b": {"source": "csv:x.csv", "share": 0.2}}, "held_out": "scenes"}},
        {"training": {"stages": [{"share": 1, "terms": ["a"]}], "steps": 4, "trackers": ["wandb"]}},
        {"optim": {"betas": [0.9, 0.99], "max_gradient_norm": None}, "baseline": "runs/other"},
    )
    return [{**whole, **change} for change in changes]


@pytest.mark.filterwarnings("ignore:settings of cmapkd have moved")
@pytest.mark.parametrize("values", valid(), ids=str)
def test_what_the_classes_take_passes(values: dict[str, Any]) -> None:
    RunConfig.from_mapping(values)
    check_recipe(values, where="recipe")


WRONG = (
    ["optim.learning_rat=1"],
    ["optim.learning_rate=0", "seed=x", "training.batch_size=1"],
    ["training.device=cuda", "training.compile=maybe"],
    ["student=opn_clip:ViT-B-32"],
    ["method=clip_kdd"],
    ["method.task_weight=-1", "method.interactive_scale=log"],
    ["method.term_weighting=unifrm"],
    ["method.bank.sizze=3"],
    ["data.train=null"],
    ["data.views.crop_scale=[1,2,3]"],
    ["data.more={b: {source: scenes, share: 2}}"],
    ["student.inherit={name: x, depth: middle}"],
    ["heads={vqa: {weight: 1, widht: 3}}"],
    ["training.trackers=[mlflow]"],
    ["optim=fast"],
)


@pytest.mark.parametrize("overrides", WRONG, ids=str)
def test_mistakes_in_single_keys_are_worded_alike(overrides: list[str]) -> None:
    values = apply_overrides(load_mapping("demo"), overrides, where="demo")
    with pytest.raises(ConfigError) as full:
        RunConfig.from_mapping(values)
    with pytest.raises(ConfigError) as light:
        check_recipe(values, where="demo")
    assert {*light.value.problems} == {*full.value.problems}


def test_settings_of_an_evaluation() -> None:
    check_evaluation({"tasks": ["vqa"], "vqa": {"steps": 3}, "limit": 4}, where="settings")
    with pytest.raises(ConfigError, match=r"vqa.stepz"):
        check_evaluation({"tasks": "auto", "vqa": {"stepz": 3}}, where="settings")


def test_index_and_page_are_as_the_classes_are() -> None:
    values = make_index()
    stale = "is stale: PYTHONPATH=src python -m cmapkd.settings.make"
    assert json.loads(FILE.read_text(encoding="utf-8")) == json.loads(json.dumps(values)), f"settings.json {stale}"
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == page(Index(values)), f"settings.md {stale}"


def test_options_of_a_family_of_two_kinds_say_who_takes_them() -> None:
    index = read_index()
    about = {setting.key: setting.about for setting in index.settings(index.sections["options.hf"])}
    write = {key for key, words in about.items() if "Only models that write take it." in words}
    assert write == {"max_tokens", "lora", "vocabulary"}
    alone = {key for key, words in about.items() if "Only models that embed take it." in words}
    assert alone == {"context_length", "tokenizer"}
    assert "take it" not in about["revision"]


def test_every_setting_has_a_meaning() -> None:
    index = read_index()
    silent = [
        f"{name}.{setting.key}"
        for name, kind in index.sections.items()
        for setting in index.settings(kind)
        if not (setting.about and setting.kind)
    ]
    assert not silent


def test_recipes_of_the_examples_pass() -> None:
    recipes = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "examples").glob("*.yaml"))]
    whole = [values for values in recipes if "student" in values and "base" not in values]
    for values in whole:
        check_recipe(values, where="example")

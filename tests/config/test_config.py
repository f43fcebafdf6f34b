"""Configs: what they refuse, in which words, and how recipes, bases and overrides come together."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from cmapkd.config import (
    Config,
    ConfigError,
    apply_overrides,
    closest,
    counted,
    in_bytes,
    list_recipes,
    load_config,
    load_mapping,
    merge_mappings,
)
from cmapkd.run import RunConfig, open_training

MINIMAL: dict[str, Any] = {
    "student": "tiny:debug",
    "data": {"train": "scenes"},
    "method": "contrastive",
    "training": {"steps": 1},
}


@pytest.mark.parametrize(
    ("number", "thing", "said"),
    [
        (1, "sample", "1 sample"),
        (0, "sample", "0 samples"),
        (1200, "picture", "1,200 pictures"),
        (2, "class", "2 classes"),
        (3, "cache entry", "3 cache entries"),
        (2, "key", "2 keys"),
        (2, "batch", "2 batches"),
    ],
)
def test_numbers_are_said_with_what_they_count(number: int, thing: str, said: str) -> None:
    assert counted(number, thing) == said
    assert in_bytes(1) == "1 byte"


def problems(values: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_mapping(values)
    assert all(line in str(caught.value) for line in caught.value.problems)
    return caught.value.problems


def test_minimal_config_has_every_default_written_out() -> None:
    config = RunConfig.from_mapping(MINIMAL)
    assert config.student.name == "tiny:debug"
    assert config.plain()["optim"]["learning_rate"] == 1e-3
    assert RunConfig.from_mapping(config.plain()) == config


def leaves(values: dict[str, Any], above: str = "") -> set[str]:
    """Dotted keys of all settings."""
    found: set[str] = set()
    for key, value in values.items():
        found |= leaves(value, f"{above}{key}.") if isinstance(value, dict) and value else {f"{above}{key}"}
    return found


LATER = {
    "cache.top_k": 4,
    "cache.max_answer_tokens": 5,
    "evaluation.writing.answer_tokens": 3,
    "evaluation.timeout": 7.0,
    "data.timeout": 7.0,
    "training.local_loss": True,
}


def test_a_run_of_two_towers_has_the_plain_form_of_before_there_were_models_that_write() -> None:
    config = RunConfig.from_mapping(MINIMAL | {"teacher": "tiny:debug", "method": "clip_kd", "cache": "auto"})
    kept = leaves(config.plain())
    assert not [key for key in kept if "writing" in key or "prompts" in key or "token" in key or "top_k" in key]
    assert {"cache.folder", "evaluation.templates", "data.workers", "training.batch_size"} <= kept
    assert "cache" not in RunConfig.from_mapping(MINIMAL).plain()
    writer = RunConfig.from_mapping(MINIMAL | {"student": "tiny_vlm:small", "method": "sft"})
    assert {"data.prompts.share", "data.max_tokens"} <= leaves(writer.plain())


@pytest.mark.parametrize("key", LATER)
def test_a_setting_that_came_later_is_written_where_it_is_set(key: str) -> None:
    values = MINIMAL | {"teacher": "tiny:debug", "method": "clip_kd", "cache": "auto"}
    config = RunConfig.from_mapping(apply_overrides(values, [f"{key}={LATER[key]}".lower()], where="test"))
    assert key in leaves(config.plain())
    assert RunConfig.from_mapping(config.plain()) == config


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("optim.learning_rat", "learning_rate"),
        ("data.views.crop_scal", "crop_scale"),
        ("student.optons", "options"),
        ("evaluation.template", "templates"),
        ("traning", "training"),
    ],
)
def test_unknown_key_is_named_in_full_with_the_nearest_known_one(path: str, nearest: str) -> None:
    (line,) = problems(apply_overrides(MINIMAL, [f"{path}=1"], where="test"))
    assert line.startswith(f"{path}: unknown key (did you mean {nearest!r}?). Known here: ")


def test_unknown_key_of_a_method_is_named_in_full() -> None:
    values = MINIMAL | {"method": {"name": "clip_kd", "featur_weight": 1}, "teacher": "tiny:debug"}
    (line,) = problems(values)
    assert line.startswith("method.featur_weight: unknown key (did you mean 'feature_weight'?)")


def test_every_problem_is_listed_at_once() -> None:
    lines = problems(
        {
            "student": {"name": "tiny:debug", "int": "scratch"},
            "data": {"train": "scenes", "workers": -1},
            "method": {"name": "hinton", "temperature": 0},
            "training": {"steps": 1, "batch_size": "many"},
            "optim": {"eps": float("nan")},
        }
    )
    paths = [line.partition(":")[0] for line in lines]
    assert paths == ["student.int", "data.workers", "method.temperature", "training.batch_size", "optim.eps"]
    assert "(got 'many')" in lines[3]


def test_missing_section_is_said_to_be_missing() -> None:
    assert problems({key: value for key, value in MINIMAL.items() if key != "data"}) == (
        "data: required, but not given.",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "clip_kdd"}, r"unknown method 'clip_kdd' \(did you mean 'clip_kd'\?\); known: contrastive"),
        ({"method": "hinton"}, "method hinton distils from a teacher: add teacher"),
        ({"baseline": "scratch"}, "it is the scratch baseline itself"),
        ({"training": {}}, "give either steps or epochs, not neither"),
        ({"training": {"steps": 1, "epochs": 1}}, r"give either steps or epochs, not both: add training\.epochs=null"),
        ({"training": {"steps": 1, "student": "best"}}, "best needs evaluate_every"),
        ({"training": {"steps": 1, "evaluate_every": 1}}, r"nothing to validate on: add data\.val"),
        ({"student": "tini:debug"}, r"unknown model family 'tini' .*did you mean 'tiny'"),
        ({"data": {"train": "scenes", "views": {"crop_scale": [0.9, 0.1]}}}, "crop_scale must satisfy"),
        ({"training": "long"}, "training: must be a section of keys .got 'long'."),
        (["no", "mapping"], "config has 1 problem"),
    ],
)
def test_what_does_not_go_together_is_refused(change: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_mapping(MINIMAL | change if isinstance(change, dict) else change)


def described(config: type[Config]) -> None:
    for name, field in config.model_fields.items():
        assert field.description, f"{config.__name__}.{name} has no description"
        kinds = (field.annotation, *get_args(field.annotation))
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, Config):
                described(kind)


def test_every_setting_is_described() -> None:
    described(RunConfig)


def test_configs_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig.from_mapping(MINIMAL).seed = 1


def test_whole_pictures_for_scenes_and_crops_for_others() -> None:
    def views(source: str) -> Any:
        return RunConfig.from_mapping(MINIMAL | {"data": {"train": source}}).data.views

    assert views("scenes?length=5").whole
    assert not views("folder:pictures").whole


@pytest.mark.parametrize("name", list_recipes())
def test_packaged_recipes_are_complete_or_a_base(name: str) -> None:
    if name == "scenes":  # what the others share
        with pytest.raises(ConfigError, match="student: required"):
            load_config(RunConfig, name)
    else:
        assert load_config(RunConfig, name).training.batch_size > 1


def test_what_packaged_recipes_learn_from_opens() -> None:
    recipes = {name: load_config(RunConfig, name) for name in list_recipes() if name.endswith("_scenes")}
    different = {
        (config.data.train, str(config.data.more), str(config.data.prompts)): name for name, config in recipes.items()
    }
    assert len(different) > 5
    for name in different.values():
        assert len(open_training(recipes[name])) > 0, name


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_bases_and_overrides_are_merged_in_order(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "method: clip_kd\noptim: {learning_rate: 1, eps: 0.5}\nlist: [1, 2]\n")
    write(tmp_path / "b.yaml", "base: a.yaml\nmethod: {task_weight: 2}\noptim: {learning_rate: 2}\n")
    recipe = write(tmp_path / "c.yaml", "base: b.yaml\nlist: [3]\n")
    assert load_mapping(recipe, ["optim.eps=0.1", "method.task_weight=3", "list=[4,5]", "note=a=b"]) == {
        "method": {"name": "clip_kd", "task_weight": 3},
        "optim": {"learning_rate": 2, "eps": 0.1},
        "list": [4, 5],
        "note": "a=b",
    }


def test_packaged_base_of_a_file(tmp_path: Path) -> None:
    recipe = write(tmp_path / "mine.yaml", "base: hinton_scenes\nseed: 4\n")
    config = load_config(RunConfig, recipe, ["method.temperature=2", "student.options.embed_dim=32"])
    assert (config.seed, config.method.name, config.student.name) == (4, "hinton", "tiny:small")
    assert config.method.model_dump()["temperature"] == 2
    assert config.student.options == {"embed_dim": 32}


def test_a_name_replaces_a_section_and_settings_extend_a_name() -> None:
    assert merge_mappings({"method": {"name": "hinton", "temperature": 2}}, {"method": "clip_kd"}) == {
        "method": "clip_kd"
    }
    assert merge_mappings({"teacher": "x"}, {"teacher": {"init": "scratch"}}) == {
        "teacher": {"name": "x", "init": "scratch"}
    }
    assert merge_mappings({"teacher": "x"}, {"teacher": {"name": "y"}}) == {"teacher": {"name": "y"}}
    assert merge_mappings({"teacher": "x"}, {"teacher": None}) == {"teacher": None}


def test_merging_leaves_its_arguments_alone() -> None:
    lower = {"optim": {"eps": 1}}
    merge_mappings(lower, {"optim": {"eps": 2}})
    assert lower == {"optim": {"eps": 1}}


def test_circle_of_bases_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    write(tmp_path / "a.yaml", "base: x/../b.yaml\n")
    recipe = write(tmp_path / "b.yaml", "base: x/../a.yaml\n")
    with pytest.raises(ConfigError, match=r"circle: .*b\.yaml -> .*a\.yaml -> .*b\.yaml"):
        load_mapping(recipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: ${oc.env:HOME}", "plain data, write the value out"),
        ("seed: [1", "not readable YAML"),
        ("seed: 1\nteacher tiny\nstudent: x\n", r"r\.yaml is not readable YAML: line 2: .*, seen in line 3"),
        ("- a\n- b\n", "must be a mapping"),
        ("0", "must be a mapping"),
        ("true", "must be a mapping"),
        ("base: [a, b]", "base must be one recipe's name or file"),
        ("base: hinton_scene", "no recipe 'hinton_scene' \\(did you mean 'hinton_scenes'\\?\\)"),
    ],
)
def test_unusable_recipes(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_mapping(write(tmp_path / "r.yaml", text))


def test_a_folder_is_no_recipe_but_init_makes_one_of_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a folder, and a recipe is a YAML file.*cmapkd init .* --out"):
        load_mapping(tmp_path)


def test_recipe_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"seed: \xff\xfe")
    with pytest.raises(ConfigError, match="not readable YAML"):
        load_mapping(tmp_path / "r.yaml")


@pytest.mark.parametrize("override", ["seed", "=3", "seed=${oc.env:HOME}", "optim.betas=[1"])
def test_unusable_overrides(override: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        load_mapping("demo", [override])


def test_closest_is_silent_about_far_names() -> None:
    assert closest("hintom", ["hinton", "clip_kd"]) == " (did you mean 'hinton'?)"
    assert closest("zzz", ["hinton"]) == ""

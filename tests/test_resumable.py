"""Which settings may change at a resume: every setting of a run in one table, and who reads the marks."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cmapkd.config import Config, ConfigError, load_config, resumable_keys
from cmapkd.config.resumable import declared, fixed_differences, is_resumable
from cmapkd.methods import METHODS
from cmapkd.run import RunConfig
from cmapkd.run import measure as measuring
from cmapkd.run.folder import changed_settings
from cmapkd.training import TrainConfig
from cmapkd.training.memory import OutOfMemory, memory_advice

DOCS = Path(__file__).parents[1] / "docs"
MAY_CHANGE = """
data: workers memory prefetch_mib timeout on_bad_sample max_bad_share
training: micro_batch local_loss sharding shard_teacher compile activation_checkpointing device
training: log_every checkpoint_every checkpoint_form keep_checkpoints trackers
evaluation: batch_size workers timeout
cache: mode folder check max_gib batch_size shard_mib
"""
REFUSED = """
: baseline seed
data: train val test teacher_view mix_synthetic held_out unpaired_weight max_tokens order lanes window
training: steps epochs batch_size precision ema mean_every evaluate_every student train_parts
evaluation: tasks templates class_prompts class_names limit shared_captions negatives settings
cache: store kind top_k max_answer_tokens
"""
REFUSED_WHOLE = (  # sections in which every setting is refused, and a new one is without more ado
    "teacher.",
    "more_teachers.",
    "student.",
    "data.views.",
    "data.more.",
    "data.more_views.",
    "data.prompts.",
    "evaluation.writing.",
    "evaluation.drafting.",
    "method.",
    "heads.",
    "training.stages.",
    "optim.",
)


def keys(table: str) -> set[str]:
    lines = [line.partition(":") for line in table.strip().split("\n")]
    return {f"{section}.{name}".lstrip(".") for section, _, names in lines for name in names.split()}


def test_every_setting_of_a_run_is_in_the_table_and_marked_as_it_says() -> None:
    table = dict.fromkeys(keys(MAY_CHANGE), True) | dict.fromkeys(keys(REFUSED), False)
    found = {key: is_resumable(field) for key, field in declared(RunConfig)}
    whole = {key for key in found if key.startswith(REFUSED_WHOLE)}
    new = found.keys() - table.keys() - whole
    assert not new, f"say in this table whether {sorted(new)} may change at a resume, and mark the fields accordingly"
    assert not table.keys() - found.keys()
    assert found == table | dict.fromkeys(whole, False)
    assert {name.split(".")[0] for name in found} == set(RunConfig.model_fields)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_of_a_method_may_change(method: str) -> None:
    assert not resumable_keys(METHODS[method].Config)


def test_the_documentation_lists_what_may_change() -> None:
    text = (DOCS / "reliability.md").read_text(encoding="utf-8")
    section = text.partition("### What may change at a resume")[2].partition("\n### ")[0]
    assert re.findall(r"^\| `([\w.]+)` \|", section, re.MULTILINE) == list(resumable_keys(RunConfig))


BEFORE: dict[str, Any] = {
    "teacher": "tiny:base",
    "student": "tiny:small",
    "data": {"train": "scenes", "val": "scenes@val"},
    "method": {"name": "clip_kd"},
    "training": {"steps": 3},
    "cache": "auto",
}
OTHER = {  # another value of every setting that may change
    "data": {
        "workers": 3,
        "memory": 1,
        "prefetch_mib": 9,
        "timeout": 5.0,
        "on_bad_sample": "error",
        "max_bad_share": 0.5,
    },
    "training": {
        "micro_batch": 7,
        "local_loss": True,
        "sharding": "fsdp2",
        "shard_teacher": True,
        "activation_checkpointing": True,
        "device": "cpu",
        "log_every": 3,
        "checkpoint_every": 5,
        "checkpoint_form": "shares",
        "keep_checkpoints": 9,
        "trackers": ["tensorboard"],
    },
    "evaluation": {"batch_size": 2, "workers": 1, "timeout": 1.0},
    "cache": {
        "mode": "require",
        "folder": "elsewhere",
        "check": "sizes",
        "max_gib": 3.0,
        "batch_size": 2,
        "shard_mib": 1.0,
    },
}


def merged(values: dict[str, Any], more: dict[str, Any]) -> RunConfig:
    both = {
        key: {**values.get(key, {}), **more.get(key, {})} if isinstance(more.get(key), dict) else values[key]
        for key in values | more
        if key != "cache"
    }
    return RunConfig.from_mapping(both | {"cache": more.get("cache", values.get("cache", "off"))})


def test_what_may_change_is_taken_at_a_resume() -> None:
    before = RunConfig.from_mapping(BEFORE).plain()
    after = merged(BEFORE, OTHER)
    changed = {key for key, _ in declared(RunConfig) if _at(before, key) != _at(after.plain(), key)}
    assert changed == keys(MAY_CHANGE) - {"training.compile"}  # which does not go with shares
    assert changed_settings(before, after) == {}
    assert changed_settings(before, merged(BEFORE, {"training": {"steps": 3, "compile": True}})) == {}


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"training": {"steps": 4}}, "training.steps"),
        ({"training": {"steps": 3, "evaluate_every": 1}}, "training.evaluate_every"),
        ({"training": {"steps": 3, "precision": "bf16"}}, "training.precision"),
        ({"method": {"name": "clip_kd", "task_weight": 0.5}}, "method.task_weight"),
        (
            {"data": {"train": "scenes", "views": {"flip": 0.5, "crop_scale": [1.0, 1.0], "num_views": 4}}},
            "data.views.flip",
        ),
        ({"cache": {"mode": "auto", "store": "int8"}}, "cache.store"),
        ({"evaluation": {"limit": 5}}, "evaluation.limit"),
        ({"optim": {"eps": 1e-3}}, "optim.eps"),
    ],
)
def test_what_may_not_change_is_refused_by_its_name(more: dict[str, Any], key: str) -> None:
    assert [*changed_settings(RunConfig.from_mapping(BEFORE).plain(), merged(BEFORE, more))] == [key]


def test_a_cache_is_not_switched_on_at_a_resume() -> None:
    before = {**BEFORE, "cache": "off"}
    assert "cache" in changed_settings(RunConfig.from_mapping(before).plain(), RunConfig.from_mapping(BEFORE))


def test_a_setting_that_is_newer_than_the_run_has_its_default() -> None:
    config = RunConfig.from_mapping(BEFORE)
    before = config.plain()
    del before["training"]["ema"], before["data"]["max_bad_share"], before["optim"]["betas"]
    assert changed_settings(before, config) == {}
    assert [*changed_settings({**before, "unknown": 1}, config)]  # written by another version: compared as it is


def test_a_damaged_config_is_another() -> None:
    assert changed_settings([1, 2], RunConfig.from_mapping(BEFORE))
    assert fixed_differences(Config(), {"a": 1}, {"a": 2}) == {"a": "was 1, now 2"}


def test_advice_after_memory_ran_out_names_resume_for_what_may_change() -> None:
    advice = memory_advice(TrainConfig(steps=1, batch_size=64), on_device="CPU", live_teacher=True, workers=2)
    kept, _, anew = advice.partition("in a new folder:")
    assert "when you resume the run" in kept
    for key in ("training.micro_batch=16", "data.workers", "data.memory"):
        assert key in kept
        assert key.partition("=")[0] in keys(MAY_CHANGE)
    for key in ("cache=auto", "training.precision=bf16", "training.batch_size"):
        assert key in anew
        assert key.partition("=")[0] not in keys(MAY_CHANGE)


def test_every_key_of_the_advice_is_a_setting() -> None:
    advice = memory_advice(TrainConfig(steps=1), on_device="CPU", live_teacher=True, workers=2)
    named = set(re.findall(r"\b(?:training|data)\.\w+", advice))
    assert named <= {key for key, _ in declared(RunConfig)}
    with pytest.raises(ConfigError, match=r"training\.nothing"):
        RunConfig.from_mapping({**BEFORE, "training": {"steps": 1, "nothing": 1}})


@pytest.mark.parametrize(
    ("recipe", "key"), [("clip_kd_scenes", "evaluation.batch_size"), ("sft_scenes", "evaluation.writing.batch_size")]
)
def test_memory_that_ran_out_in_scoring_is_freed_by_settings_that_the_model_reads(
    monkeypatch: pytest.MonkeyPatch, recipe: str, key: str
) -> None:
    def out_of_memory(*_args: object, **_settings: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measuring, "evaluate", out_of_memory)
    config = load_config(RunConfig, recipe)
    named: Any = SimpleNamespace(name="scored", to=lambda _device: None)
    share: Any = SimpleNamespace(leads=True)
    with pytest.raises(OutOfMemory, match=rf"{key}=\d+ \(now \d+\)") as failed:
        measuring.scores_of(named, named, config, device=torch.device("cpu"), share=share)
    assert ("resume the run" in str(failed.value)) == (key in keys(MAY_CHANGE))

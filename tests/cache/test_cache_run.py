"""A whole run with `cache: auto`, the command, and what the doctor says of it."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cache_support import losses

import cmapkd
from cmapkd.cache import CacheError, describe
from cmapkd.cache.folder import CacheFolder
from cmapkd.cache.writer import _RowMaker
from cmapkd.cli import main
from cmapkd.compare import ComparisonConfig, compare
from cmapkd.config import ConfigError
from cmapkd.data.open import open_source
from cmapkd.diagnosis import diagnose
from cmapkd.models import build_model
from cmapkd.run import RunConfig, vocabulary_captions
from cmapkd.training import Trainer

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "model"
    torch.manual_seed(1)
    build_model("tiny:debug", captions=vocabulary_captions(open_source("scenes?length=50"))).save(folder)
    return folder


def settings(teacher: Path, **changes: Any) -> dict[str, Any]:
    values = {
        "teacher": str(teacher),
        "student": {"name": "tiny:debug", "options": {"embed_dim": 16}},
        "data": {"train": "scenes?length=40&size=32"},
        "method": "clip_kd",
        "training": {"steps": 7, "batch_size": 16, "log_every": 1, "device": "cpu"},
        "seed": 4,
    }
    return values | changes


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "cmapkd" / "teachers"


def test_while_a_cached_run_trains_its_teacher_is_gone(
    teacher: Path, caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[weakref.ref[Any]] = []
    alive: list[str] = []

    def noting(*arguments: Any, **options: Any) -> Any:
        model = build_model(*arguments, **options)
        built.append(weakref.ref(model))
        return model

    def run(self: Trainer, **options: Any) -> Any:
        gc.collect()
        alive.extend(model.name for reference in built if (model := reference()) is not None)
        return trained(self, **options)

    trained = Trainer.run
    for place in ("cmapkd.run.build.build_model", "cmapkd.models.load.build_model"):  # student, teacher
        monkeypatch.setattr(place, noting)
    monkeypatch.setattr(Trainer, "run", run)
    cmapkd.distill(**settings(teacher, cache="auto"), out=tmp_path / "run", quiet=True)
    assert alive == ["tiny:debug"]  # the student alone


def test_auto_builds_once_and_gives_the_live_run(teacher: Path, caches: Path, tmp_path: Path, capsys: Any) -> None:
    cmapkd.distill(**settings(teacher), out=tmp_path / "live", quiet=True)  # 4 epochs: as many as views by default
    cached = cmapkd.distill(
        **settings(teacher, cache={"store": "fp32", "shard_mib": 0.01}, baseline="scratch"), out=tmp_path / "a"
    )
    for mine, theirs in zip(losses(tmp_path / "a"), losses(tmp_path / "live"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6, abs=1e-6)
    shown = capsys.readouterr().out
    assert "cache: the teacher answers from" in shown
    assert "rows/s" in shown
    (folder,) = caches.iterdir()
    found = describe(CacheFolder.open(folder))
    assert (found["rows"], found["rows_done"], found["shards_missing"]) == (found["rows"], found["rows"], 0)
    stored = yaml.safe_load((cached.folder / "config.yaml").read_text())
    assert stored["cache"]["mode"] == "auto"
    assert stored["data"]["views"]["num_views"] == 4
    of_baseline = yaml.safe_load((cached.folder / "baseline" / "config.yaml").read_text())
    assert "cache" not in of_baseline
    assert of_baseline["data"]["views"]["num_views"] == 4

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = settings(teacher, cache={"mode": "require", "store": "fp32"}, method="hinton")
    cmapkd.distill(**again, out=tmp_path / "b", quiet=True)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with pytest.raises(CacheError, match=r"there is no cache in .*cache: auto"):
        cmapkd.distill(**settings(teacher, cache="require"), out=tmp_path / "c", quiet=True)


def test_endless_data_is_covered_as_far_as_it_is_read(teacher: Path, caches: Path, tmp_path: Path) -> None:
    endless = settings(teacher, cache="auto", data={"train": "scenes?size=32"})
    endless["training"]["steps"] = 2
    endless["student"] = str(teacher)  # has its vocabulary already
    cmapkd.distill(**endless, out=tmp_path / "a", quiet=True)
    (folder,) = caches.iterdir()
    found = describe(CacheFolder.open(folder))
    assert (found["rows"], found["samples"]) == (32, 10_000_000)
    endless["cache"] = {"mode": "auto", "max_gib": 1e-9, "store": "int8"}
    with pytest.raises(CacheError, match=r"scenes\?length=50000"):
        cmapkd.distill(**endless, out=tmp_path / "b", quiet=True)


def test_settings_of_the_cache(teacher: Path) -> None:
    def config(cache: Any, **changes: Any) -> RunConfig:
        return RunConfig.from_mapping(settings(teacher, cache=cache, **changes))

    for off in ("off", False, None, {"mode": "off"}, {"name": "off", "store": "int8"}):
        assert config(off).cache is None
        assert "cache" not in config(off).plain()
        assert config(off).data.views == config(None).data.views
    named = config({"name": "require", "store": "int8"}).cache
    assert named is not None
    assert (named.mode, named.store) == ("require", "int8")
    assert config("auto").cache == config(True).cache
    assert RunConfig.from_mapping(config("auto").plain()) == config("auto")
    chosen = {"train": "scenes?length=40", "views": {"num_views": 1}}
    assert config("auto", data=chosen).data.views == RunConfig.from_mapping(settings(teacher, data=chosen)).data.views
    with pytest.raises(ConfigError, match="auto"):
        config("always")
    with pytest.raises(ConfigError, match="did you mean 'store'"):
        config({"stor": "int8"})


def test_the_doctor_predicts_size_and_when_it_pays(teacher: Path, caches: Path) -> None:
    for cache in (None, "auto"):
        findings = {each.what: each for each in diagnose(RunConfig.from_mapping(settings(teacher, cache=cache)))}
        assert "rows of 136 bytes, global in fp16" in findings["cache"].detail
        assert "it pays from" in findings["cache"].detail or "does not pay" in findings["cache"].detail
        assert findings["steps"].level == "ok"
    assert not caches.exists()


def test_commands(teacher: Path, caches: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump(settings(teacher)))

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["cmapkd", "cache", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out + printed.err

    folder = str(tmp_path / "c")
    one = ("build", str(recipe), f"cache.folder={folder}", "cache.shard_mib=0.004", "--all")
    assert call(*one, "--rank", "0", "--world", "2")[0] == 0
    code, text = call("info", folder)
    assert code == 0
    assert "shards missing" in text
    assert call("verify", folder)[0] == 1
    code, text = call(*one)
    assert (code, "built" in text) == (0, True)
    code, text = call("verify", folder)
    assert (code, "are as they were written" in text) == (0, True)
    found = json.loads(call("info", folder, "--json")[1])
    assert (found["rows_done"], found["shards_missing"], found["bytes_per_row"]) == (160, 0, 136)
    assert found["fidelity"]["cosine_min"]["image"] > 0.99999
    code, text = call("build", str(recipe), "method=contrastive")
    assert (code, "asks no teacher" in text) == (2, True)
    assert call("build", str(recipe), "--rank", "2", "--world", "2")[0] == 2
    assert "holds no cache.json" in call("info", str(tmp_path))[1]


def test_several_students_learn_from_one_pass_of_the_teacher(
    teacher: Path, caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row of docs/methods.md on MetaCLIP 2: a comparison's students read what the first of them had stored."""
    row = next(line for line in (DOCS / "methods.md").read_text("utf-8").splitlines() if "of one teacher pass" in line)
    assert "with an axis of students and `cache: auto`" in row
    views = {"crop_scale": [1.0, 1.0], "num_views": 1}
    data = {"train": "scenes?length=40&size=32", "views": views}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings(teacher, cache="auto", data=data, baseline="none")))
    answered: list[str] = []
    answer = _RowMaker.__call__

    def counted(self: _RowMaker, chunk: Any, samples: Any, fidelity: Any) -> Any:
        answered.extend(chunk.ids)
        return answer(self, chunk, samples, fidelity)

    monkeypatch.setattr(_RowMaker, "__call__", counted)
    comparison = ComparisonConfig.from_mapping(
        {"base": str(recipe), "axes": {"student.options.embed_dim": [8, 16, 24]}, "seeds": [0]}
    )
    found = compare(comparison, out=tmp_path / "out")
    assert [outcome.status for outcome in found.outcomes.values()] == ["finished"] * 3
    assert len(answered) == len({*answered}) == 40
    assert len([*caches.iterdir()]) == 1

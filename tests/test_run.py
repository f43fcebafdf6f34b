"""A run from one call to its evidence: folder, metrics, config, baseline, and what is refused before it starts."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import cmapkd
from cmapkd.config import ConfigError, load_config
from cmapkd.data.open import open_source
from cmapkd.data.plans import PlanSampler
from cmapkd.data.streams import streams_of
from cmapkd.data.types import BadSampleError
from cmapkd.evaluation.run import evaluate
from cmapkd.methods import StageConfig
from cmapkd.models import build_model, load_model
from cmapkd.provenance import git_commit
from cmapkd.results import RunResult, gap_closed
from cmapkd.run import (
    RunConfig,
    build_student,
    load_teachers,
    method_of,
    open_training,
    plan_cache,
    vocabulary_captions,
)
from cmapkd.run.measure import measure
from cmapkd.training import Interrupted, TrainConfig
from cmapkd.training.memory import OutOfMemory
from helpers import MemorySource, make_model, random_batch

VAL = "scenes@val?length=40&size=32"


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained model on disk."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    captions = vocabulary_captions(open_source("scenes?length=50"))
    torch.manual_seed(1)
    build_model("tiny:debug", captions=captions).save(folder)
    return folder


def settings(taught_by: Path, **changes: Any) -> dict[str, Any]:
    values = {
        "teacher": str(taught_by),
        "student": {"name": "tiny:debug", "options": {"embed_dim": 16}},
        "data": {"train": "scenes?length=200&size=32", "val": VAL},
        "method": {"name": "clip_kd", "task_weight": 0.5},
        "training": {"steps": 3, "batch_size": 16, "log_every": 1, "device": "cpu"},
        "evaluation": {"templates": "plain"},
        "quiet": True,
    }
    return values | changes


@pytest.fixture(scope="session")
def finished(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    out = tmp_path_factory.mktemp("runs") / "a"
    return cmapkd.distill(**settings(teacher, baseline="scratch", seed=4), out=out)


def test_metrics_have_the_three_models_side_by_side(finished: RunResult) -> None:
    stored = json.loads((finished.folder / "metrics.json").read_text())
    assert stored == finished.metrics == RunResult.read(finished.folder).metrics
    for role in ("teacher", "student", "baseline"):
        scores = stored[role]
        assert set(scores) >= {"retrieval", "zero_shot", "params"}
        assert set(scores["retrieval"]) >= {"i2t", "t2i", "mean_r@1"}
        for direction in ("i2t", "t2i"):
            recalls = [scores["retrieval"][direction][f"r@{k}"] for k in (1, 5, 10)]
            assert recalls == sorted(recalls)
            assert recalls[0] >= 0
            assert recalls[2] <= 100
        mean = (scores["retrieval"]["i2t"]["r@1"] + scores["retrieval"]["t2i"]["r@1"]) / 2
        assert scores["retrieval"]["mean_r@1"] == pytest.approx(mean)
        assert 0 <= scores["zero_shot"]["top1"] <= scores["zero_shot"]["top5"] <= 100
    assert stored["student"]["params"] == stored["baseline"]["params"] < stored["teacher"]["params"]
    assert stored["gap_closed"] == gap_closed(stored["teacher"], stored["student"], stored["baseline"])
    assert (stored["method"], stored["seed"], stored["steps"], stored["batch_size"]) == ("clip_kd", 4, 3, 16)
    assert stored["evaluated_on"] == "scenes/standard/val"
    assert stored["bad_samples"]["num_good"] == 48
    assert stored["bad_samples"]["num_bad"] == 0
    assert stored["best_step"] is None
    assert stored["train_seconds"] >= 0


def test_table_shows_the_three_models(finished: RunResult) -> None:
    from rich.console import Console

    console = Console(width=160, record=True, quiet=False, file=(finished.folder / "table.txt").open("w"))
    console.print(finished.table())
    console.file.close()
    text = (finished.folder / "table.txt").read_text()
    (finished.folder / "table.txt").unlink()
    for part in ("teacher", finished.metrics["baseline_name"], "clip_kd", "R@1", "zero-shot", "scenes/standard/val"):
        assert part in text


def test_stored_config_is_a_recipe_for_the_same_run(finished: RunResult) -> None:
    config = load_config(RunConfig, finished.folder / "config.yaml")
    values = yaml.safe_load((finished.folder / "config.yaml").read_text())
    assert config.plain() == values
    assert values["method"]["feature_weight"] == pytest.approx(2000 / 512)  # every default is written out
    assert values["method"]["task_weight"] == 0.5
    assert values["data"]["views"]["crop_scale"] == [1.0, 1.0]
    assert (config.seed, config.baseline) == (4, "scratch")


def test_environment_names_versions_hardware_and_commit(finished: RunResult) -> None:
    stored = json.loads((finished.folder / "environment.json").read_text())
    assert stored["seed"] == 4
    assert stored["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert stored["packages"]["cmapkd"] == cmapkd.__version__
    assert set(stored) >= {"python", "platform", "cpu_count", "gpus", "git_commit", "command", "torch_threads"}


def test_student_is_read_back_with_equal_outputs(finished: RunResult) -> None:
    student = cmapkd.load(finished.folder)
    assert not student.training
    assert student.embed_dim == 16
    scores = evaluate(
        student, open_source(VAL), load_config(RunConfig, finished.folder / "config.yaml").evaluation, device="cpu"
    )
    assert scores == finished.metrics["student"]
    again = cmapkd.load(finished.folder / "student")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in student.state_dict().items())


def test_the_students_card_says_how_to_use_it(
    finished: RunResult, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (finished.folder / "student" / "README.md").read_text(encoding="utf-8")
    scores = finished.metrics["student"]
    assert f"| this student | {scores['retrieval']['mean_r@1']:.1f} | {scores['zero_shot']['top1']:.1f} |" in card
    assert "| scratch |" in card
    assert "Recall is of 40 images, 200 captions" in card
    assert "scenes" not in card  # where data and models lie is nobody's business
    assert str(teacher.parent) not in card
    assert f"from the teacher {teacher.name}: 3 steps of 16 pairs, seed 4." in " ".join(card.split())
    monkeypatch.chdir(finished.folder)
    for number, name in enumerate(("a.jpg", "b.jpg")):
        open_source(VAL)[number].image.save(name)
    names: dict[str, Any] = {}
    exec(card.split("```python")[1].split("```")[0], names)  # the card's own example
    for name in ("a.jpg", "b.jpg"):
        Path(name).unlink()
    assert names["found"].similarity.shape == (2, 2)


def test_baseline_is_the_same_student_trained_alone(finished: RunResult) -> None:
    folder = finished.folder / "baseline"
    config = load_config(RunConfig, folder / "config.yaml")
    whole = load_config(RunConfig, finished.folder / "config.yaml")
    assert config.method.name == "contrastive"
    assert config.teacher is None
    assert config.baseline == "none"
    for same in ("student", "data", "training", "optim", "seed"):
        assert getattr(config, same) == getattr(whole, same)
    evaluated = evaluate(load_model(folder), open_source(VAL), config.evaluation, device="cpu")
    assert evaluated == finished.metrics["baseline"]
    weights = [load_model(folder).state_dict(), cmapkd.load(finished.folder).state_dict()]
    assert weights[0].keys() == weights[1].keys()
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_run_folder_holds_no_temporary_files(finished: RunResult) -> None:
    names = {path.name for path in finished.folder.iterdir()}
    assert names == {
        "baseline",
        "bad_samples.jsonl",
        "checkpoints",
        "config.yaml",
        "environment.json",
        "metrics.json",
        "metrics.jsonl",
        "ranks.safetensors",
        "student",
    }
    assert not [path for path in finished.folder.rglob("*") if path.name.startswith(".")]


def test_the_same_config_gives_the_same_student(finished: RunResult, teacher: Path, tmp_path: Path) -> None:
    again = cmapkd.distill(finished.folder / "config.yaml", baseline="none", out=tmp_path / "b", quiet=True)
    one, other = cmapkd.load(finished.folder).state_dict(), cmapkd.load(again.folder).state_dict()
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert again.metrics["baseline"] is None
    assert again.gap_closed is None
    compared = cmapkd.distill(
        finished.folder / "config.yaml",
        out=tmp_path / "c",
        quiet=True,
        overrides=[f"baseline={finished.folder / 'baseline'}", "training.steps=1"],
    )
    assert compared.metrics["baseline"] == finished.metrics["baseline"]
    assert compared.metrics["steps"] == 1


def test_best_student_is_the_one_saved(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([30.0, 10.0])
    seen = []

    def score(student: Any, *_: Any, **__: Any) -> dict[str, Any]:
        if student.embed_dim != 16:
            return {"params": 1}
        seen.append({key: value.clone() for key, value in student.state_dict().items()})
        return {"zero_shot": {"top1": next(scores, 0.0)}, "params": 1}

    monkeypatch.setattr("cmapkd.run.measure.evaluate", score)
    training = {"steps": 2, "batch_size": 16, "evaluate_every": 1, "student": "best", "device": "cpu"}
    result = cmapkd.distill(**settings(teacher, training=training), out=tmp_path / "a")
    assert result.metrics["best_step"] == 1
    saved = cmapkd.load(result.folder).state_dict()
    assert all(torch.equal(value, seen[0][key]) for key, value in saved.items())
    assert any(not torch.equal(value, seen[1][key]) for key, value in saved.items())


def test_a_run_without_final_data_has_sizes_only(teacher: Path, tmp_path: Path) -> None:
    result = cmapkd.distill(
        **settings(teacher, data="scenes?length=40&size=32"), out=tmp_path / "a", overrides=["training.steps=1"]
    )
    assert result.metrics["evaluated_on"] is None
    assert set(result.metrics["student"]) == {"params"}
    result.table()


# ------------------------------------------------------------------------------------------------ refusals


def test_resume_into_a_changed_config_names_the_keys(finished: RunResult, teacher: Path) -> None:
    changed = settings(teacher, baseline="scratch", seed=4, optim={"learning_rate": 0.5})
    with pytest.raises(ConfigError, match=r"other settings: optim\.learning_rate \(was 0\.001, now 0\.5\)"):
        cmapkd.distill(**changed, out=finished.folder, resume=True)


def found(result: RunResult) -> dict[str, Any]:
    """A run's metrics without the time and memory that it took."""
    costs = ("train_seconds", "seconds_by_part", "peak_memory_bytes")
    return {key: value for key, value in result.metrics.items() if key not in costs}


def test_resume_of_a_finished_run_only_measures_again(finished: RunResult, teacher: Path) -> None:
    before = (finished.folder / "student" / "model.safetensors").read_bytes()
    same, work = settings(teacher, baseline="scratch", seed=4), ["training.micro_batch=4", "training.local_loss=true"]
    again = cmapkd.distill(**same, overrides=work, out=finished.folder, resume=True)  # how it is computed may change
    assert (finished.folder / "student" / "model.safetensors").read_bytes() == before
    assert found(again) == found(finished)


def test_processes_that_torchrun_started_again_resume(
    finished: RunResult, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = cmapkd.distill(**settings(teacher, baseline="scratch", seed=4), out=finished.folder)
    assert found(again) == found(finished)


def test_folder_with_a_run_is_refused(finished: RunResult, teacher: Path) -> None:
    with pytest.raises(ConfigError, match="is not empty: resume the run in it, or name another folder") as refused:
        cmapkd.distill(**settings(teacher), out=finished.folder)
    assert refused.value.__notes__ == ["Resume it by the same call with resume=True."]


def test_what_somebody_removes_during_a_run_is_there_in_the_end(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def removed(*given: Any, out: Path, **more: Any) -> Any:
        for name in ("config.yaml", "environment.json"):
            (out / name).unlink()
        return measure(*given, out=out, **more)

    monkeypatch.setattr("cmapkd.run.execute.measure", removed)
    cmapkd.distill(**settings(teacher, seed=4), out=tmp_path / "a")
    assert load_config(RunConfig, tmp_path / "a" / "config.yaml").seed == 4
    assert json.loads((tmp_path / "a" / "environment.json").read_text())["seed"] == 4


@pytest.mark.parametrize("seed", [10**23, 2**64, -1])
def test_seeds_that_no_generator_takes_are_refused_in_words(teacher: Path, seed: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="seed: must be "):
        cmapkd.distill(**settings(teacher, seed=seed), out=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_folder_with_something_else_is_refused(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="is not empty"):
        cmapkd.distill(**settings(teacher), out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
    with pytest.raises(ConfigError, match="is not empty"):
        cmapkd.distill(**settings(teacher), out=tmp_path / "letter.txt")


def test_nothing_to_resume(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing to resume in .*: it has no config\.yaml"):
        cmapkd.distill(**settings(teacher), out=tmp_path / "new", resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baseline": "scrath"}, r"baseline 'scrath' \(did you mean 'scratch'\?\) is neither none nor scratch"),
        ({"data": {"train": "scenes?length=50", "test": "scens"}}, "no kind of data 'scens'"),
        ({"teacher": None}, "clip_kd distils from a teacher"),
        ({"overrides": ["optim.learning_rat=1"]}, "optim.learning_rat: unknown key"),
        ({"data": {"train": "scenes"}, "training": {"steps": 1, "evaluate_every": 1}}, "nothing to validate on"),
    ],
)
def test_mistakes_show_before_anything_is_written(
    change: dict[str, Any], message: str, teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        cmapkd.distill(**settings(teacher, **change), out=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_run_that_never_began_leaves_the_folder_usable(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no model 'nowhere'"):
        cmapkd.distill(**settings(Path("nowhere")), out=tmp_path / "a")
    training = {"steps": 1, "batch_size": 16, "device": "cpu"}
    assert cmapkd.distill(**settings(teacher, training=training), out=tmp_path / "a").metrics["steps"] == 1


def test_model_folder_that_is_not_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a cmapkd model folder"):
        cmapkd.load(tmp_path)
    with pytest.raises(ValueError, match="holds no finished run"):
        RunResult.read(tmp_path)


def test_interrupted_run_is_resumed_by_the_same_call(
    finished: RunResult, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading
    from collections.abc import Iterator
    from contextlib import contextmanager

    from cmapkd.training import trainer

    @contextmanager
    def asked_at_once() -> Iterator[threading.Event]:
        event = threading.Event()
        event.set()
        yield event

    values = settings(teacher, baseline="scratch", seed=4)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "signals", asked_at_once)
        for resume in (False, True):  # steps 1 and 2 of the student
            with pytest.raises(Interrupted, match="saved step-00000000"):
                cmapkd.distill(**values, out=tmp_path / "a", resume=resume)
    result = cmapkd.distill(**values, out=tmp_path / "a", resume=True)
    assert found(result) == found(finished)


# ------------------------------------------------------------------------------------------------ parts


def test_commit_of_a_folder(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None

    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=Somebody", "-c", "user.email=somebody@example.org")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "file").write_text("one")
    git("init")
    git("add", "file")
    git("commit", "-m", "first")
    clean = git_commit(tmp_path)
    assert clean is not None
    assert len(clean) == 40
    (tmp_path / "other").write_text("untracked files do not count")
    assert git_commit(tmp_path) == clean
    (tmp_path / "file").write_text("two")
    assert git_commit(tmp_path) == f"{clean}+changes"


def scores(mean: float) -> dict[str, Any]:
    return {"retrieval": {"mean_r@1": mean}, "params": 1}


def test_gap_closed_is_the_share_of_the_way() -> None:
    assert gap_closed(scores(80), scores(60), scores(40)) == pytest.approx(0.5)
    assert gap_closed(scores(80), scores(80), scores(40)) == pytest.approx(1.0)
    assert gap_closed(scores(80), scores(90), scores(40)) == pytest.approx(1.25)
    assert gap_closed(scores(80), scores(30), scores(40)) == pytest.approx(-0.25)


def test_gap_closed_is_none_where_there_is_no_gap() -> None:
    for missing in range(3):
        three: list[Any] = [scores(80), scores(60), scores(40)]
        for nothing in (None, {"params": 1}, {"zero_shot": {"top1": 3}, "params": 1}):
            three[missing] = nothing
            assert gap_closed(*three) is None
    assert gap_closed(scores(40), scores(60), scores(40)) is None
    assert gap_closed(scores(30), scores(60), scores(40)) is None


def test_vocabulary_is_learned_from_what_can_be_read() -> None:
    source = MemorySource(6)

    class Unreadable(MemorySource):
        def captions(self, index: int) -> tuple[str, ...]:
            if index in self.bad:
                raise BadSampleError(f"m{index}", "unreadable")
            return super().captions(index)

    expected = [caption for index in (0, 2, 3, 5) for caption in source.captions(index)]
    assert list(vocabulary_captions(Unreadable(6, bad=(1, 4)))) == expected


def test_vocabulary_is_spread_over_large_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmapkd.run.texts.VOCABULARY_CAPTIONS", 3)

    class Counting(MemorySource):
        def captions(self, index: int) -> tuple[str, ...]:
            return (str(index),)

    assert list(vocabulary_captions(Counting(10))) == ["0", "3", "6"]
    assert list(vocabulary_captions(Counting(2))) == ["0", "1"]


def test_saved_models_answer_alike(tmp_path: Path) -> None:
    model = make_model().eval()
    model.save(tmp_path / "m")
    inputs = random_batch(3).inputs["student"]
    one, other = model(inputs), load_model(tmp_path / "m")(inputs)
    assert torch.equal(one.image.embedding, other.image.embedding)
    assert torch.equal(one.text.embedding, other.text.embedding)
    assert math.isclose(one.logit_scale.item(), other.logit_scale.item())


def test_a_cache_is_planned_for_what_the_stages_read(teacher: Path, tmp_path: Path) -> None:
    values = settings(teacher, cache={"mode": "auto", "folder": str(tmp_path / "cache")})
    values["data"] = {"train": "scenes?length=40&size=32", "more": {"ref": {"source": "scenes:hard?length=30&size=32"}}}
    values["data"]["more"]["ref"]["share"] = 0.25
    values["training"] = {"batch_size": 8, "device": "cpu", "stages": [{"steps": 2}, {"steps": 3, "data": "ref"}]}
    del values["quiet"]
    config = RunConfig.from_mapping(values)
    source, teachers = open_training(config), load_teachers(config)
    method = method_of(config, build_student(config, source, teachers), teachers)
    planned = {int(key) % len(source) for key in plan_cache(config, method, source).keys.listed()}
    sampler = PlanSampler(len(source), batch_size=8, seed=0, start=0, stop=5, streams=streams_of(source))
    sampler.only = lambda step: "ref" if step >= 2 else None
    read = {index for plan in sampler for index in plan.everyone}
    assert sum(index >= 40 for index in read) > 20  # more than the first stage's shares
    assert read <= planned


def test_a_baseline_reads_the_streams_that_the_stages_read() -> None:
    stages = (StageConfig(steps=2, terms=("a",)), StageConfig(steps=3, data="ref", train=("modules",)))
    alone = TrainConfig(stages=stages).without_stages()
    assert [(stage.steps, stage.data, stage.terms) for stage in alone.stages] == [(2, None, None), (3, "ref", None)]
    assert alone.num_steps(10) == 5


def test_parts_that_a_baseline_could_not_train_are_refused_before_the_training(teacher: Path, tmp_path: Path) -> None:
    values = settings(teacher, baseline="scratch")
    values["training"] = {**values["training"], "train_parts": ["guided"]}
    with pytest.raises(ConfigError, match=r"but guided of training\.train_parts belongs to method clip_kd alone"):
        cmapkd.distill(**values, out=tmp_path / "run")


# ------------------------------------------------------------------------------------------------ several teachers


def two_taught(taught_by: Path, **changes: Any) -> dict[str, Any]:
    method = {"name": "mobileclip", "synthetic": True}
    return settings(taught_by, method=method, more_teachers={"second": str(taught_by)}) | changes


def test_two_teachers_from_config_to_caches(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    result = cmapkd.distill(**two_taught(teacher, cache="auto", baseline="scratch"), out=tmp_path / "a")
    stored = yaml.safe_load((result.folder / "config.yaml").read_text())
    assert stored["more_teachers"]["second"]["name"] == str(teacher)
    assert load_config(RunConfig, result.folder / "config.yaml").plain() == stored
    assert "more_teachers" not in yaml.safe_load((result.folder / "baseline" / "config.yaml").read_text())
    terms = json.loads((result.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert {key for key in terms if key.startswith("terms/")} == {
        "terms/contrastive", "terms/similarity", "terms/contrastive_synthetic", "terms/similarity_synthetic",
    }  # fmt: skip
    assert len([*(tmp_path / "cache" / "cmapkd" / "teachers").iterdir()]) == 1  # equal teachers share their rows
    assert result.metrics["teacher"]["retrieval"]


def test_further_teachers_are_checked_before_the_run(teacher: Path) -> None:
    values = {key: value for key, value in two_taught(teacher).items() if key != "quiet"}
    with pytest.raises(ConfigError, match=r"clip_kd learns from one teacher, and more_teachers names second"):
        RunConfig.from_mapping(values | {"method": "clip_kd"})
    with pytest.raises(ConfigError, match="'student' cannot name a further teacher"):
        RunConfig.from_mapping(values | {"more_teachers": {"student": str(teacher)}})
    with pytest.raises(ConfigError, match="distils from a teacher: add teacher"):
        RunConfig.from_mapping(values | {"teacher": None})
    assert RunConfig.from_mapping(values | {"more_teachers": None}).teachers.keys() == {"teacher"}


def test_a_run_with_one_teacher_has_the_config_that_it_had(teacher: Path) -> None:
    values = {key: value for key, value in settings(teacher).items() if key != "quiet"}
    plain = RunConfig.from_mapping(values).plain()
    assert "more_teachers" not in plain
    assert "mix_synthetic" not in plain["data"]
    mixed = values | {"data": {**values["data"], "mix_synthetic": 0.5}}
    assert RunConfig.from_mapping(mixed).plain()["data"]["mix_synthetic"] == 0.5


# ------------------------------------------------------------------------------------------------ inherited weights


def test_a_student_cut_from_its_teacher(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    student = {"name": "tiny:debug", "options": {"vision_depth": 1, "embed_dim": 16}, "inherit": "teacher"}
    short = {"steps": 1, "batch_size": 8, "device": "cpu"}
    values = settings(teacher, student=student, method="tinyclip", training=short, cache="auto", baseline="scratch")
    result = cmapkd.distill(**values, optim={"learning_rate": 1e-12}, out=tmp_path / "a")
    found, whole = load_model(result.folder).state_dict(), load_model(teacher).state_dict()
    torch.testing.assert_close(found["text.tokens.weight"], whole["text.tokens.weight"])
    torch.testing.assert_close(found["vision.project.weight"], whole["vision.project.weight"][:16])
    stored = yaml.safe_load((result.folder / "config.yaml").read_text())
    assert stored["student"]["inherit"] == {"name": "teacher", "depth": "official"}
    alone = yaml.safe_load((result.folder / "baseline" / "config.yaml").read_text())
    assert "inherit" not in alone["student"]
    assert load_config(RunConfig, result.folder / "config.yaml").plain() == stored


def test_only_a_student_with_a_teacher_inherits_from_it(teacher: Path) -> None:
    values = {key: value for key, value in settings(teacher).items() if key != "quiet"}
    heir = {"name": "tiny:debug", "inherit": "teacher"}
    with pytest.raises(ConfigError, match="teacher teacher would inherit weights: only the student does"):
        RunConfig.from_mapping(values | {"teacher": heir})
    with pytest.raises(ConfigError, match=r"student\.inherit is teacher, and method contrastive has none here"):
        RunConfig.from_mapping(values | {"teacher": None, "method": "contrastive", "student": heir})


def test_memory_that_ends_while_scoring_leaves_a_run_that_can_be_finished(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def large(model: Any, source: Any, config: Any, **more: Any) -> Any:
        if config.batch_size > 100:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")
        return evaluate(model, source, config, **more)

    monkeypatch.setattr("cmapkd.run.measure.evaluate", large)
    with pytest.raises(OutOfMemory, match=r"resume the run with evaluation\.batch_size=64 \(now 256\)"):
        cmapkd.distill(**settings(teacher), out=tmp_path / "a")
    done = cmapkd.distill(**settings(teacher), out=tmp_path / "a", resume=True, overrides=["evaluation.batch_size=64"])
    assert done.metrics["student"]["retrieval"]

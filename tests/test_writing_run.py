"""Everything that a run has, for a model that writes: scores, resume, finalize, evaluation, report, comparison."""

from __future__ import annotations

import copy
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

import cmapkd
from cmapkd.cli import app
from cmapkd.compare import compare, load_comparison
from cmapkd.config import ConfigError
from cmapkd.data.open import open_source
from cmapkd.data.prompting import Prompting
from cmapkd.data.records import Unusable
from cmapkd.data.turns import Turn
from cmapkd.diagnosis import diagnose
from cmapkd.diagnosis.models import check_weights
from cmapkd.diagnosis.writing import Asked, check_dialogues
from cmapkd.methods.generative import GenerativeConfig
from cmapkd.models import FrozenTeacher, GenerativeModel, ModelConfig, build_model
from cmapkd.report import write_report
from cmapkd.results import RunResult
from cmapkd.run import RunConfig, finalize, method_of, readers_of, run
from cmapkd.run.build import build_student, check_training, load_teachers, open_training
from cmapkd.run.card import student_card
from cmapkd.run.measure import num_measured, validated
from cmapkd.run.prompts import prompts_of_runs
from cmapkd.run.remarks import remarks_on_teachers
from cmapkd.starter import check_teacher
from helpers import MemorySource
from writers import STUDENT, TEACHER, TEXTS, Dialogues, make_writer

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {"heads": 2, "vocab_size": 300, "max_tokens": 128}


def save_teacher(folder: Path) -> Path:
    torch.manual_seed(3)
    config = ModelConfig(name="tiny_vlm:small", options={**OPTIONS, **TEACHER})
    model = build_model(config, captions=list(TEXTS) * 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save(folder)
    return folder


METRICS = ("answering.overall", "perplexity.negative_bits_per_byte")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        "teacher": str(save_teacher(tmp_path_factory.mktemp("teacher") / "model")),
        "student": {"name": "tiny_vlm:small", "options": {**OPTIONS, **STUDENT}},
        "method": {"name": "token_kd", "on_policy": {"share": 0.5, "max_new_tokens": 3}},
        "data": {
            "train": "scenes?length=24",
            "val": "scenes@val?length=3",
            "prompts": {"kind": "questions", "suffix": "Say one word."},
        },
        "training": {"steps": 2, "batch_size": 4, "evaluate_every": 1, "log_every": 1, "device": "cpu"},
        "optim": {"warmup_steps": 1},
        "evaluation": {"tasks": ["answering", "perplexity"], "writing": {"answer_tokens": 2}},
    }


def of(recipe: dict[str, Any], **changes: Any) -> RunConfig:
    return RunConfig.from_mapping({**recipe, **changes})


@pytest.fixture(scope="module")
def finished(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with a baseline, and what it said."""
    out = tmp_path_factory.mktemp("run") / "first"
    said = io.StringIO()
    run(of(recipe, baseline="scratch"), out=out, console=Console(file=said, width=200))
    return out, said.getvalue()


def table_of(result: RunResult) -> str:
    shown = io.StringIO()
    Console(width=200, file=shown).print(result.table())
    return shown.getvalue()


def test_a_run_ends_with_scores_of_student_teacher_and_sft(finished: tuple[Path, str]) -> None:
    out, said = finished
    result = RunResult.read(out)
    metrics = result.metrics
    assert metrics["baseline_name"] == "sft"
    for role in ("teacher", "student", "baseline"):
        assert metrics[role]["answering"]["num_questions"] > 0
        assert metrics[role]["answering"]["protocol"]["question_suffix"] == "Say one word."  # as in training
        assert sum(metrics[role]["params_by_part"].values()) == metrics[role]["params"]
        assert metrics[role]["perplexity"]["protocol"]["question_suffix"] == "Say one word."
        assert metrics[role]["perplexity"]["num_tokens"] == metrics["student"]["perplexity"]["num_tokens"]
    table = table_of(result)
    for word in ("teacher", "sft", "token_kd", "answers", "-bits/byte", "questions"):
        assert word in table
    assert "rollouts" in said
    assert "of the time" in said


def test_questions_without_an_answer_need_a_student_that_writes(recipe: dict[str, Any]) -> None:
    data = {**recipe["data"], "prompts": {"share": 0.7, "unanswered": "student"}}
    with pytest.raises(ConfigError, match=r"unanswered: student .* set method.on_policy"):
        of(recipe, data=data, method="token_kd")
    config = of(recipe, data=data)
    assert config.data.prompts.unanswered == "student"
    assert config.scratch().data.prompts.unanswered == "leave_out"
    assert config.scratch().data.prompts.share == config.data.prompts.share


def test_validations_are_bounded_and_ask_what_can_be_answered(recipe: dict[str, Any]) -> None:
    source = open_source("scenes@val?length=9")
    auto = {"tasks": "auto", "writing": {"validation_samples": 2}}
    chosen = validated(of(recipe, evaluation=auto), source).evaluation
    assert (chosen.tasks, chosen.limit) == (("answering",), 2)
    assert validated(of(recipe, evaluation=auto | {"limit": 1}), source).evaluation.limit == 1
    named = validated(of(recipe, evaluation={"tasks": ["perplexity"]}), source)
    assert (named.evaluation.tasks, named.evaluation.limit) == (("perplexity",), 256)
    assert num_measured(named, source) == 9
    assert validated(of(recipe, evaluation=auto), MemorySource(4)).evaluation.tasks == ("perplexity",)
    data = {**recipe["data"], "prompts": {"kind": "captions"}}  # what is not trained is not asked
    assert validated(of(recipe, evaluation=auto, data=data), source).evaluation.tasks == ("perplexity",)


def test_tasks_of_models_that_embed_are_refused_before_the_training(recipe: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"names retrieval, and method token_kd trains a GenerativeModel, .* among ans"
    ):
        of(recipe, evaluation={"tasks": ["answering", "retrieval"]})
    embeds = {"teacher": "tiny:debug", "student": "tiny:debug", "method": "clip_kd"}
    embeds |= {"data": {"train": "scenes", "val": "scenes@val"}, "training": {"steps": 2, "evaluate_every": 1}}
    with pytest.raises(ConfigError, match="names answering, and method clip_kd trains a DualEncoder"):
        RunConfig.from_mapping({**embeds, "evaluation": {"tasks": ["answering"]}})
    embeds["evaluation"] = {"tasks": ["yes_no"]}
    with pytest.raises(ConfigError) as refused:
        RunConfig.from_mapping(embeds)
    assert "describing" not in str(refused.value)
    no_headline = {**recipe, "evaluation": {"tasks": ["yes_no"]}}
    with pytest.raises(ConfigError, match="is chosen by answering or describing or perplexity, but evaluation"):
        RunConfig.from_mapping(no_headline)


def test_a_teacher_that_writes_and_is_random_is_told_of() -> None:
    config = ModelConfig(name="tiny_vlm:small", options={**OPTIONS, **TEACHER})
    model = build_model(config, captions=list(TEXTS) * 4)
    (said,) = remarks_on_teachers({"teacher": FrozenTeacher(model)})
    assert said.startswith("teacher: tiny_vlm:small is untrained: its weights are random")
    (finding,) = check_weights("teacher", model, teaches=True)
    assert finding.level == "problem"


@pytest.mark.parametrize(
    ("method", "reason"),
    [({"name": "taid"}, "mixes all logits"), ({"name": "token_kd", "on_policy": 0.5}, "has just written")],
)
def test_a_cache_that_nothing_could_be_read_from_is_refused_by_the_recipe(
    recipe: dict[str, Any], method: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=f"method {method['name']} takes no teacher cache as it is set: .*{reason}"):
        of(recipe, method=method, cache="auto")


def test_a_fast_reading_of_pictures_is_for_models_of_two_towers(recipe: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"data\.views\.reading: fast is for models of two towers"):
        of(recipe, data={**recipe["data"], "views": {"reading": "fast"}})


def test_runs_of_models_that_embed_keep_their_configs() -> None:
    values = {"student": "tiny:small", "method": "contrastive", "data": {"train": "scenes"}, "training": {"steps": 3}}
    plain = RunConfig.from_mapping(values).plain()
    assert "writing" not in plain["evaluation"]  # comparisons know a run by its config
    assert not {"prompts", "max_tokens"} & plain["data"].keys()
    for data in ({"prompts": "questions"}, {"max_tokens": 9}):
        with pytest.raises(ConfigError, match="is for models that write, and method contrastive trains none"):
            RunConfig.from_mapping({**values, "data": {"train": "scenes", **data}})


def test_what_a_writing_run_was_asked_is_in_its_config(recipe: dict[str, Any]) -> None:
    plain = of(recipe).plain()
    assert plain["data"]["prompts"]["suffix"] == "Say one word."
    assert plain["evaluation"]["writing"]["answer_tokens"] == 2
    assert RunConfig.from_mapping(plain) == of(recipe)


def test_the_baseline_counts_tokens_as_the_run_does(recipe: dict[str, Any]) -> None:
    for reduction in ("sample_mean", "batch_sum"):
        whole = of(recipe, method={**recipe["method"], "reduction": reduction}, baseline="scratch")
        alone = whole.scratch().method
        assert isinstance(alone, GenerativeConfig)
        assert (alone.name, alone.reduction) == ("sft", reduction)


def test_a_teacher_in_shares_is_refused_before_anything_is_built(recipe: dict[str, Any]) -> None:
    shared = {**recipe["training"], "sharding": "fsdp2", "shard_teacher": True}
    settings = of(recipe, training=shared)
    source = open_training(settings)
    teachers = load_teachers(settings)
    method = method_of(settings, build_student(settings, source, teachers), teachers)
    with pytest.raises(ConfigError, match=r"training.shard_teacher .* method token_kd"):
        check_training(settings, method, source)


def test_seconds_are_told_by_part(finished: tuple[Path, str]) -> None:
    out, _ = finished
    metrics = json.loads((out / "metrics.json").read_text())
    parts = metrics["seconds_by_part"]
    assert set(parts) == {"reading", "rollouts", "steps"}
    assert sum(parts.values()) == pytest.approx(metrics["train_seconds"], abs=0.3)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {"rollouts/share", "rollouts/tokens", "rollouts/unfinished", "rollouts/seconds"} <= lines[0].keys()
    assert any("validation/answering" in line for line in lines)


def test_a_resumed_run_is_the_run_bit_for_bit(recipe: dict[str, Any], tmp_path: Path) -> None:
    """With answers of the student's own by a coin, and to questions without an answer."""
    data = {**recipe["data"], "prompts": {"kind": "questions", "share": 0.6, "unanswered": "student"}}
    config = of(recipe, data=data, training={**recipe["training"], "checkpoint_every": 1, "keep_checkpoints": 2})
    run(config, out=tmp_path / "whole")
    whole = load_file(tmp_path / "whole" / "student" / "model.safetensors")
    for name in ("student", "metrics.json", "metrics.jsonl"):
        path = tmp_path / "whole" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in (tmp_path / "whole" / "checkpoints").glob("*-000000002"):
        shutil.rmtree(path)
    run(config, out=tmp_path / "whole", resume=True)
    again = load_file(tmp_path / "whole" / "student" / "model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_run_is_finalized_and_extended(finished: tuple[Path, str], recipe: dict[str, Any], tmp_path: Path) -> None:
    config = of(recipe)
    run(config, out=tmp_path / "run")
    best = finalize(tmp_path / "run", step="best").metrics
    assert best["steps"] == best["best_step"]
    assert best["student"]["answering"]["num_questions"] > 0
    longer = run(config, out=tmp_path / "run", extend_to=3)
    assert longer.metrics["steps"] == longer.metrics["total_steps"] == 3
    assert longer.metrics["extended"] == [{"at": 2, "from": 2}]


def test_a_finished_run_answers_and_is_evaluated(finished: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = finished
    student = cmapkd.load(out)
    assert isinstance(student, GenerativeModel)
    said = student.answer(Image.new("RGB", (32, 32)), ["Is there a red circle?", "How many?"], max_new_tokens=2)
    assert len(said) == 2
    scores = tmp_path / "scores.json"
    words = ["evaluate", f"mine={out}", "--data", "scenes?length=2", "--tasks", "answering", "--json", str(scores)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    found = json.loads(scores.read_text())["models"]["mine"]["answering"]
    assert found["num_questions"] > 0
    assert found["protocol"]["question_suffix"] == "Say one word."  # of the run
    assert "exact match" in done.output
    assert "was trained (data.prompts)" in done.output.replace("\n", " ")


def test_the_last_line_is_a_call_that_answers(finished: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    done = CliRunner().invoke(app, ["finalize", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    last = done.output.replace("\n", "").partition("use the student in Python: ")[2]
    Image.new("RGB", (32, 32)).save(tmp_path / "a.jpg")
    picture = repr(str(tmp_path / "a.jpg"))
    assert len(eval(last.replace("'a.jpg'", picture), {"cmapkd": cmapkd})) == 1


def test_the_card_shows_how_to_ask(finished: tuple[Path, str], recipe: dict[str, Any], tmp_path: Path) -> None:
    out, _ = finished
    card = (out / "student" / "README.md").read_text()
    assert "A model that answers questions about images, with " in card
    assert "from the teacher model: 2 steps of 4 samples" in card
    assert "dual encoder" not in card
    metrics = json.loads((out / "metrics.json").read_text())
    student = metrics["student"]
    shown = f"{student['answering']['overall']:.1f} | {student['perplexity']['negative_bits_per_byte']:.3f}"
    assert f"| this student | {shown} |" in card
    Image.new("RGB", (32, 32)).save(tmp_path / "a.jpg")
    code = card.partition("```python\n")[2].partition("```")[0]
    asked: list[str] = []
    code = code.replace('"student"', repr(str(out))).replace('"a.jpg", "b.jpg"', f"{str(tmp_path / 'a.jpg')!r}, None")
    exec(code, {"print": asked.append})
    assert len(asked[0]) == 2
    assert "Say one word." in code  # as it was trained
    assert "from the teacher" not in student_card(of(recipe, method="sft"), metrics)  # it names one, and uses none


def test_answers_have_only_tokens_that_both_models_know(recipe: dict[str, Any]) -> None:
    config = RunConfig.from_mapping(recipe)
    teacher = build_model(str(recipe["teacher"]))
    longer = copy.deepcopy(teacher)
    longer.processor.native.tokenizer.add_tokens(["<think>"])  # as reasoning models have it; it is not special
    student = build_model(config.student, teacher=longer)
    method = method_of(config, student, {"teacher": FrozenTeacher(teacher)})
    said = (Turn("user", "What is it?"), Turn("assistant", "a <think> box"))
    size = student.vocabulary.size
    assert size == teacher.vocabulary.size + 1
    reader = readers_of(method, config)["student"]
    with pytest.raises(Unusable, match=f"an answer has token {size - 1}, .* only their first {size - 1} tokens in"):
        reader.read(Image.new("RGB", (8, 8)), None, said)
    asked = (Turn("user", "<think> What is it?"), Turn("assistant", "a box"))
    assert (reader.read(Image.new("RGB", (8, 8)), None, asked).ids == size - 1).sum() == 1


def test_runs_of_different_prompts_are_asked_in_words_of_ones_own(tmp_path: Path) -> None:
    for name, suffix in (("a", "Briefly."), ("b", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump({"data": {"prompts": {"suffix": suffix}}}))
    folders = [tmp_path / "a", tmp_path / "none"]
    prompts, told = prompts_of_runs(folders)
    assert prompts is not None
    assert prompts.suffix == "Briefly."
    assert "was trained" in told
    prompts, told = prompts_of_runs([*folders, tmp_path / "b"])
    assert prompts is None
    assert told.startswith("warning: the runs were trained with different prompts")
    assert prompts_of_runs([tmp_path / "none"]) == (None, "")
    alone, _ = prompts_of_runs([tmp_path / "a" / "student"])
    assert alone is not None
    assert alone.suffix == "Briefly."


def test_the_report_shows_answers(finished: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = finished
    page = write_report([out], tmp_path / "page.html", gallery=2).read_text()
    assert "Answers to look at" in page
    assert "Models answered" in page
    assert "answers" in page
    assert "Say one word." in page
    assert "Gallery of retrievals" not in page
    assert "Training by part: " in page
    assert "rollouts share" in page or "rollouts/share" in page
    assert "3 images, 21 questions" in page
    plain = write_report([out], tmp_path / "plain.html", gallery=0).read_text()
    assert "Answers to look at" not in plain
    hidden = write_report([out], tmp_path / "hidden.html", gallery=1, captions=False).read_text()
    assert "Say one word." not in hidden.partition("Answers to look at")[2].partition("<h2")[0]


def test_arms_that_write_are_compared(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(recipe))
    values = {"base": str(tmp_path / "base.yaml"), "seeds": [0, 1]}
    values["arms"] = {"sft": {"method": "sft"}, "kd": {"method": "token_kd"}}
    values |= {"evaluate": {"more": "scenes@test?length=2"}, "metrics": [*METRICS, "more.answering.overall"]}
    (tmp_path / "comparison.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    result = compare(load_comparison(tmp_path / "comparison.yaml"), out=tmp_path / "out")
    (table,) = result.tables
    assert table.metrics == tuple(values["metrics"])
    assert (table.reference_name, table.gap_name) == ("sft", "sft")
    assert [row.label for row in table.rows] == ["sft", "kd"]
    assert not any(row.errors for row in table.rows)
    (teacher,) = json.loads((tmp_path / "out" / "teachers.json").read_text()).values()
    further = [outcome.metrics["student"]["more"] for outcome in result.outcomes.values()]
    for scores in (teacher["scores"], *further):  # in the words of the training, on further data too
        assert scores["answering"]["protocol"]["question_suffix"] == "Say one word."
    for cell in table.rows[1].cells.values():
        if cell.two_way is not None:  # none where no answer differs
            assert cell.difference is not None
            assert cell.two_way.mean == pytest.approx(cell.difference.mean)
            assert cell.seeds_alone == ""
    assert table.rows[1].cells["perplexity.negative_bits_per_byte"].two_way is not None
    assert "perplexity.negative_bits_per_byte" in table.teachers[0].cells
    page = write_report([tmp_path / "out"], tmp_path / "page.html", gallery=0).read_text()
    assert "answering overall" in page


def test_trials_are_not_judged_by_what_students_lack(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        yaml.safe_dump(recipe | {"data": recipe["data"] | {"test": "scenes@test?length=3"}})
    )
    tuning = {"trials": 2, "seeds": [7], "space": {"optim.learning_rate": [0.001, 0.01]}, "families": ["kd"]}
    values = {
        "base": str(tmp_path / "base.yaml"),
        "seeds": [0],
        "tuning": tuning,
        "arms": {"kd": {}, "sft": "method=sft"},
    }
    (tmp_path / "comparison.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(
        ConfigError, match=r"retrieval\.mean_r@1, of a model that embeds pictures and texts.*answering\.overall"
    ):
        compare(load_comparison(tmp_path / "comparison.yaml"), out=tmp_path / "out")


def test_the_doctor_looks_at_tokens_and_pictures(recipe: dict[str, Any]) -> None:
    method = {**recipe["method"], "top_k": 8}
    found = {finding.what: finding for finding in diagnose(of(recipe, method=method))}
    assert "questions or dialogues each" in found["data.train"].detail
    assert "ends an answer with token" in found["student vocabulary"].detail
    assert found["student dialogues"].detail.startswith("of 24 read: 4 visual tokens of a picture, ")
    assert "of a model that knows nothing" in found["student start"].detail
    assert found["student weights"].detail.startswith("random in the ")
    assert "both write the same" in found["pair"].detail
    assert "with the right picture" in found["teacher sanity"].detail
    assert "its 8 likeliest tokens leave out" in found["teacher tokens"].detail
    assert "answers of the student's own" in found["parts of a step"].detail
    assert found["padding"].level == "ok"


@pytest.mark.parametrize(("silent", "level"), [(1, "note"), (7, "problem")])
def test_the_doctor_counts_samples_that_give_no_dialogue(silent: int, level: str) -> None:
    model, source = make_writer(), Dialogues()
    asked = replace(Asked.of(source, Prompting()), silent=("its questions have no answer",) * silent)
    found = check_dialogues("student", model, asked, max_tokens=None, max_bad_share=0.2)
    assert found[-1].level == level
    assert "cannot be used, the first: its questions have no answer" in found[-1].detail
    assert ("A run stops above data.max_bad_share 20%" in found[-1].detail) == (level == "problem")
    long = check_dialogues("student", model, replace(asked, silent=()), max_tokens=3, max_bad_share=0.2)
    assert long[-1].level == "problem"
    assert "are longer than data.max_tokens=3" in long[-1].detail


def test_commands_of_models_that_embed_refuse(finished: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = finished
    refused = CliRunner().invoke(app, ["export", str(out), "--out", str(tmp_path / "x")])
    assert "cmapkd export needs a model that embeds" in str(refused.exception)
    for teacher in ("tiny_vlm:small", str(out)):
        with pytest.raises(ConfigError, match="writes answers, and cmapkd init makes recipes"):
            check_teacher(teacher)
    with pytest.raises(ConfigError, match="'sft' trains models that write"):
        cmapkd.method("sft", student=str(out))
    with pytest.raises(ConfigError, match="a training loop of one's own needs a model that embeds"):
        cmapkd.method("contrastive", student=str(out))

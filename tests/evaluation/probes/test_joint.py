"""Heads that learn with the student: any method, exact resume, parts of a batch, and what is refused or masked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import cmapkd
from cmapkd.config import ConfigError
from cmapkd.data.batches import BatchBuilder
from cmapkd.data.open import open_source
from cmapkd.data.plans import PlanSampler
from cmapkd.data.types import Batch, Sample, Source
from cmapkd.data.views import WHOLE
from cmapkd.diagnosis import diagnose
from cmapkd.evaluation.probes.config import HeadsConfig
from cmapkd.evaluation.probes.joint import JointHeads, build_heads
from cmapkd.methods import METHODS, Method, build_method
from cmapkd.models import build_model, load_model
from cmapkd.run import RunConfig, readers, vocabulary_captions
from cmapkd.training import Interrupted, Trainer
from cmapkd.training.checkpoint import list_checkpoints, read_checkpoint
from helpers import DUAL, ONE_WIDTH, Partly, read_lines

DATA = "scenes?length=120&size=32"
ALL = {"vqa": {"weight": 1.0, "width": 32, "depth": 1}, "captioning": {"weight": 0.5, "width": 32, "depth": 1}}
ALL["detection"] = {"weight": 0.5, "width": 32}
TERMS = ("task_vqa", "task_captioning", "task_detection")


@pytest.fixture(scope="session")
def trained_teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("joint") / "teacher"
    torch.manual_seed(1)
    build_model("tiny:debug", captions=vocabulary_captions(open_source("scenes?length=50"))).save(folder)
    return str(folder)


def settings(teacher: str | None, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "teacher": teacher,
        "student": {"name": "tiny:debug", "options": {"embed_dim": 16}},
        "data": {"train": DATA, "views": {"crop_scale": [1.0, 1.0]}, "more_views": {"global": {}, "local": {}}},
        "method": "clip_kd",
        "training": {"steps": 6, "batch_size": 16, "log_every": 1, "device": "cpu"},
        "heads": ALL,
        "quiet": True,
    }
    return values | changes


def lines(out: Path) -> list[dict[str, Any]]:
    found = read_lines(out / "metrics.jsonl")
    for line in found:
        line.pop("pairs_per_second", None)
    return found


def heads_and_method(source: Source, config: dict[str, Any] | None = None) -> tuple[Method, JointHeads, BatchBuilder]:
    torch.manual_seed(0)
    student = build_model("tiny:debug", captions=vocabulary_captions(source))
    heads = build_heads(
        HeadsConfig.model_validate(config or ALL), student=student, source=source, template="a {}", seed=0
    )
    assert heads is not None
    kind = METHODS["contrastive"]
    method = build_method(kind.Config(name="contrastive"), student=student, teacher=None, auxiliary=lambda _: heads)
    builder = BatchBuilder(source, WHOLE, readers(student, None), seed=0, extras=method.extras)
    return method, heads, builder


def batch_of(builder: BatchBuilder, size: int = 16) -> Batch:
    return builder[PlanSampler(len(builder.source), batch_size=size, seed=0, start=0, stop=1).plan(0)]


# the teacher here is wider, and beside 100 classes its 32 numbers have no room for lelp's parts
# heads read the student, so of the methods with a cached teacher one of each kind of cache will do
@pytest.mark.parametrize(
    ("cache", "method"),
    [
        *(("off", name) for name in DUAL if name not in (*ONE_WIDTH, "lelp")),
        *(("auto", name) for name in ("clip_kd", "cmapkd", "acam_kd", "promptkd", "mobileclip")),
    ],
)
def test_every_method_takes_heads_and_logs_their_terms(
    trained_teacher: str, tmp_path: Path, method: str, cache: str
) -> None:
    teacher = trained_teacher if METHODS[method].uses_teacher else None
    training = settings(None)["training"] | {"steps": 2}
    cmapkd.distill(
        **settings(teacher, method=method, cache={"mode": cache, "folder": str(tmp_path / "cache")}, training=training)
        if cache == "auto"
        else settings(teacher, method=method, training=training),
        out=tmp_path / "run",
    )
    logged = lines(tmp_path / "run")
    for line in logged[-1:] if method == "fitnet" else logged:  # whose first stage has its hint alone
        assert all(line[f"terms/{term}"] > 0 for term in TERMS)
        assert line["heads/vqa_masked"] >= 0
    for name in ALL:
        assert load_file(tmp_path / "run" / "heads" / f"{name}.safetensors")
    assert json.loads((tmp_path / "run" / "heads" / "vqa.json").read_text())["answers"]
    saved = load_model(tmp_path / "run" / "student").state_dict()
    assert not any("head" in key for key in saved)


def test_a_resumed_run_ends_bit_for_bit_the_same(
    trained_teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cmapkd.distill(**settings(trained_teacher), out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_agreed", lambda self, _stop: self.progress.step == 2)
        with pytest.raises(Interrupted):
            cmapkd.distill(**settings(trained_teacher), out=tmp_path / "parts")
    cmapkd.distill(**settings(trained_teacher), out=tmp_path / "parts", resume=True)
    ends = [read_checkpoint(list_checkpoints(tmp_path / name / "checkpoints")[-1])[0] for name in ("whole", "parts")]
    assert any(".heads." in key for key in ends[0]["method"])
    for group in ("method", "optimizer"):
        assert ends[0][group].keys() == ends[1][group].keys()
        assert all(torch.equal(ends[0][group][key], ends[1][group][key]) for key in ends[0][group])
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")
    for name in ALL:
        mine, theirs = (load_file(tmp_path / run / "heads" / f"{name}.safetensors") for run in ("whole", "parts"))
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_weights_of_zero_change_nothing(trained_teacher: str, tmp_path: Path) -> None:
    cmapkd.distill(**settings(trained_teacher, heads=None), out=tmp_path / "none")
    cmapkd.distill(**settings(trained_teacher, heads={"vqa": 0, "detection": 0.0}), out=tmp_path / "zero")
    assert lines(tmp_path / "none") == lines(tmp_path / "zero")
    assert not (tmp_path / "zero" / "heads").exists()
    assert "heads" not in (tmp_path / "none" / "config.yaml").read_text()


def test_losses_fall_and_the_student_learns_for_the_task(tmp_path: Path) -> None:
    training = settings(None)["training"] | {"steps": 60, "stages": [{"terms": TERMS, "share": 1.0}]}
    optim = {"learning_rate": 2e-3, "warmup_steps": 5}
    cmapkd.distill(**settings(None, method="contrastive", training=training, optim=optim), out=tmp_path / "run")
    found = lines(tmp_path / "run")
    assert "terms/contrastive" not in found[0]
    for term in TERMS:
        first, last = (sum(line[f"terms/{term}"] for line in part) for part in (found[:5], found[-5:]))
        assert last < 0.85 * first, term


def test_gradients_reach_both_towers_and_every_weight_of_the_heads() -> None:
    method, heads, builder = heads_and_method(open_source(DATA))
    terms = method(batch_of(builder))
    sum(terms[term].value for term in TERMS).backward()
    assert not [name for name, p in heads.named_parameters() if p.grad is None or not p.grad.any()]
    for tower in ("image", "vision", "text"):
        named = [p for name, p in method.student.named_parameters() if name.startswith(tower)]
        assert not named or any(p.grad is not None and bool(p.grad.any()) for p in named)
    assert {Method.part_of(name) for name, _ in method.named_parameters() if "heads" in name} == {"modules"}


def test_micro_batches_give_the_terms_and_gradients_of_the_whole() -> None:
    found = []
    for micro in (None, 5):
        method, _, builder = heads_and_method(open_source(DATA))
        method.micro_batch = micro
        terms = method(batch_of(builder))
        sum(terms[term].value for term in TERMS).backward()
        gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
        found.append(({term: terms[term].value.detach() for term in TERMS}, gradients))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=2e-5)


def test_samples_without_a_known_answer_or_box_are_left_out_and_counted() -> None:
    whole = open_source("scenes?length=32&size=32")
    settings_of_two = {"vqa": {"weight": 1, "answers": 8, "width": 32}, "detection": 1.0}
    method, _, builder = heads_and_method(whole, settings_of_two)
    order = PlanSampler(32, batch_size=16, seed=0, start=0, stop=1).plan(0).everyone
    kept = order[:9]
    builder.samples.source = Partly(whole, lacking=[index for index in range(32) if index not in kept])
    partly = batch_of(builder)
    joint = partly.extra["heads"]
    assert len(joint.pictures) <= 9
    assert joint.by_head["detection"].rows.tolist() == list(range(len(joint.pictures)))
    terms = method(partly)
    assert float(method.measurements["heads/detection_masked"]) == 16 - len(joint.by_head["detection"].rows)
    answered = len(joint.by_head["vqa"].rows)
    assert float(method.measurements["heads/vqa_masked"]) == 16 - answered >= 7
    builder.samples.source = whole
    with torch.no_grad():  # the same as of a batch of the kept ones alone
        alone = builder[PlanSampler(32, batch_size=9, seed=0, start=0, stop=1).plan(0)]
        again = method(alone)
    torch.testing.assert_close(terms["task_vqa"].value, again["task_vqa"].value)
    torch.testing.assert_close(terms["task_detection"].value, again["task_detection"].value)


def test_a_batch_that_teaches_nothing_is_a_zero() -> None:
    whole = open_source("scenes?length=32&size=32")
    method, heads, builder = heads_and_method(whole, {"vqa": 1.0, "detection": 1.0})
    builder.samples.source = Partly(whole, lacking=range(32))
    terms = method(batch_of(builder))
    assert all(terms[name].value.item() == 0 for name in ("task_vqa", "task_detection"))
    (terms["task_vqa"].value + terms["task_detection"].value).backward()
    assert not any(p.grad.any() for p in heads.parameters() if p.grad is not None)


def test_wrong_names_weights_and_sources_are_refused(trained_teacher: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"heads\.vqaa: unknown key \(did you mean 'vqa'\?\)"):
        cmapkd.distill(**settings(trained_teacher, heads={"vqaa": 1.0}), out=tmp_path / "a")
    with pytest.raises(ConfigError, match=r"heads\.vqa\.weight.*>= 0"):
        cmapkd.distill(**settings(trained_teacher, heads={"vqa": -1.0}), out=tmp_path / "b")
    stages = settings(None)["training"] | {"stages": [{"terms": ["task_vqaa"], "share": 1.0}]}
    with pytest.raises(ConfigError, match="did you mean 'task_vqa'"):
        cmapkd.distill(**settings(trained_teacher, training=stages), out=tmp_path / "c")


@pytest.mark.parametrize(("name", "what"), [("vqa", "question with an answer"), ("detection", "box")])
def test_a_source_without_what_a_head_learns_from_is_refused(name: str, what: str) -> None:
    class Captions(Partly):
        def __getitem__(self, index: int) -> Sample:
            sample = self.source[index]
            return Sample(sample.id, sample.image, sample.captions)

    with pytest.raises(ConfigError, match=rf"heads\.{name} .*none has a {what}"):
        heads_and_method(Captions(open_source(DATA), range(0)), {name: 1.0})


def test_a_term_weighting_weighs_the_heads_too(trained_teacher: str, tmp_path: Path) -> None:
    method = {"name": "clip_kd", "term_weighting": "uncertainty"}
    cmapkd.distill(**settings(trained_teacher, method=method), out=tmp_path / "run")
    assert any("task_vqa" in key and not key.startswith("terms/task") for key in lines(tmp_path / "run")[-1])


def test_doctor_steps_a_run_with_heads() -> None:
    values = settings(None, method="contrastive")
    del values["quiet"]
    findings = diagnose(RunConfig.from_mapping(values))
    assert not [finding for finding in findings if finding.level == "problem"]
    assert any(finding.what == "steps" for finding in findings)

"""`llava_mod`: the mimic is `token_kd`; the preference against loops, published numbers, and its values at equality."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from written_out import rows_of

from cmapkd.config import ConfigError, load_config
from cmapkd.data.open import open_source
from cmapkd.data.prompting import Prompting
from cmapkd.data.types import BadSampleError
from cmapkd.data.views import View
from cmapkd.methods import StageConfig
from cmapkd.models import FrozenTeacher
from cmapkd.models.token_types import LogitHead
from cmapkd.objectives.sequence import preference_loss, sums_by_sample, target_log_probs
from cmapkd.run.build import prompting_of
from cmapkd.run.config import RunConfig
from helpers import read_lines
from writers import Dialogues, assert_same, batch_of, make_other, make_run, make_task, make_writer, results

PUBLISHED = json.loads((Path(__file__).parent / "fixtures/llava_mod.json").read_text())
FORMS = {"kto_pair": "kto_pair", "dpo": "sigmoid"}
ALONE = {"distill_weight": 0.0}


def log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each answer, by our functions; states are logits behind a head that changes nothing."""
    sample, place = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    head = LogitHead(torch.eye(logits.shape[-1], dtype=logits.dtype))
    found = target_log_probs(logits[sample, place], head, labels[:, 1:][sample, place], chunk=4)
    return sums_by_sample(found, sample, len(labels))


@pytest.mark.parametrize("case", PUBLISHED["cases"], ids=lambda case: f"{case['loss_type']} {case['beta']}")
def test_the_preference_has_the_numbers_of_the_published_code(case: dict[str, Any]) -> None:
    logits = {name: torch.tensor(values, dtype=torch.float64) for name, values in PUBLISHED["logits"].items()}
    labels = {name: torch.tensor(values) for name, values in PUBLISHED["labels"].items()}
    for which, shift in (("chosen", case["shift"]), ("rejected", -case["shift"])):
        sample, place = (labels[which][:, 1:] != -100).nonzero(as_tuple=True)
        logits[f"student_{which}"][sample, place, labels[which][:, 1:][sample, place]] += shift
    student = [logits[f"student_{which}"].requires_grad_() for which in labels]
    found = {name: log_probs(each, labels[name.partition("_")[2]]) for name, each in logits.items()}
    for name, expected in case["log_probs"].items():
        torch.testing.assert_close(found[name], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    ratios = [found[f"student_{which}"] - found[f"teacher_{which}"] for which in labels]
    form: Any = next(ours for ours, theirs in FORMS.items() if theirs == case["loss_type"])
    loss = preference_loss(*ratios, form=form, beta=case["beta"])
    assert loss.item() == pytest.approx(case["value"], rel=1e-12)
    for which, gradient in zip(labels, torch.autograd.grad(loss, student), strict=True):
        torch.testing.assert_close(
            gradient.flatten(0, 1), torch.tensor(case["gradient"][which], dtype=torch.float64), rtol=0, atol=1e-9
        )


def test_a_student_that_is_its_teacher_has_the_values_of_equality() -> None:
    for form, value in (("dpo", math.log(2)), ("kto_pair", 0.5)):
        student = make_writer()
        task = make_task("llava_mod", student=student, teacher=FrozenTeacher(make_writer()), form=form, **ALONE)
        found = results(task)
        assert float(found["term/preference"]) == pytest.approx(value, abs=1e-12)
        assert any(gradient.abs().max() > 0 for name, gradient in found.items() if name.startswith("gradient"))


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_of_the_preference(form: Any) -> None:
    torch.manual_seed(0)
    chosen, rejected = (torch.randn(5, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: preference_loss(a, b, form=form, beta=0.7), (chosen, rejected))
    better = preference_loss(chosen + 1, rejected - 1, form=form, beta=0.7)
    assert better < preference_loss(chosen, rejected, form=form, beta=0.7)


def test_what_the_objectives_refuse() -> None:
    rows = torch.randn(3)
    for given, message in (
        ((rows, rows[:2], "dpo", 0.1), "one log-ratio of each"),
        ((rows, rows, "dpa", 0.1), "no preference 'dpa'"),
        ((rows, rows, "dpo", 0.0), "beta must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            preference_loss(*given[:2], form=given[2], beta=given[3])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="targets have shape"):
        target_log_probs(torch.randn(3, 4), LogitHead(torch.eye(4)), torch.zeros(2, dtype=torch.long))


def written_out(task: Any, batch: Any) -> Tensor:
    """kto_pair in plain loops over materialised logits."""
    ratios: dict[str, list[Tensor]] = {"chosen": [], "rejected": []}
    for which, found in ratios.items():
        answers = {role: each.answers() if which == "chosen" else each.rejected for role, each in batch.inputs.items()}
        inputs = {role: each.with_answers(answers[role]) for role, each in batch.inputs.items()}
        ours = rows_of(task.student, inputs["student"])
        with torch.no_grad():
            theirs = rows_of(task.teacher.model, inputs["teacher"])
        for mine, judged in zip(ours, theirs, strict=True):
            own, other = (
                sum(row.log_softmax(-1)[token] for row, token in zip(*each, strict=True)) for each in (mine, judged)
            )
            found.append(own - other)  # type: ignore[operator, arg-type]
    beta, number = task.config.beta, len(batch)
    good, bad = (sum(ratios[which]) / number for which in ("chosen", "rejected"))
    terms = []
    for chosen, rejected in zip(*ratios.values(), strict=True):
        terms.append(1 - torch.sigmoid(beta * (chosen - bad.clamp(min=0))))  # type: ignore[union-attr]
        terms.append(1 - torch.sigmoid(beta * (good.clamp(min=0) - rejected)))  # type: ignore[union-attr]
    return sum(terms) / len(terms)  # type: ignore[return-value]


@pytest.mark.parametrize("other", [False, True])
def test_the_preference_is_the_sum_written_out(other: bool) -> None:
    """Also where teacher and student have two tokenizers, and in micro-batches."""
    task = make_task("llava_mod", teacher=make_other() if other else None, beta=0.3, **ALONE)
    batch = batch_of(task)
    found, parts = results(task, batch), None
    task.zero_grad()
    parts = results(task, batch, micro_batch=4)
    assert_same(parts, found)
    task.zero_grad()
    loss = written_out(task, batch)
    loss.backward()
    expected = {"term/preference": loss.detach()}
    expected |= {f"gradient/{name}": each.grad for name, each in task.named_parameters() if each.grad is not None}
    assert_same(found, expected)
    assert set(task.measurements) == {"preference/chosen", "preference/rejected", "preference/preferred"}


def test_the_mimic_is_token_kd_on_the_answers_alone() -> None:
    """Which has the numbers of the published `compute_align_loss`: test_names_of_token_kd.py."""
    mimic = make_task("llava_mod", preference_weight=0.0)
    named = make_task("token_kd", answers_weight=0.0)
    assert_same(results(mimic), results(named), 1e-15)
    assert not mimic.config.pair_terms  # type: ignore[attr-defined]
    assert mimic.default_stages == ()


def test_pairs_are_asked_for_where_a_stage_compares_them() -> None:
    for stages, pairs in (
        ([], True),
        ([{"share": 1.0, "terms": ["distillation"]}], False),
        ([{"share": 0.5, "terms": ["distillation"]}, {"share": 0.5, "terms": ["preference"]}], True),
        ([{"share": 1.0}], True),
    ):
        config = load_config(RunConfig, "llava_mod_scenes", [f"training.stages={json.dumps(stages)}"])
        assert prompting_of(config).pairs is pairs, stages
    assert not prompting_of(load_config(RunConfig, "token_kd_scenes")).pairs


def test_answers_change_places_in_a_share_of_the_pairs() -> None:
    """Drawn by sample, whatever the micro-batches: of all, a worse answer is preferred to the good one."""
    method = make_task("llava_mod", form="dpo", exchanged=1.0, **ALONE)
    batch = batch_of(method)
    inputs = {role: each.with_answers(each.rejected) for role, each in batch.inputs.items()}  # type: ignore[attr-defined]
    turned = {
        role: replace(each, rejected=tuple(map(tuple, batch.inputs[role].answers())))  # type: ignore[attr-defined]
        for role, each in inputs.items()
    }
    found = results(method, batch)
    assert_same(found, results(make_task("llava_mod", form="dpo", **ALONE), replace(batch, inputs=turned)))
    half, many = make_task("llava_mod", form="dpo", exchanged=0.5, **ALONE), batch_of(method, range(12))
    chosen = float(results(half, many)["term/preference"])
    half.zero_grad()
    assert float(results(half, many, micro_batch=5)["term/preference"]) == pytest.approx(chosen, abs=1e-12)
    either = [make_task("llava_mod", form="dpo", exchanged=share, **ALONE) for share in (0.0, 1.0)]
    assert chosen not in [pytest.approx(float(results(each, many)["term/preference"])) for each in either]
    with pytest.raises(ConfigError, match=r"leave exchanged \(0.5\) out"):
        make_task("llava_mod", preference_weight=0.0, exchanged=0.5)


def test_stages_mimic_first(tmp_path: Path) -> None:
    task = make_task("llava_mod")
    assert [(stage.name, stage.terms) for stage in task.default_stages] == [
        ("mimic", ("distillation",)),
        ("preference", ("preference",)),
    ]
    stages = [StageConfig(steps=1, terms=stage.terms) for stage in task.default_stages]
    make_run(tmp_path, task, steps=None, stages=stages).run()  # type: ignore[arg-type]
    shown = [{key for key in line if key.startswith("terms/")} for line in read_lines(tmp_path / "metrics.jsonl")]
    assert shown == [{"terms/distillation"}, {"terms/preference"}]


def test_batches_without_worse_answers_are_refused() -> None:
    task = make_task("llava_mod", **ALONE)
    batch = batch_of(task)
    inputs = {role: replace(each, rejected=()) for role, each in batch.inputs.items()}  # type: ignore[type-var]
    with pytest.raises(ValueError, match="no worse answer"):
        task(replace(batch, inputs=inputs))
    with pytest.raises(ConfigError, match="every weight is 0"):
        make_task("llava_mod", preference_weight=0.0, **ALONE)


def test_captions_get_false_texts() -> None:
    scenes = open_source("scenes?length=24&size=32")
    asked = Prompting("captions", pairs=True)
    for index in range(24):
        sample = scenes[index]
        *_, answer = asked.choose(sample, View(caption=index / 24), 0)
        assert answer.text in sample.captions
        assert answer.rejected
        assert answer.rejected not in sample.captions
        assert asked.choose(sample, View(caption=index / 24), 0)[-1] == answer
    assert asked.named((answer,)) != Prompting("captions").named((replace(answer, rejected=""),))
    assert "worse" in asked.describe()
    with pytest.raises(ConfigError, match="which of two answers is better, but none of the first 16 samples of scenes"):
        Prompting("questions", pairs=True).check(scenes)
    with pytest.raises(BadSampleError, match="no worse answer"):
        Prompting("questions", pairs=True).choose(scenes[0], View(), 0)


def test_a_dialogue_carries_its_worse_answer() -> None:
    """Through parts, rows and other answers; a worse answer counts for the longest dialogue."""
    task = make_task("sft")
    batch = batch_of(task).inputs["student"]
    sample, reader = Dialogues()[1], task.student.processor
    assert batch.rejected[1] == tuple(reader.encode_answer(sample.turns[-1].rejected))  # type: ignore[attr-defined]
    assert batch.part(1, 3).rejected == batch.rejected[1:3] == batch.rows([1, 2]).rejected  # type: ignore[attr-defined]
    assert batch.with_answers(batch.rejected).answers() == [list(each) for each in batch.rejected]  # type: ignore[attr-defined]
    long = (sample.turns[0], replace(sample.turns[1], rejected="yes no " * 60))
    with pytest.raises(ValueError, match="more than 96"):
        reader.read(long, [sample.image])

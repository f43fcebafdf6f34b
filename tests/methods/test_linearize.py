"""`linearize`: its three forms against plain loops and published numbers, stages, controls and refusals."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cmapkd.config import ConfigError
from cmapkd.methods import StepInfo
from cmapkd.methods.stages import StageConfig
from cmapkd.models import FrozenTeacher
from cmapkd.models.gated_recurrence import gated_recurrence
from cmapkd.models.linear_vlm import MIXERS
from cmapkd.objectives.layer_errors import error_norms, squared_errors
from cmapkd.objectives.tokens import TokenDivergence
from writers import assert_same, batch_of, make_converted, make_judge, make_seer, make_task, make_writer, results

PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "linearize.json").read_text())
FORMS = ("mmmamba", "infinitevl", "matvlm")


def numbers(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("form", FORMS)
def test_errors_of_layers_are_those_of_published_code(form: str) -> None:
    case = PUBLISHED[form]
    pairs = [
        (numbers(own).requires_grad_(), numbers(their))
        for own, their in zip(case["student"], case["teacher"], strict=True)
    ]
    tables = [tuple(each.transpose(1, 2).flatten(-2) if each.ndim == 4 else each for each in pair) for pair in pairs]
    method: Any = make_task("linearize", form=form)
    calls = {
        number: SimpleNamespace(of=lambda *_, own=own: own, output=their) for number, (own, their) in enumerate(tables)
    }
    texts = SimpleNamespace(mask=torch.ones(tables[0][0].shape[:2], dtype=torch.bool))
    stands_for = SimpleNamespace(  # the method, with the published states in the place of a batch's
        config=method.config,
        inside=method.inside,
        device="cpu",
        numbers=[*calls],
        student=SimpleNamespace(layers=range(len(calls) + ("kept" in case))),  # one of which was not converted
        dialogues=lambda *_: SimpleNamespace(texts=texts),
        _first=SimpleNamespace(reads="teacher"),
    )
    term, _ = type(method)._compared(stands_for, [None] * len(texts.mask), calls)
    loss = method.weights["layers"] * term.total / float(term.number)
    torch.testing.assert_close(loss, numbers(case["loss"]))
    found = torch.autograd.grad(loss, [own for own, _ in pairs])
    torch.testing.assert_close(found, tuple(map(numbers, case["gradients"])))


@pytest.mark.parametrize("form", ["mmmamba", "infinitevl"])
def test_divergences_of_tokens_are_those_of_published_code(form: str) -> None:
    case = PUBLISHED["tokens"]
    own, their = (numbers(case[name]) for name in ("student", "teacher"))
    own.requires_grad_()
    method: Any = make_task("linearize", form=form)
    divergence: TokenDivergence = method.divergence
    loss = divergence(own.flatten(0, 1), their.flatten(0, 1)).sum() / len(own)
    torch.testing.assert_close(loss, numbers(case[form]["loss"]))
    torch.testing.assert_close(torch.autograd.grad(loss, own)[0], numbers(case[form]["gradient"]))


def test_recurrences_are_those_of_published_code() -> None:
    case = {name: numbers(values).transpose(1, 2) for name, values in PUBLISHED["mamba2"].items() if name != "state"}
    values = case["values"].requires_grad_()
    output, state = gated_recurrence(case["queries"], case["keys"], values, case["log_decay"], chunk=4)
    torch.testing.assert_close(output, case["output"])
    torch.testing.assert_close(state, numbers(PUBLISHED["mamba2"]["state"]).mT)
    torch.testing.assert_close(torch.autograd.grad(output.square().sum(), values)[0], case["gradient"])
    delta = PUBLISHED["delta"]
    queries, keys, values, strength = (numbers(delta[name]) for name in ("queries", "keys", "values", "strength"))
    given = queries / math.sqrt(queries.shape[-1]), keys, values
    plain = gated_recurrence(*given, torch.zeros_like(strength), strength=strength, chunk=4)
    torch.testing.assert_close(plain, (numbers(delta["output"]), numbers(delta["state"])))
    gated = delta["gated"]
    found = gated_recurrence(*given, numbers(gated["log_decay"]), strength=strength, chunk=4)
    expected = numbers(gated["output"]), numbers(gated["state"])  # computed in float32
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_errors_have_their_gradients_and_padding_has_none() -> None:
    own, their = (torch.randn(2, 3, 4, dtype=torch.float64) for _ in range(2))
    real = torch.tensor([[True, True, False], [True, True, True]])
    for loss in (squared_errors, error_norms):
        assert torch.autograd.gradcheck(lambda rows, loss=loss: loss(rows, their, real), own.requires_grad_())
    (gradient,) = torch.autograd.grad(squared_errors(own, their, real).sum(), own)
    assert not gradient[0, 2].any()
    same = their.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(error_norms(same, their, real).sum(), same)
    assert not gradient.any()  # and it is no NaN
    with pytest.raises(ValueError, match="states have shapes"):
        squared_errors(own, their[:, :2], real)


def by_hand(method: Any, batch: Any) -> Tensor:
    """The term of layers: each dialogue alone, without padding or hooks, in transformers' own functions."""
    teacher, student, form = method.teacher.model, method.student, method.config.form
    squares, norms, places = [], [], 0
    for item in batch.inputs["teacher"].items():
        inputs = replace(batch.inputs["teacher"], **_alone(item))
        with torch.no_grad():
            whole = teacher.model.model(**teacher.arguments(inputs), output_hidden_states=True)
        length = len(item.ids)
        places += length
        turned = teacher._language.rotary_emb(whole.hidden_states[0], torch.arange(length)[None])
        for number, mixer in student.mixers.items():
            given = whole.hidden_states[number]
            layer = teacher.layers[number]
            if form == "mmmamba":
                seen: list[Tensor] = []
                normed = layer.input_layernorm(given)
                handle = layer.self_attn.o_proj.register_forward_pre_hook(
                    lambda _, rows, seen=seen: seen.append(rows[0])
                )
                layer.self_attn(normed, position_embeddings=turned, attention_mask=None)
                handle.remove()
                error = mixer.mix(normed)[0] - seen[0].detach()
            else:
                own, theirs = (each(given, position_embeddings=turned) for each in (student.layers[number], layer))
                error = own - theirs.detach()
            squares.append(error.square().sum())
            norms.append(error.square().sum().sqrt())
    if form == "matvlm":
        return torch.stack(norms).sum() / len(batch)
    layers = len(student.mixers) if form == "mmmamba" else len(student.layers)
    return torch.stack(squares).sum() / (layers * places * int(teacher.text_levels[0].width))


def _alone(item: Any) -> dict[str, Any]:
    from cmapkd.data.dialogues import join_items

    one = join_items([item], 0)
    return {name: getattr(one, name) for name in ("texts", "answer", "visual", "sequence", "pictures", "extents")}


@pytest.mark.parametrize("form", FORMS)
def test_terms_are_the_sums_written_out(form: str) -> None:
    """Also in micro-batches, whose teacher is asked once; and the log says how much is left of each layer's error."""
    student = make_converted(layers=[1] if form == "infinitevl" else [0, 1], mixer="gated_delta")
    settings: dict[str, Any] = {"form": form, "distill_weight": 0, "answers_weight": 0}
    method: Any = make_task("linearize", student=student, **settings)
    batch = batch_of(method)
    found = results(method, batch)
    assert found.keys() == {"term/layers"} | {key for key in found if key.startswith("gradient/")}
    method.zero_grad()
    expected = by_hand(method, batch)
    torch.testing.assert_close(found["term/layers"], expected.detach(), rtol=1e-6, atol=1e-9)  # norms are of float32
    expected.backward()
    weight = 1 if form == "matvlm" else 1000
    wanted = {
        f"gradient/student.{name}": weight * each.grad
        for name, each in student.named_parameters()
        if each.grad is not None
    }
    learned = {key: value for key, value in found.items() if key.startswith("gradient/")}
    assert_same(learned, wanted, tolerance=1e-5)
    mixers = {f"gradient/student.{name}" for name in student.parts["mixers"] | student.parts["mixer_inputs"]}
    assert mixers <= learned.keys()
    again: Any = make_task("linearize", student=make_converted(layers=student.mixers, mixer="gated_delta"), **settings)
    assert_same(results(again, batch, micro_batch=4), found)
    assert_same({"log": again.begun}, {"log": method.begun})
    with torch.no_grad():
        method.student.mixers[1].gate.weight.mul_(0.5)
    method(batch)
    shares = {key: float(value) for key, value in method.measurements.items()}
    assert shares["left/layers.1"] == pytest.approx(shares["error/layers.1"] / float(method.begun[-1]))
    assert shares["left/layers.1"] != 1
    assert shares["left/worst"] == max(value for key, value in shares.items() if key.startswith("left/layers"))


def test_shuffled_targets_are_another_layer_s() -> None:
    method: Any = make_task("linearize", targets="shuffled", form="infinitevl", distill_weight=0)
    own: Any = make_task("linearize", form="infinitevl", distill_weight=0)
    batch = batch_of(method)
    read = own._ask(batch)
    swapped = {number: replace(read.calls[number], output=read.calls[1 - number].output) for number in (0, 1)}
    expected = own._compared(batch, swapped)[0]
    torch.testing.assert_close(method(batch)["layers"].value, expected.total / expected.number)


def test_stages_are_those_of_the_papers() -> None:
    method: Any = make_task("linearize")
    new, inputs, last = method.default_stages
    parts = method.student.parts
    method.check_stages(method.default_stages)
    assert [stage.share for stage in (new, inputs, last)] == [1 / 3] * 3
    batch, expected = batch_of(method, range(3)), parts["mixers"]
    for stage, terms in ((new, {"layers"}), (inputs, {"layers"}), (last, {"distillation"})):
        method.enter(stage)
        method.zero_grad()
        found = method(batch, StepInfo(1, 9))
        assert set(found) == terms
        assert ("left/worst" in method.measurements) == (terms == {"layers"})
        sum(term.value for term in found.values()).backward()
        if stage is inputs:
            expected = expected | parts["mixer_inputs"]
        assert {name for name, each in method.student.named_parameters() if each.grad is not None} == expected
    first, second = make_task("linearize", form="infinitevl").default_stages
    assert first.train == second.train == ("mixers", "mixer_inputs", "mixer_outputs", "weighting")
    whole = make_task("linearize", form="matvlm", answers_weight=0.5).default_stages
    assert [(stage.share, stage.terms) for stage in whole] == [(1, ("layers", "distillation", "answers"))]
    assert "projector" in whole[0].train
    assert len(make_task("linearize", distill_weight=0).default_stages) == 2
    hot: Any = make_task("linearize", form="infinitevl")
    assert hot.divergence.temperature == 2


def test_teachers_in_half_precision_and_terms_without_layers() -> None:
    student = make_converted().float()
    judge = make_writer(seed=7, layers=2).float()
    exact = results(make_task("linearize", student=student, teacher=FrozenTeacher(judge)))
    judge.bfloat16()
    found = results(make_task("linearize", student=student, teacher=FrozenTeacher(judge)))
    assert float(found["term/layers"]) == pytest.approx(float(exact["term/layers"]), rel=0.05)
    method: Any = make_task(
        "linearize", student=student, teacher=FrozenTeacher(judge), distill_weight=0, answers_weight=1
    )
    method.enter(StageConfig(name="a", share=1.0, terms=("answers",)))
    assert set(method(batch_of(method))) == {"answers"}  # nobody asks the teacher
    assert method.why_whole([StageConfig(name="a", share=1.0, terms=("answers",))]) is None
    assert "leave sharding out" in str(method.why_whole([]))


def test_whatever_learns_of_the_mixers_stands_behind_all_terms() -> None:
    method: Any = make_task("linearize", form="matvlm")
    behind = method.shared_parameters()
    for part in ("mixers", "mixer_inputs"):
        assert {f"{number}" for number in method.numbers} == {
            next(word for word in name.split(".") if word.isdigit())
            for name in behind.keys() & method.student.parts[part]
        }


@pytest.mark.parametrize("name", ["llava_kd", "ola_vlm", "move_kd"])
def test_the_last_stage_of_other_methods_trains_converted_layers(name: str) -> None:
    task = make_task(name, student=make_converted())
    assert {*MIXERS} <= {*task.default_stages[-1].train}
    task.check_stages(task.default_stages)
    assert not {*MIXERS} & {*make_task(name).default_stages[-1].train}


def test_what_does_not_fit_is_refused() -> None:
    for models, settings, message in (
        (
            {"student": make_writer()},
            {},
            "method linearize trains converted layers, and the student .* set student: linear:",
        ),
        (
            {"teacher": make_judge()},
            {},
            r"\(qwen2, 2 of width 16\) .* \(qwen2, 1 of width 24\) .* set student: linear:",
        ),
        ({"teacher": make_seer()}, {}, "needs a teacher that writes"),
        ({"student": make_converted(layers=[1])}, {"targets": "shuffled"}, "needs two converted layers"),
        ({}, {"form": "mamba"}, "form"),
        ({}, {"layers_weight": 0}, "layers_weight"),
        ({}, {"distill_weight": 0, "temperature": 2.0}, "nothing reads temperature"),
        ({}, {"distill_weight": 0, "reduction": "token_mean"}, "nothing reads reduction"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_task("linearize", **models, **settings)
    tokens = [StageConfig(name="a", share=1.0, terms=("distillation",), train=MIXERS)]
    for name, value in (("targets", "shuffled"), ("layers_weight", 5.0)):
        with pytest.raises(ConfigError, match=f"no stage has the term layers, so method.{name} is not read"):
            make_task("linearize", **{name: value}).check_stages(tokens)
    method: Any = make_task("linearize")
    with pytest.raises(ConfigError, match="the term layers trains the student's mixers or mixer_inputs, and nothing"):
        method.check_stages([StageConfig(name="a", share=1.0, train=("mixer_outputs", "projector"))])
    make_task("linearize", form="matvlm").check_stages([StageConfig(name="a", share=1.0, train=("mixer_outputs",))])

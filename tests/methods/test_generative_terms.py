"""Terms of models that write: sums in plain loops over materialised logits, micro-batches, heads cut to real tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from written_out import divergence, reduced, rows_of, taid

from cmapkd.config import ConfigError
from cmapkd.data.dialogues import ChatInput
from cmapkd.data.types import Batch
from cmapkd.methods import StageConfig, StepInfo
from cmapkd.methods.generative import GenerativeMethod
from writers import (
    WRITERS,
    assert_same,
    batch_of,
    loss_of,
    make_judge,
    make_task,
    make_writer,
    results,
)

DIVERGENCES: dict[str, dict[str, Any]] = {
    "forward": {},
    "reverse": {"temperature": 2.0},
    "jsd": {"beta": 0.3, "temperature": 0.7},
    "skew_forward": {"skew": 0.2},
    "skew_reverse": {"skew": 0.3, "temperature": 2.0},
    "tv": {},
}
REDUCTIONS = ("token_mean", "sample_mean", "batch_sum")
TOKEN_KD: dict[str, dict[str, Any]] = {
    **{name: {"divergence": name, **more} for name, more in DIVERGENCES.items()},
    "top 5": {"top_k": 5, "temperature": 2.0},
    "reverse, top 5": {"divergence": "reverse", "top_k": 5},
    **{reduction: {"reduction": reduction, "answers_weight": 0.3} for reduction in REDUCTIONS[1:]},
    "distillation alone": {"answers_weight": 0.0},
    "answers alone": {"distill_weight": 0.0},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # name: (method, settings)
    **{f"sft, {reduction}": ("sft", {"reduction": reduction}) for reduction in REDUCTIONS},
    **{f"token_kd, {name}": ("token_kd", settings) for name, settings in TOKEN_KD.items()},
    "taid": ("taid", {"start": 0.3, "answers_weight": 0.5}),
    "taid, sample_mean": ("taid", {"reduction": "sample_mean"}),
}


def written_out(method: GenerativeMethod, batch: Batch, common: int | None = None) -> dict[str, Tensor]:
    """Terms by name, of materialised logits."""
    settings: dict[str, Any] = method.config.model_dump()
    settings = {name: value for name, value in settings.items() if value is not None}
    student = rows_of(method.student, batch.inputs["student"])
    reduction = settings["reduction"]
    ce = [[-row.log_softmax(-1)[token] for row, token in zip(*each, strict=True)] for each in student]
    terms = {"answers": reduced(ce, reduction)}
    if method.teacher is not None:
        with torch.no_grad():
            teacher = rows_of(method.teacher.model, batch.inputs["teacher"], common)
        assert [targets for _, targets in teacher] == [targets for _, targets in student]
        one = taid if settings["name"] == "taid" else divergence
        kd = [
            [one(ours[:common], theirs, settings) for ours, theirs in zip(mine[0], judged[0], strict=True)]
            for mine, judged in zip(student, teacher, strict=True)
        ]
        terms["distillation"] = reduced(kd, reduction)
    return {name: terms[name] for name in method.term_names}


def assert_written_out(method: GenerativeMethod, common: int | None = None) -> None:
    batch = batch_of(method)
    found = results(method, batch)
    method.zero_grad()
    terms = written_out(method, batch, common)
    sum(method.weights[name] * value for name, value in terms.items()).backward()  # type: ignore[union-attr]
    expected = {f"term/{name}": value.detach() for name, value in terms.items()}
    expected |= {f"gradient/{name}": p.grad for name, p in method.named_parameters() if p.grad is not None}
    assert any("vision" in key for key in expected)
    assert_same(found, expected)


@pytest.mark.parametrize("name", CASES)
def test_terms_and_gradients_are_the_sums_written_out(name: str) -> None:
    kind, settings = CASES[name]
    assert_written_out(make_task(kind, **settings))


@pytest.mark.parametrize("micro_batch", [1, 4, 5])
@pytest.mark.parametrize(
    "name", ["sft, token_mean", "token_kd, jsd", "token_kd, sample_mean", "token_kd, top 5", "taid"]
)
def test_micro_batches_are_the_batch(name: str, micro_batch: int) -> None:
    kind, settings = CASES[name]
    whole, parts = (results(make_task(kind, **settings), micro_batch=size) for size in (None, micro_batch))
    assert_same(parts, whole)


def test_all_tokens_of_a_teacher_are_no_fewer_than_it_has() -> None:
    """Live top-k is the full divergence where k is the number of tokens, and where more are asked for."""
    size = make_writer().vocabulary.size
    whole = results(make_task("token_kd", divergence="jsd"))
    for k in (size, 10 * size):
        assert_same(results(make_task("token_kd", divergence="jsd", top_k=k)), whole)


def test_padded_rows_of_the_heads_never_count() -> None:
    """Whatever stands in them, terms and the other gradients stay, and they learn nothing."""
    found = []
    for value in (0.0, 50.0):
        method = make_task("token_kd", divergence="reverse", student=make_writer(rows=6))
        assert method.teacher is not None
        size = method.student.vocabulary.size
        for model in (method.student, method.teacher.model):
            assert len(model.model.lm_head.weight) > size
            with torch.no_grad():
                model.model.lm_head.weight[size:] = value
        found.append(results(method))
        heads = [grad for key, grad in found[-1].items() if len(grad.shape) == 2 and len(grad) > size]
        assert heads
        assert not any(grad[size:].any() for grad in heads)
    assert_same(*found)


@pytest.mark.parametrize(("ours", "theirs"), [(3, 0), (0, 4), (3, 4)])
def test_tokens_that_one_model_has_are_left_out_of_the_divergence(ours: int, theirs: int) -> None:
    """They stay in the student's own cross-entropy, or it would write them unpunished."""
    student, judge = make_writer(extra=ours), make_judge(extra=theirs)
    method = make_task("token_kd", student=student, teacher=judge, divergence="jsd")
    common = min(student.vocabulary.size, judge.model.vocabulary.size)
    assert method.num_tokens == common
    assert_written_out(method, common)
    parts, whole = (
        results(make_task("token_kd", student=make_writer(extra=ours), teacher=judge), micro_batch=size)
        for size in (4, None)
    )
    assert_same(parts, whole)


@pytest.mark.parametrize("kind", ["token_kd", "taid"])
def test_another_vocabulary_is_refused(kind: str) -> None:
    other = make_judge(vocab_size=310)
    pieces = other.model.vocabulary.pieces
    other.model.vocabulary = replace(
        other.model.vocabulary, digest="other", pieces=(*pieces[:270], "zebra", *pieces[271:])
    )
    with pytest.raises(ConfigError, match=r"different tokenizers: 1 of their first \d+ tokens differ"):
        make_task(kind, teacher=other)


def test_answers_of_other_lengths_are_refused() -> None:
    method = make_task("token_kd")
    batch = batch_of(method)
    theirs = batch.inputs["teacher"]
    assert isinstance(theirs, ChatInput)
    shorter = theirs.with_answers([answer[:-1] for answer in theirs.answers()])
    batch = replace(batch, inputs={**batch.inputs, "teacher": shorter})
    with pytest.raises(ValueError, match=r"have \d+ tokens of the student and \d+ of the teacher"):
        method(batch)


def test_student_and_teacher_of_other_prompts_line_up() -> None:
    """Their pictures have other numbers of visual tokens; the teacher's template has another system prompt, too."""
    method = make_task("token_kd")
    assert method.teacher is not None
    native = method.teacher.model.processor.native
    native.chat_template = "be brief. " + native.chat_template
    batch = batch_of(method)
    lengths = [batch.inputs[role].texts.mask.sum(-1) for role in ("student", "teacher")]
    assert (lengths[0] < lengths[1]).all()
    assert_written_out(method)


# ------------------------------------------------------------------------------------------------ what is asked for


def test_a_teacher_is_asked_only_for_terms_that_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    for name, settings, terms in (
        ("token_kd", {"distill_weight": 0.0}, None),
        ("token_kd", {}, ("answers",)),
        ("taid", {"answers_weight": 1.0}, ("answers",)),
        ("token_kd", {}, ("distillation",)),
        ("token_kd", {}, None),
    ):
        method = make_task(name, **settings)
        monkeypatch.setattr(
            method, "read_teacher", lambda part, read=method.read_teacher: asked.append(0) or read(part)
        )
        if terms is not None:
            method.enter(StageConfig(name="a", steps=1, terms=terms))
        found, before = method(batch_of(method)), len(asked)
        assert tuple(found) == (terms or method.term_names)
        loss_of(found).backward()
        assert len(asked) == before
    assert len(asked) == 2
    alone = make_task("token_kd")
    alone.enter(StageConfig(name="a", steps=1, terms=("answers",)))
    assert_same(results(alone), results(make_task("sft")))


def test_in_micro_batches_a_teacher_answers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    method, asked = make_task("token_kd"), []
    monkeypatch.setattr(
        method, "read_teacher", lambda part, read=method.read_teacher: asked.append(len(part)) or read(part)
    )
    results(method, micro_batch=4)
    assert asked == [4, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "sampled_reverse"}, "tokens that the student has drawn: set on_policy"),
        ({"divergence": "sampled_reverse", "on_policy": 0.0}, "set on_policy"),
        ({"divergence": "sampled_reverse", "on_policy": 0.5, "top_k": 4}, "leave top_k out"),
        ({"beta": 0.3}, "beta is read by divergence jsd alone"),
        ({"divergence": "reverse", "skew": 0.3}, "skew is read by divergence skew_forward and skew_reverse alone"),
        ({"on_policy": True}, "on_policy"),
        ({"on_policy": {"share": 1.5}}, "on_policy.share"),
        ({"reduction": "mean"}, "reduction"),
        ({"temperature": 0.0}, "temperature"),
        ({"several_positives": True}, "leave several_positives out"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_task("token_kd", **settings)


def test_a_target_that_moves_away_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"start is 0\.9 and end 0\.5"):
        make_task("taid", start=0.9, end=0.5)


@pytest.mark.parametrize("name", WRITERS)
def test_autocast_is_near(name: str) -> None:
    exact = results(make_task(name))
    method = make_task(name)
    method.float()
    if method.teacher is not None:
        method.teacher.model.float()
    with torch.autocast("cpu", torch.bfloat16):
        terms = method(batch_of(method))
    loss_of(terms).backward()
    for key, term in terms.items():
        assert term.value.dtype == torch.float32
        assert float(term.value.detach()) == pytest.approx(float(exact[f"term/{key}"]), rel=0.03, abs=0.01)
    grads = {f"gradient/{n}": p.grad.double() for n, p in method.named_parameters() if p.grad is not None}
    away = math.sqrt(sum(float((grads[key] - exact[key]).square().sum()) for key in grads))
    assert away < 0.1 * math.sqrt(sum(float(exact[key].square().sum()) for key in grads))


# ------------------------------------------------------------------------------------------------ TAID


def test_taid_moves_by_its_loss_over_all_tokens() -> None:
    """The loss of a step is the cross-entropy with the target; the first step only stores it."""
    method = make_task("taid", start=0.2, rate=0.5, momentum=0.5)
    t, before, momentum = 0.2, None, 0.0
    for step in range(4):
        found = method(batch_of(method, range(step, step + 5)), StepInfo(step, 100))
        loss = float(found["distillation"].value.detach())
        assert float(method.measurements["taid/t"]) == pytest.approx(t, rel=1e-12)
        if before is not None:
            momentum = 0.5 * momentum + 0.5 * (before - loss) / (before + 1e-15)
            faster = t + 0.5 / (1 + math.exp(-momentum)) * (1 - t)
            t = min(1.0, max(0.2 + 0.8 * step / 100, faster))
        before = loss
        assert float(method.place) == pytest.approx(t, rel=1e-12)
        assert float(method.before) == pytest.approx(loss, rel=1e-12)
        assert float(method.momentum) == pytest.approx(momentum, rel=1e-9, abs=1e-15)


def test_a_batch_without_answers_leaves_the_target_of_taid_where_it_is() -> None:
    method = make_task("taid", rate=0.5)
    for step in range(2):
        method(batch_of(method, range(step, step + 5)), StepInfo(step, 100))
    before = (float(method.place), float(method.before), float(method.momentum))
    batch = batch_of(method)
    silent = {
        role: replace(inputs, answer=torch.zeros_like(inputs.answer))  # type: ignore[type-var]
        for role, inputs in batch.inputs.items()
    }
    method(replace(batch, inputs=silent), StepInfo(2, 100))
    assert (float(method.place), float(method.before), float(method.momentum)) == before


def test_taid_without_adaption_goes_straight_and_stays_while_it_does_not_train() -> None:
    method = make_task("taid", start=0.2, end=0.8, adaptive=False)
    for step in range(4):
        method(batch_of(method), StepInfo(step, 4))
        assert float(method.place) == pytest.approx(0.2 + 0.6 * step / 4)
    method.eval()
    with torch.no_grad():
        method(batch_of(method), StepInfo(0, 4))
    assert float(method.place) == pytest.approx(0.65)


def test_the_ends_of_taid_are_the_student_itself_and_the_teacher() -> None:
    """At 0 the gradient is zero, because the target is the student; at 1 it is that of the forward divergence."""
    still = results(make_task("taid", start=0.0, end=1.0))
    assert max(float(value.abs().max()) for key, value in still.items() if key.startswith("gradient/")) < 1e-12
    there = results(make_task("taid", start=1.0))
    forward = results(make_task("token_kd", answers_weight=0.0))
    assert_same(
        {key: value for key, value in there.items() if key.startswith("gradient/")},
        {key: value for key, value in forward.items() if key.startswith("gradient/")},
    )

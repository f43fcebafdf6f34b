"""The student's own answers: functions of seed, step and sample alone; what is learned of them, and what is counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from written_out import divergence, reduced, rows_of

from cmapkd.config import ConfigError
from cmapkd.data.dialogues import ChatInput, Turn, join_items
from cmapkd.data.types import Batch
from cmapkd.methods import StepInfo
from cmapkd.methods.generative import GenerativeMethod
from cmapkd.methods.rollouts import PASSED, ROLLED
from writers import assert_same, batch_of, loss_of, make_judge, make_task, make_writer

SHORT = {"share": 0.5, "max_new_tokens": 6, "temperature": 1.5}
STEP = StepInfo(3, 10, seed=11)


def on_policy(**settings: Any) -> GenerativeMethod:
    settings = {"on_policy": SHORT, **settings}
    return make_task("token_kd", **settings)


def rolled(method: GenerativeMethod, which: Sequence[int], step: StepInfo = STEP) -> dict[str, tuple[bool, list[int]]]:
    """Of each sample, whether its answer is the student's own, and its tokens; the same for both models."""
    method.step = step
    batch = method._rolled_out(batch_of(method, which))
    answers = [batch.inputs[role].answers() for role in ("student", "teacher")]  # type: ignore[attr-defined]
    assert answers[0] == answers[1]
    return {
        sample: (bool(own), answer)
        for sample, own, answer in zip(batch.ids, batch.extra[ROLLED], answers[0], strict=True)
    }


@pytest.fixture(scope="module")
def whole() -> dict[str, tuple[bool, list[int]]]:
    return rolled(on_policy(), range(8))


def test_neither_order_nor_batch_nor_micro_batches_change_them(whole: dict[str, Any]) -> None:
    assert 0 < sum(own for own, _ in whole.values()) < 8
    assert rolled(on_policy(), [5, 7, 6, 4, 3, 2, 1, 0]) == whole
    assert rolled(on_policy(), range(4)) | rolled(on_policy(), range(4, 8)) == whole  # as two processes would
    for size in (1, 3):
        method = on_policy()
        method.micro_batch = size
        assert rolled(method, range(8)) == whole
    method = on_policy()
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert rolled(method, range(8)) == whole
    assert torch.equal(torch.get_rng_state(), before)


def test_seed_and_step_change_them(whole: dict[str, Any]) -> None:
    for step in (replace(STEP, step=4), replace(STEP, seed=12)):
        other = rolled(on_policy(on_policy={**SHORT, "share": 1.0}), range(8), step)
        assert all(own for own, _ in other.values())
        same = [answer == other[sample][1] for sample, (own, answer) in whole.items() if own]
        assert not all(same)


def test_coins_fall_as_often_as_they_shall() -> None:
    few, many = (rolled(on_policy(on_policy={**SHORT, "share": share}), range(8)) for share in (0.3, 0.8))
    own = [{sample for sample, (is_own, _) in found.items() if is_own} for found in (few, many)]
    assert own[0] < own[1]  # one coin a sample: a larger share adds some


def test_answers_of_the_data_stay_where_the_coin_says_so(whole: dict[str, Any]) -> None:
    method = on_policy()
    batch = batch_of(method, range(8))
    given = batch.inputs["student"].answers()  # type: ignore[attr-defined]
    for answer, (own, now) in zip(given, whole.values(), strict=True):
        assert own or answer == now
    method.eval()
    method.step = STEP
    assert method._rolled_out(batch) is batch  # nothing is drawn while it does not train
    none = on_policy(on_policy=0.0)
    assert none._rolled_out(batch).inputs == batch.inputs


def test_unanswered_questions_always_have_answers_of_the_students_own(whole: dict[str, Any]) -> None:
    """Whatever the share is; and the placeholder that stands for their answer is never learned."""
    for share in (0.0, 0.5):
        method = on_policy(on_policy={**SHORT, "share": share})
        method.step = STEP
        batch = unanswered(batch_of(method, range(8)), (1, 4, 6))
        seen = method._rolled_out(batch)
        coins = [share > 0 and own for own, _ in whole.values()]
        assert seen.extra[ROLLED].tolist() == [place in (1, 4, 6) or coin for place, coin in enumerate(coins)]
        answers = seen.inputs["student"].answers()  # type: ignore[attr-defined]
        for place, (own, answer) in enumerate(whole.values()):
            assert answers[place] == answer or not (own and seen.extra[ROLLED][place])  # the same draws as by a coin
        assert not seen.inputs["student"].given  # type: ignore[attr-defined]
        halves = [method._rolled_out(batch.part(start, start + 4)) for start in (0, 4)]
        assert [answer for half in halves for answer in half.inputs["student"].answers()] == answers  # type: ignore[attr-defined]
        results = results_at(method, batch, micro_batch=3)
        method.zero_grad()
        assert_same(results_at(method, batch), results)


def unanswered(batch: Batch, places: Sequence[int]) -> Batch:
    """The batch without the answers at some places, as a reader gives it."""
    inputs = {}
    for role, given in batch.inputs.items():
        assert isinstance(given, ChatInput)
        items = [replace(item, given=place not in places) for place, item in enumerate(given.items())]
        inputs[role] = join_items(items, given.pad_id)
    return replace(batch, inputs=inputs)


@pytest.mark.parametrize("settings", [{}, {"divergence": "sampled_reverse"}, {"reduction": "sample_mean"}])
def test_own_answers_have_a_divergence_and_no_cross_entropy(settings: dict[str, Any]) -> None:
    method = on_policy(**settings)
    batch = batch_of(method, range(6))
    found = results_at(method, batch)
    method.zero_grad()
    method.step = STEP
    seen = method._rolled_out(batch)
    own = seen.extra[ROLLED].tolist()
    assert 0 < sum(own) < 6
    student = rows_of(method.student, seen.inputs["student"])  # type: ignore[arg-type]
    assert method.teacher is not None
    with torch.no_grad():
        teacher = rows_of(method.teacher.model, seen.inputs["teacher"])  # type: ignore[arg-type]
    ce, kd = [], []
    for mine, (judged, _), is_own in zip(student, teacher, own, strict=True):
        logs = mine[0].log_softmax(-1)
        if not is_own:
            ce.append([-row[token] for row, token in zip(logs, mine[1], strict=True)])
        if "divergence" in settings:
            if is_own:
                log_p = judged.log_softmax(-1)
                gaps = [(ours[y] - p[y]).detach() for ours, p, y in zip(logs, log_p, mine[1], strict=True)]
                kd.append([gap * (1 + o[y] - o[y].detach()) for gap, o, y in zip(gaps, logs, mine[1], strict=True)])
        else:
            kd.append([divergence(ours, theirs, {}) for ours, theirs in zip(mine[0], judged, strict=True)])
    reduction = settings.get("reduction", "token_mean")
    terms = {"answers": reduced(ce, reduction), "distillation": reduced(kd, reduction)}
    sum(terms.values()).backward()  # type: ignore[union-attr]
    expected = {f"term/{name}": value.detach() for name, value in terms.items()}
    expected |= {f"gradient/{n}": p.grad for n, p in method.named_parameters() if p.grad is not None}
    assert_same(found, expected)


def results_at(method: GenerativeMethod, batch: Batch, micro_batch: int | None = None) -> dict[str, torch.Tensor]:
    method.micro_batch = micro_batch
    terms = method(batch, STEP)
    loss_of(terms).backward()
    values = {f"term/{name}": term.value.detach() for name, term in terms.items()}
    return values | {f"gradient/{n}": p.grad for n, p in method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("settings", [{}, {"divergence": "sampled_reverse"}, {"reduction": "sample_mean"}])
def test_micro_batches_are_the_batch(settings: dict[str, Any]) -> None:
    whole, parts = (
        results_at(method, batch_of(method), size)
        for size, method in ((None, on_policy(**settings)), (4, on_policy(**settings)))
    )
    assert_same(parts, whole)


def test_what_is_logged_counts_unfinished_answers() -> None:
    method = on_policy(on_policy={**SHORT, "share": 1.0, "max_new_tokens": 2})
    batch = batch_of(method, range(6))
    method(batch, STEP)
    answers = [answer for _, answer in rolled(method, range(6)).values()]
    ended = [answer[-1] in method.student.vocabulary.end_ids for answer in answers]
    measured = {key.removeprefix("rollouts/"): float(value) for key, value in method.measurements.items()}
    assert measured["share"] == 1
    assert measured["tokens"] == pytest.approx(sum(map(len, answers)) / 6)
    assert measured["unfinished"] == pytest.approx(1 - sum(ended) / 6)
    assert not all(ended)
    assert measured["seconds"] > 0


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_no_dialogue_outgrows_what_a_reader_takes(who: str) -> None:
    """Answers are those without limit, cut where the dialogue is as long as it may be; cut ones are unfinished."""
    free, method = (on_policy(on_policy={**SHORT, "share": 1.0, "max_new_tokens": 12}) for _ in range(2))
    whole, batch = rolled(free, range(6)), batch_of(method, range(6))
    given: Any = batch.inputs[who]
    prompts = given.prompts().texts.mask.sum(1).tolist()
    most = max(prompts) + 2
    batch = replace(batch, inputs={**batch.inputs, who: replace(given, max_tokens=most)})
    method.step = STEP
    seen: Any = method._rolled_out(batch).inputs
    expected = [answer[: most - length] for (_, answer), length in zip(whole.values(), prompts, strict=True)]
    assert expected != [answer for _, answer in whole.values()]
    assert seen["student"].answers() == seen["teacher"].answers() == expected
    assert int(seen[who].texts.mask.sum(1).max()) == most
    assert seen[who].max_tokens == most
    ended = [answer[-1] in method.student.vocabulary.end_ids for answer in expected]
    assert float(method.measurements["rollouts/unfinished"]) == pytest.approx(1 - sum(ended) / 6)


def test_answers_end_with_their_end_token_which_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    method = on_policy(on_policy={**SHORT, "share": 1.0})
    end = method.student.vocabulary.end_ids[0]
    monkeypatch.setattr(method.student, "generate", lambda inputs, _how, keys: [[end]] * len(inputs))
    found = results_at(method, batch_of(method, range(3)))
    assert float(found["term/answers"]) == 0  # none is the data's
    assert float(found["term/distillation"]) > 0
    assert float(method.measurements["rollouts/unfinished"]) == 0


def test_they_are_written_in_half_precision_too() -> None:
    method = on_policy(on_policy={**SHORT, "share": 1.0})
    method.float()
    method.teachers["teacher"].model.float()
    found = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            terms = method(batch_of(method), STEP)
        loss_of(terms).backward()
        found.append({name: term.value.detach() for name, term in terms.items()})
    assert float(found[0]["distillation"]) > 0
    assert_same(found[1], found[0], 1e-12)


@pytest.mark.parametrize("size", [None, 2])
def test_empty_answers_count_zero_and_leave_a_graph(size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    method = on_policy(on_policy={**SHORT, "share": 1.0})
    monkeypatch.setattr(method.student, "generate", lambda inputs, _how, keys: [[] for _ in keys])
    found = results_at(method, batch_of(method, range(4)), size)
    assert float(found["term/answers"]) == float(found["term/distillation"]) == 0
    gradients = [value for key, value in found.items() if key.startswith("gradient/")]
    assert gradients
    assert not any(gradient.any() for gradient in gradients)
    assert float(method.measurements["rollouts/unfinished"]) == 1


def test_tokens_that_the_teacher_does_not_have_are_not_drawn() -> None:
    """Else it would read another token, or none."""
    student = make_writer(extra=3)
    with torch.no_grad():  # by far the likeliest
        student.model.lm_head.weight[-8:-5] *= 0
        student.model.lm_head.weight[-8:-5] += 40 * torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    method = make_task("token_kd", student=student, on_policy={**SHORT, "share": 1.0})
    common = method.num_tokens
    assert common is not None
    free = student.generate(batch_of(method).inputs["student"], method.on_policy.decoding, keys=range(6))
    assert any(token >= common for answer in free for token in answer)
    assert all(token < common for _, answer in rolled(method, range(6)).values() for token in answer)
    assert loss_of(method(batch_of(method), STEP)).isfinite()


def test_neither_model_s_placeholder_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = make_judge()
    monkeypatch.setattr(judge.model, "vocabulary", replace(judge.model.vocabulary, image_id=70))
    method, asked = make_task("token_kd", teacher=judge, on_policy={**SHORT, "share": 1.0}), []
    generate = method.student.generate
    monkeypatch.setattr(method.student, "generate", lambda i, how, k: asked.append(how.never) or generate(i, how, k))
    rolled(method, range(2))
    assert asked == [(70,)]


def test_models_that_read_one_input_share_what_is_drawn() -> None:
    """A teacher with the student's own processor is given the very same tensors."""
    method = on_policy(teacher=make_judge(seed=3, image_size=16, width=16))
    batch = batch_of(method, range(4))
    batch = replace(batch, inputs={"student": batch.inputs["student"], "teacher": batch.inputs["student"]})
    method.step = STEP
    seen = method._rolled_out(batch)
    assert seen.inputs["teacher"] is seen.inputs["student"]
    assert isinstance(seen.inputs["student"], ChatInput)


def test_of_a_dialogue_with_two_answers_an_own_last_one_is_learned_alone() -> None:
    method = on_policy(on_policy={**SHORT, "share": 1.0})
    asked, said = Turn("user", "How many squares?"), Turn("assistant", "2")
    inputs = {}
    for role, model in (("student", method.student), ("teacher", method.teachers["teacher"].model)):
        processor: Any = model.processor  # type: ignore[union-attr]
        inputs[role] = join_items([processor.read((asked, said, asked, said), [])], processor.pad_id)
    batch = Batch(("a",), inputs, ("2",))
    method.step = STEP
    seen = method._rolled_out(batch)
    for role in ("student", "teacher"):
        now: Any = seen.inputs[role]
        assert inputs[role].answer.sum() > inputs[role].answers()[0].__len__()
        assert int(now.answer.sum()) == len(now.answers()[0])
        earlier = inputs[role].answer[0].nonzero()[0]
        assert now.texts.ids[0, : earlier + 1].tolist() == inputs[role].texts.ids[0, : earlier + 1].tolist()
    assert float(loss_of(method(batch, STEP)).detach()) > 0


# ------------------------------------------------------------------------------------------------ gate


def right_batch(method: GenerativeMethod) -> Batch:
    """A batch in which the data's answers at places 0 and 3 are those that the student will write itself."""
    method.step = STEP
    batch = batch_of(method, range(6))
    written = method._rolled_out(batch)
    inputs = {}
    for role, given in batch.inputs.items():
        assert isinstance(given, ChatInput)
        items, own = given.items(), written.inputs[role]
        for place in (0, 3):
            items[place] = own.items()[place]  # type: ignore[attr-defined]
        inputs[role] = join_items(items, given.pad_id)
    return replace(batch, inputs=inputs)


@pytest.mark.parametrize("divergence", ["jsd", "sampled_reverse"])
def test_a_gate_lets_right_answers_pass_alone(divergence: str) -> None:
    """The loss is that of the samples that pass, whatever else is in the batch; in micro-batches, too."""
    policy = {"share": 1.0, "max_new_tokens": 6, "temperature": 1.5, "gate": "right"}
    method = on_policy(on_policy=policy, divergence=divergence)
    batch = right_batch(method)
    found = results_at(method, batch)
    assert method._rolled_out(batch).extra[PASSED].tolist() == [True, False, False, True, False, False]
    assert float(method.measurements["rollouts/right"]) == pytest.approx(2 / 6)
    method.zero_grad()
    assert_same(results_at(method, batch, micro_batch=4), found)
    open_ = on_policy(on_policy={**policy, "gate": None}, divergence=divergence)
    open_.load_state_dict(method.state_dict())
    inputs = {role: each.rows([0, 3]) for role, each in batch.inputs.items()}  # type: ignore[attr-defined]
    two = Batch((batch.ids[0], batch.ids[3]), inputs, ("", ""))
    assert_same(found, results_at(open_, two))
    method.zero_grad()
    wrong = results_at(method, batch_of(method, [1, 2]))
    assert float(wrong["term/distillation"]) == 0  # nobody passes: no loss, and no NaN
    assert all(not gradient.any() for name, gradient in wrong.items() if name.startswith("gradient"))


def test_a_gate_by_chance_is_a_coin_of_each_sample() -> None:
    policy = {"share": 1.0, "max_new_tokens": 3, "gate": 0.4}
    method = on_policy(on_policy=policy)
    method.step = STEP
    whole = method._rolled_out(batch_of(method, range(8))).extra[PASSED].tolist()
    assert whole == method._rolled_out(batch_of(method, range(4))).extra[PASSED].tolist() + (
        method._rolled_out(batch_of(method, range(4, 8))).extra[PASSED].tolist()
    )
    assert 0 < sum(whole) < 8
    for given in ({"gate": 1.5}, {"gate": "wrong"}):
        with pytest.raises(ConfigError, match="gate"):
            on_policy(on_policy={**policy, **given})

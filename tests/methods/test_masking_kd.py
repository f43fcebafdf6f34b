"""`masking_kd`: what is hidden, against published numbers and loops; the masked student by a mask made by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from written_out import divergence, kl, rows_of

from cmapkd.config import ConfigError
from cmapkd.methods import StepInfo
from cmapkd.models.tap_attention import MEAN
from cmapkd.models.token_types import TokenNeeds
from cmapkd.objectives.hidden_prefix import as_many, hidden_keys, hidden_shares
from cmapkd.objectives.tokens import TokenDivergence
from writers import assert_same, batch_of, make_task, results

PUBLISHED = json.loads((Path(__file__).parent / "fixtures/masking_kd.json").read_text())
USUAL = {"budget": 0.3, "fallback": 0.1, "low": 0.1}


@pytest.mark.parametrize("case", PUBLISHED["cases"], ids=lambda case: f"{case['valid']} tokens")
def test_what_is_hidden_is_that_of_the_published_code(case: dict[str, Any]) -> None:
    student, teacher, attention = (torch.tensor(case[name]) for name in ("student", "teacher", "attention"))
    distances = TokenDivergence("reverse", temperature=2.0)(student, teacher)
    shares = hidden_shares(distances, torch.zeros(len(student), dtype=torch.long), 1, least=0.3, most=0.5, scale=1.0)
    torch.testing.assert_close(shares, torch.tensor(case["tau"]), rtol=0, atol=1e-5)
    places, queries = torch.arange(attention.shape[1]), torch.arange(case["prompt"], case["valid"])
    eligible = (places >= case["prompt"]) & (places < queries[:, None] - 1)
    found = hidden_keys(attention, eligible, shares, **USUAL)
    assert [row.nonzero().flatten().tolist() for row in found] == case["hidden"]


def written_keys(
    attention: list[float], keys: list[int], share: float, budget: float, fallback: float, low: float
) -> set[int]:
    """Of one query, in a loop."""
    most, whole = math.floor(len(keys) * budget + 1e-6), sum(attention[key] for key in keys)
    falling = sorted(keys, key=lambda key: -attention[key])
    if whole < low:
        return set(falling[: min(max(1, math.floor(len(keys) * fallback + 1e-6)), most)])
    chosen: list[int] = []
    for key in falling[:most]:
        chosen.append(key)
        if sum(attention[each] for each in chosen) >= share * whole:
            break
    return set(chosen)


def test_hidden_keys_are_those_of_a_loop() -> None:
    torch.manual_seed(0)
    attention, eligible = torch.rand(40, 12).softmax(-1).double(), torch.rand(40, 12) < 0.6
    attention[:5] *= 0.01  # hardly anything
    shares = torch.rand(40).double()
    for settings in (USUAL, {"budget": 0.9, "fallback": 0.5, "low": 0.02}):
        found = hidden_keys(attention, eligible, shares, **settings)
        for row, keys, share, hidden in zip(attention, eligible, shares, found, strict=True):
            expected = written_keys(row.tolist(), keys.nonzero().flatten().tolist(), float(share), **settings)
            assert set(hidden.nonzero().flatten().tolist()) == expected
        others = as_many(found, eligible, torch.rand(40, 12))
        assert torch.equal(others.sum(-1), found.sum(-1))
        assert not (others & ~eligible).any()
    shares = hidden_shares(torch.tensor([1e-3, 1.0, 5.0]), torch.tensor([0, 0, 1]), 2, least=0.3, most=0.5, scale=1.0)
    assert shares.tolist() == pytest.approx([0.3 + 0.2 / (1 + 1000**-0.5), 0.3 + 0.2 / (1 + 1000**0.5), 0.4], abs=1e-4)


def hidden_by_hand(task: Any, batch: Any, place: int) -> set[tuple[int, int]]:
    """Queries and keys of one dialogue, from the library's eager attention and logits."""
    alone, config = batch.inputs["student"].rows([place]), task.config
    model = task.student.model
    before = model.model.language_model.config._attn_implementation
    model.model.language_model.config._attn_implementation = "eager"
    output = model(**task.student.arguments(alone), output_attentions=True)
    model.model.language_model.config._attn_implementation = before
    attention = torch.stack([layer[0].mean(0) for layer in output.attentions]).mean(0)
    answers = alone.answer[0].nonzero().flatten().tolist()
    own, theirs = (
        rows_of(each, batch.inputs[role].rows([place]))[0][0]
        for each, role in ((task.student, "student"), (task.teacher.model, "teacher"))
    )
    t = config.temperature
    ease = [
        -math.log(t * t * float(kl((q / t).softmax(-1), (p / t).softmax(-1))) + 1e-6)
        for q, p in zip(own, theirs, strict=True)
    ]
    queries = [each - 1 for each in answers]
    inside = [number for number, query in enumerate(queries) if query in answers]
    mean = sum(ease[number] for number in inside) / max(1, len(inside))
    found = set()
    for number in inside:
        share = config.least + (config.most - config.least) / (1 + math.exp(-(ease[number] - mean) / config.scale))
        keys = [key for key in answers if key < queries[number] - 1]
        limits = {name: getattr(config, name) for name in ("budget", "fallback", "low")}
        chosen = written_keys(attention[queries[number]].tolist(), keys, share, **limits)
        found |= {(queries[number], key) for key in chosen}
    return found


def masked_logits(task: Any, batch: Any, place: int, hidden: set[tuple[int, int]]) -> Tensor:
    """The library's own forward pass with a mask of four axes."""
    alone = batch.inputs["student"].rows([place])
    length = alone.texts.ids.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    for query, key in hidden:
        seen[query, key] = False
    mask = torch.zeros(1, 1, length, length, dtype=torch.float64).masked_fill(~seen, -1e300)
    model, arguments = task.student.model, task.student.arguments(alone)
    words = model.get_input_embeddings()(alone.texts.ids)
    if "pixel_values" in arguments:
        pictures = model.model.get_image_features(
            pixel_values=arguments["pixel_values"], return_dict=True
        ).pooler_output
        words = words.masked_scatter(alone.visual[..., None], torch.cat(list(pictures)))
    states = model.model.language_model(inputs_embeds=words, attention_mask=mask).last_hidden_state
    logits = model.lm_head(states)[0, :, : task.student.vocabulary.size]
    return logits[alone.answer[0].nonzero().flatten() - 1]


def test_the_term_is_the_sum_written_out() -> None:
    """Of answers of different lengths, and in micro-batches."""
    settings = {"budget": 0.6, "least": 0.2, "most": 0.7, "low": 0.02}
    task = make_task("masking_kd", **settings).double()
    batch = batch_of(task, range(5))
    found = results(task, batch)
    assert 0.05 < float(task.measurements["hidden"]) < 0.6
    task.zero_grad()
    assert_same(results(task, batch, micro_batch=2), found)
    task.zero_grad()
    with torch.no_grad():
        hidden = [hidden_by_hand(task, batch, place) for place in range(len(batch))]
        theirs = rows_of(task.teacher.model, batch.inputs["teacher"])  # type: ignore[union-attr]
    assert sum(map(len, hidden)) > 10
    values = [
        divergence(q, p, {"divergence": "reverse", "temperature": 2.0})
        for place, (judged, _) in enumerate(theirs)
        for q, p in zip(masked_logits(task, batch, place, hidden[place]), judged, strict=True)
    ]
    value = torch.stack(values).mean()
    value.backward()
    expected = {"term/distillation": value.detach()}
    expected |= {f"gradient/{name}": each.grad for name, each in task.named_parameters() if each.grad is not None}
    assert_same(found, expected, tolerance=1e-7)  # norms of the language model compute in float32


def test_in_a_dialogue_of_several_answers_each_hides_its_own_tokens_alone() -> None:
    settings = {"budget": 1.0, "least": 0.6, "most": 0.9, "low": 0.0}
    task = make_task("masking_kd", **settings).double()
    batch = batch_of(task, range(9))
    inputs = {}
    for role, each in batch.inputs.items():
        answer = each.answer.clone()  # type: ignore[union-attr]
        for row in answer:
            places = row.nonzero().flatten()
            row[places[len(places) // 2]] = False  # a token of the user between two answers
        inputs[role] = replace(each, answer=answer)  # type: ignore[type-var]
    batch = replace(batch, inputs=inputs)
    hidden, _ = task._hidden(batch, task.read_teacher(batch))  # type: ignore[attr-defined]
    answer = inputs["student"].answer  # type: ignore[union-attr]
    number = (answer & ~answer.roll(1, -1)).cumsum(-1)
    found = hidden.nonzero().tolist()
    assert found
    for row, query, key in found:
        assert answer[row, query]
        assert number[row, query] == number[row, key]
    whole = results(task, batch)
    task.zero_grad()
    assert_same(results(task, batch, micro_batch=2), whole)


def test_nothing_hidden_is_token_kd() -> None:
    plain = results(make_task("token_kd", divergence="reverse", temperature=2.0, answers_weight=0.3))
    found = results(make_task("masking_kd", hide="nothing", answers_weight=0.3))
    assert_same(found, plain)


def test_random_keys_are_drawn_by_step_and_sample() -> None:
    task = make_task("masking_kd", hide="random", budget=0.6)
    batch = batch_of(task, range(4))
    task.step = StepInfo(3, 10)
    teacher = task.read_teacher(batch)
    whole, counts = task._hidden(batch, teacher)  # type: ignore[attr-defined]
    part = batch.part(2, 4)
    alone, _ = task._hidden(part, task.read_teacher(part))  # type: ignore[attr-defined]
    assert torch.equal(alone, whole[2:, : alone.shape[1], : alone.shape[2]])
    assert int(whole.sum()) == int(counts[0])
    task.step = StepInfo(4, 10)
    other, again = task._hidden(batch, teacher)  # type: ignore[attr-defined]
    assert torch.equal(again, counts)
    assert not torch.equal(other, whole)


def test_the_mean_of_attention_is_that_of_all_layers_and_heads() -> None:
    task = make_task("masking_kd")
    inputs = batch_of(task, range(3)).inputs["student"]
    features = task.student(inputs, TokenNeeds(attention=(0,), attention_mean=True))
    torch.testing.assert_close(features.attention[MEAN], features.attention[0].mean(1))


def test_what_cannot_be_is_refused() -> None:
    for settings, message in (
        ({"least": 0.6}, r"least is 0.6 and most 0.5"),
        ({"temperature": 0}, "temperature"),
        ({"hide": "all"}, "hide"),
        ({"hide": "nothing", "budget": 0.5, "low": 0.2}, "hide: nothing reads none of budget, low: leave them out"),
        ({"distill_weight": 0}, "distill_weight"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_task("masking_kd", **settings)  # type: ignore[arg-type]
    task = make_task("masking_kd")
    assert "set method.hide=nothing" in str(task.why_not_again(()))
    assert make_task("masking_kd", hide="nothing").why_not_again(()) is None

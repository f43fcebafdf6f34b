"""`ola_vlm`: heads and terms against loops; experts of several kinds, dialogues without pictures, what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from written_out import rows_of

from cmapkd.config import ConfigError
from cmapkd.features.resampler import Resampler
from cmapkd.methods import StageConfig
from cmapkd.objectives.embedding_targets import embedding_contrast, embedding_distance
from writers import assert_same, batch_of, make_judge, make_seer, make_task, make_writer, results

PUBLISHED = json.loads((Path(__file__).parent / "fixtures/ola_vlm.json").read_text())
WITH_TOKENS = {"experts": {"teacher": {"layers": ["layers.0", "layers.1"], "target": 1.0, "weight": 0.7}}}


def test_the_losses_are_the_sums_written_out() -> None:
    torch.manual_seed(0)
    predicted, target = 2 * torch.randn(2, 4, 3, 5, dtype=torch.float64)
    differences = (predicted - target).abs().flatten(1)
    each = [[d * d / 2 if d < 1 else d - 0.5 for d in row] for row in differences.tolist()]
    expected = torch.tensor([sum(row) / len(row) for row in each], dtype=torch.float64)
    torch.testing.assert_close(embedding_distance(predicted, target), expected)
    cosines = [[float(F.cosine_similarity(p.flatten(), t.flatten(), dim=0)) for t in target] for p in predicted]
    nats = [math.log(sum(math.exp(3 * c) for c in row)) - 3 * row[i] for i, row in enumerate(cosines)]
    found = embedding_contrast(predicted, target, logit_scale=3.0)
    torch.testing.assert_close(found, torch.tensor(nats, dtype=torch.float64))
    given = predicted.clone().requires_grad_()
    for loss in (embedding_distance, lambda p, t: embedding_contrast(p, t, logit_scale=3.0)):
        assert torch.autograd.gradcheck(lambda p, loss=loss: loss(p, target), (given,))
    assert float(embedding_distance(target, target).max()) == 0
    nothing = embedding_contrast(torch.ones_like(target), target[:1].expand(4, -1, -1), logit_scale=9.0)
    torch.testing.assert_close(nothing, torch.full_like(nothing, math.log(4)))
    with pytest.raises(ValueError, match="row i of every tensor"):
        embedding_distance(predicted, target[:2])


def as_tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_losses_have_the_numbers_of_the_published_code() -> None:
    case = PUBLISHED["loss"]
    predicted, target = as_tensor(case["predicted"]).requires_grad_(), as_tensor(case["target"])
    log_scale = as_tensor(case["log_scale"]).requires_grad_()
    rows = embedding_contrast(predicted, target, logit_scale=log_scale.exp())
    torch.testing.assert_close(rows, as_tensor(case["rows"]), rtol=0, atol=1e-9)
    distance, contrast = embedding_distance(predicted, target).mean(), case["contrast_weight"] * rows.mean()
    assert (distance.item(), contrast.item()) == pytest.approx((case["distance"], case["contrast"]), abs=1e-9)
    found = torch.autograd.grad(distance + contrast, [predicted, log_scale])
    for gradient, expected in zip(found, (case["gradient"], case["scale_gradient"]), strict=True):
        torch.testing.assert_close(gradient, as_tensor(expected), rtol=0, atol=1e-9)


def test_a_head_has_the_numbers_of_the_published_resampler() -> None:
    case = PUBLISHED["head"]
    head = Resampler(5, 8, queries=3, depth=2, heads=2, head_width=3, factor=2).double()
    names = {"proj_in": "enter", "proj_out": "leave", "norm_out": "norm", "latents": "queries"}
    names |= {"0.norm1": "norm_tokens", "0.norm2": "norm_latents", "0.to_q": "ask", "0.to_kv": "told"}
    names |= {"0.to_out": "join", **{f"1.{number}": f"feed.{number}" for number in range(4)}}
    weights = {}
    for name, values in case["weights"].items():
        start = name[: len("layers.0.")] if name.startswith("layers") else ""
        own, _, kind = name.removeprefix(start).rpartition(".") if name != "latents" else (name, "", "")
        weights[f"{start}{names[own]}.{kind}".rstrip(".")] = as_tensor(values)
    weights["queries"] = weights["queries"][0]
    head.load_state_dict(weights)
    tokens = as_tensor(case["tokens"]).requires_grad_()
    found = head(tokens, torch.ones(2, 4, dtype=torch.bool))
    torch.testing.assert_close(found, as_tensor(case["output"]), rtol=0, atol=1e-9)
    gradients = torch.autograd.grad((found * as_tensor(case["factor"])).sum(), [tokens, head.queries])
    torch.testing.assert_close(gradients[0], as_tensor(case["tokens_gradient"]), rtol=0, atol=1e-9)
    torch.testing.assert_close(gradients[1], as_tensor(case["queries_gradient"])[0], rtol=0, atol=1e-9)
    more = torch.cat([tokens, torch.randn(2, 3, 5, dtype=torch.float64)], dim=1)
    mask = torch.arange(7) < 4
    torch.testing.assert_close(head(more, mask.expand(2, -1)), found)  # what is not read changes nothing


def resampled(head: Resampler, tokens: Tensor) -> Tensor:
    """Of one dialogue, queries by queries of one head each, without a mask."""
    entered, latents = head.enter(tokens), head.queries
    for layer in head.layers:
        asking, told = layer.norm_latents(latents), layer.norm_tokens(entered)  # type: ignore[operator]
        keys, values = layer.told(torch.cat([told, asking])).chunk(2, -1)  # type: ignore[operator]
        queries, size = layer.ask(asking), keys.shape[-1] // layer.heads  # type: ignore[operator]
        parts = []
        for number in range(layer.heads):  # type: ignore[call-overload]
            at = slice(number * size, (number + 1) * size)
            parts.append((queries[:, at] @ keys[:, at].T / math.sqrt(size)).softmax(-1) @ values[:, at])
        latents = latents + layer.join(torch.cat(parts, -1))  # type: ignore[operator]
        latents = latents + layer.feed(latents)  # type: ignore[operator]
    return head.norm(head.leave(latents))


def written_out(task: Any, batch: Any) -> dict[str, Tensor]:
    """Terms of `WITH_TOKENS`, dialogue by dialogue, with states of the library's own forward pass."""
    inputs, student = batch.inputs["student"], task.student
    features = task.teacher.model.encode_image(batch.inputs["teacher"].images, tuple(task.levels.values()))
    level = features.levels[task.levels["teacher"]]
    grid = level.values[:, level.num_prefix :] if level.layout == "tokens" else level.values.flatten(2).transpose(1, 2)
    targets = grid.detach().double()
    distance, contrast, number = torch.zeros(()).double(), torch.zeros(()).double(), 0
    for place in range(len(batch)):
        alone = inputs.rows([place])
        if not alone.visual.any():
            continue
        number += 1
        states = student.model.model(**student.arguments(alone), output_hidden_states=True)
        read = alone.texts.mask[0].clone()
        read[-1] = False  # the last token predicts nothing
        for layer, head in enumerate(task.heads["teacher"]):
            own = states.last_hidden_state if layer == 1 else states.hidden_states[1]
            predicted = resampled(head, own[0, read])
            distance = distance + F.smooth_l1_loss(predicted, targets[place])
            unit = F.normalize(targets.flatten(1), dim=-1)
            cosines = unit @ F.normalize(predicted.flatten(), dim=0)
            scale = task.log_scales["teacher"].exp()
            contrast = contrast + F.cross_entropy((scale * cosines)[None], torch.tensor([place]))
    triples = [pair for rows, tokens in rows_of(student, inputs) for pair in zip(rows, tokens, strict=True)]
    rows, tokens = torch.stack([row for row, _ in triples]), torch.tensor([token for _, token in triples])
    return {
        "answers": F.cross_entropy(rows, tokens),
        "teacher_distance": distance / number,
        "teacher_contrast": contrast / number,
    }


def test_the_terms_are_the_sums_written_out() -> None:
    """Of tokens of an expert, behind two layers; with a dialogue that shows no picture, and in micro-batches."""
    task = make_task("ola_vlm", student=make_writer(layers=2), depth=2, **WITH_TOKENS).double()
    batch = batch_of(task, range(5))
    found = results(task, batch)
    task.zero_grad()
    assert_same(results(task, batch, micro_batch=2), found)
    task.zero_grad()
    terms = written_out(task, batch)
    weights = {"answers": 1.0, "teacher_distance": 0.7, "teacher_contrast": 0.7 * 0.3}
    sum(weights[name] * value for name, value in terms.items()).backward()  # type: ignore[union-attr]
    expected = {f"term/{name}": value.detach() for name, value in terms.items()}
    expected |= {f"gradient/{name}": each.grad for name, each in task.named_parameters() if each.grad is not None}
    assert "gradient/log_scales.teacher" in expected
    assert_same(found, expected, tolerance=1e-7)  # norms of the language model compute in float32


def test_several_experts_have_terms_of_their_own() -> None:
    further = make_seer(dim=20, image_size=16, seed=3, role="depth")
    experts = {"depth": {"weight": 0.2, "layers": [1.0]}, "teacher": {"weight": 0}}
    task = make_task("ola_vlm", more_teachers=[further], experts=experts, contrast_weight=0).double()
    assert {name: weight for name, weight in task.weights.items() if weight} == {"answers": 1.0, "depth_distance": 0.2}
    found = results(task)
    assert found.keys() >= {"term/answers", "term/depth_distance"}
    assert not list(task.log_scales)  # type: ignore[call-overload]
    with_both = make_task("ola_vlm", more_teachers=[further]).double()
    assert len(results(with_both)) > len(found)


def test_a_batch_without_pictures_has_nothing_to_predict() -> None:
    task = make_task("ola_vlm", reads="picture").double()
    found = results(task, batch_of(task, [3, 7]))
    assert float(found["term/teacher_distance"]) == 0
    assert float(found["term/teacher_contrast"]) == 0


def test_shuffled_targets_are_another_picture_s() -> None:
    task = make_task("ola_vlm", targets="shuffled").double()
    batch = batch_of(task, range(4))
    own = make_task("ola_vlm").double()
    every, _ = own._targets([batch], "teacher")  # type: ignore[attr-defined]
    found, _ = task._targets([batch.part(0, 2), batch.part(2, 4)], "teacher")  # type: ignore[attr-defined]
    torch.testing.assert_close(found, every.roll(1, 0))


def test_stages_ask_experts_in_the_first_alone() -> None:
    task = make_task("ola_vlm")
    first, second = task.default_stages
    assert (first.share, first.train) == (0.46, ("projector", "modules", "weighting"))
    assert second.terms == ("answers",)
    task.enter(second)
    assert not task.student_needs.levels
    assert set(task(batch_of(task, range(2)))) == {"answers"}
    assert not make_task("ola_vlm", form="one_stage").default_stages
    task.check_stages([StageConfig(name="a", share=1.0, train=("projector", "modules"))])


def test_what_does_not_fit_is_refused() -> None:
    for settings, message in (
        ({"experts": {"depht": {}}}, r"method.experts names 'depht', and the teachers are teacher"),
        ({"experts": {"teacher": {"weight": 0}}}, "set method: sft"),
        ({"experts": {"teacher": {"weight": 0, "target": 0.5}}}, "has weight 0, so its other settings are not read"),
        ({"experts": {"teacher": {"layers": ["layers.9"]}}}, r"experts.teacher.layers, of .* no text level 'layers.9'"),
        ({"experts": {"teacher": {"target": "blocks.9"}}}, r"no image level 'blocks.9'"),
        ({"answers_weight": 0}, "form: one_stage"),
        ({"contrast_weight": 0, "log_scale": 1}, "contrast_weight is 0, so log_scale is not read"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_task("ola_vlm", **settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"needs a teacher that embeds pictures and texts, and .* writes"):
        make_task("ola_vlm", teacher=make_judge())

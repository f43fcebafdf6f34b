"""`move_kd`: losses and shares against published numbers and loops; attention of a class token, what is refused."""

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
from cmapkd.features.projector import TokenAdapter
from cmapkd.methods import StageConfig
from cmapkd.models.picture_attention import attention_in, looked_at
from cmapkd.objectives.encoder_mixture import encoder_errors, encoder_shares
from writers import assert_same, batch_of, make_seer, make_task, make_writer, results

PUBLISHED = json.loads((Path(__file__).parent / "fixtures/move_kd.json").read_text())


def as_tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    "case", PUBLISHED["cases"], ids=lambda case: f"{case['token_weight']} {case['teacher_weight']}"
)
def test_the_loss_has_the_numbers_of_the_published_code(case: dict[str, Any]) -> None:
    student, anchor, middle = (as_tensor(case[name]) for name in ("student", "anchor", "cls"))
    student.requires_grad_()
    adapters = []
    for weights in case["adapters"]:
        adapter = TokenAdapter((5, 2), (4, 3)).double()
        parameters = (adapter.channels.weight, adapter.channels.bias, adapter.tokens.weight, adapter.tokens.bias)
        for parameter, values in zip(parameters, weights, strict=True):
            parameter.data = as_tensor(values)
        adapters.append(adapter)
    adapted = [adapter(as_tensor(tokens)) for adapter, tokens in zip(adapters, case["others"], strict=True)]
    scores = torch.stack([(each * middle[:, None]).sum(-1).mean(-1) for each in adapted], -1)
    if not case["teacher_weight"]:
        scores = torch.zeros_like(scores)
    shares = encoder_shares(scores, 0.8, scores.detach().softmax(-1).mean(0))
    torch.testing.assert_close(shares, as_tensor(case["shares"]), rtol=0, atol=1e-9)
    weights = as_tensor(case["attention"]).softmax(-1) if case["token_weight"] else None
    losses = torch.stack([encoder_errors(student, each, weights) for each in (anchor, *adapted)], -1)
    value = (shares * losses).sum(-1).mean()
    assert value.item() == pytest.approx(case["value"], abs=1e-9)
    parameters = [parameter for adapter in adapters for parameter in adapter.parameters()]
    for gradient, expected in zip(torch.autograd.grad(value, [student, *parameters]), case["gradients"], strict=True):
        torch.testing.assert_close(gradient, as_tensor(expected), rtol=0, atol=1e-9)


def test_losses_and_shares_are_the_sums_written_out() -> None:
    torch.manual_seed(0)
    student, expert = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    weights = torch.rand(3, 4, dtype=torch.float64).softmax(-1)
    squares = (student - expert).square()
    expected = [
        sum(squares[b, i].mean() for i in range(4)) / 4 + sum(weights[b, i] * squares[b, i].mean() for i in range(4))
        for b in range(3)
    ]
    torch.testing.assert_close(encoder_errors(student, expert, weights), torch.stack(expected))
    given = student.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: encoder_errors(v, expert, weights), (given,))
    scores = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    mean = torch.tensor([0.5, 0.5])
    assert torch.autograd.gradcheck(lambda s: encoder_shares(s, 0.8, mean), (scores,))
    shares = encoder_shares(scores, 0.7, torch.tensor([0.85, 0.15]))  # flattened
    torch.testing.assert_close(shares.sum(-1), torch.ones(3, dtype=torch.float64))
    assert float(shares[:, 1:].detach().max()) < 0.3 / (1 + math.exp(-1))
    with pytest.raises(ValueError, match="an adapter must bring them together"):
        encoder_errors(student, expert[:, :2], None)


def attention(model: Any, images: Tensor, number: int) -> Tensor:
    """What the class token of `tiny`'s block attends to, head by head."""
    block, kept = model.vision.blocks[number], []
    handle = block.register_forward_pre_hook(lambda _module, given: kept.append(given[0]))
    model.encode_image(images)
    handle.remove()
    queries, keys, _ = block.qkv(block.norm_attention(kept[0])).chunk(3, -1)
    size = queries.shape[-1] // block.heads
    maps = []
    for head in range(block.heads):
        at = slice(head * size, (head + 1) * size)
        maps.append((queries[:, :1, at] @ keys[..., at].transpose(1, 2) / size**0.5).softmax(-1))
    return torch.stack(maps).mean(0)[:, 0]


def test_attention_is_read_where_it_is_computed() -> None:
    model = make_seer(depth=2).model
    images = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    with torch.no_grad():
        expected = attention(model, images, 1)
        before = F.scaled_dot_product_attention
        with attention_in(model.image_blocks[1]) as maps:
            model.encode_image(images)
        assert F.scaled_dot_product_attention is before
    found = looked_at(maps, 1, "tiny", by_class=True)
    torch.testing.assert_close(found.double(), expected[:, 1:], rtol=0, atol=1e-6)
    for prefix in (0, 1):  # none, or registers alone
        seen = looked_at(maps, prefix, "tiny", by_class=False)
        torch.testing.assert_close(seen, maps[0][:, :, prefix:, prefix:].mean((1, 2)))
    with pytest.raises(ConfigError, match="calls torch's fused attention 0 times"):
        looked_at([], 1, "tiny", by_class=True)


def written_out(task: Any, batch: Any) -> dict[str, Tensor]:
    """Of two encoders of which the second has an adapter, picture by picture."""
    inputs, losses = batch.inputs["student"], []
    levels = {
        role: teacher.model.encode_image(batch.inputs[role].images, (task.levels[role],)).levels[task.levels[role]]
        for role, teacher in task.teachers.items()
    }
    number = int(task.levels["teacher"].rpartition(".")[2])
    looked = attention(task.teacher.model, batch.inputs["teacher"].images, number)[:, 1:]
    for place in range(len(batch)):
        alone = inputs.rows([place])
        if not alone.visual.any():
            continue
        pixels = alone.pictures["pixel_values"].double()
        own = task.student.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][0]
        first, other = (levels[role].values[place].detach() for role in ("teacher", "other"))
        middle, first = first[0], first[1:]
        grid = first.T.view(1, -1, 3, 3)
        first = F.interpolate(grid, size=(2, 2), mode="bilinear").flatten(2)[0].T
        weights = F.interpolate(looked[place].detach().view(1, 1, 3, 3), size=(2, 2), mode="bilinear").flatten() * 9 / 4
        adapter = task.adapters["other"]
        other = adapter.tokens(F.gelu(adapter.channels(other[1:])).T).T
        errors = [(own - each).square().mean(-1) for each in (first, other)]
        of_each = [each.mean() + (each * weights.softmax(-1)).sum() for each in errors]
        losses.append(0.8 * of_each[0] + 0.2 * of_each[1])
        assert middle.shape == own.shape[-1:]
    pairs = [pair for rows, tokens in rows_of(task.student, inputs) for pair in zip(rows, tokens, strict=True)]
    rows, tokens = torch.stack([row for row, _ in pairs]), torch.tensor([token for _, token in pairs])
    return {"answers": F.cross_entropy(rows, tokens), "distillation": torch.stack(losses).mean()}


def test_the_terms_are_the_sums_written_out() -> None:
    """Of an anchor of the student's width and another grid; with a dialogue that shows no picture, in micro-batches."""
    student, other = make_writer(vision_width=32), make_seer(dim=20, image_size=16, seed=3, role="other")
    task = make_task("move_kd", student=student, teacher=make_seer(depth=2), more_teachers=[other]).double()
    assert task.levels == {"teacher": "blocks.0", "other": "blocks.0"}
    assert list(task.adapters) == ["other"]  # type: ignore[call-overload, arg-type]
    batch = batch_of(task, range(5))
    found = results(task, batch)
    task.zero_grad()
    assert_same(results(task, batch, micro_batch=2), found)
    task.zero_grad()
    terms = written_out(task, batch)
    (terms["answers"] + 0.5 * terms["distillation"]).backward()
    expected = {f"term/{name}": value.detach() for name, value in terms.items()}
    expected |= {f"gradient/{name}": each.grad for name, each in task.named_parameters() if each.grad is not None}
    assert "gradient/adapters.other.tokens.weight" in expected
    assert_same(found, expected, tolerance=1e-6)  # attention is float32


def test_shares_follow_likeness_or_not() -> None:
    others = [make_seer(dim=20, image_size=16, seed=seed, role=role) for seed, role in ((3, "one"), (4, "two"))]
    task = make_task("move_kd", more_teachers=others).double()
    results(task)
    told = {name: float(value) for name, value in task.measurements.items() if name.startswith("share/")}
    assert told["share/teacher"] == pytest.approx(0.8)
    assert told["share/one"] != pytest.approx(told["share/two"], abs=1e-4)
    equal = make_task("move_kd", more_teachers=others, shares="equal", token_weights="equal").double()
    results(equal)
    assert float(equal.measurements["share/one"]) == pytest.approx(0.1)
    alone = make_task("move_kd").double()
    assert set(results(alone, batch_of(alone, [3, 7]))) >= {"term/answers", "term/distillation"}  # no picture is shown
    assert not any(name.startswith("share/") for name in alone.measurements)


def test_stages_and_what_is_refused() -> None:
    task = make_task("move_kd")
    first, second = task.default_stages
    assert first.train == ("vision", "projector", "modules", "weighting")
    assert first.share + second.share == pytest.approx(1)
    assert not make_task("move_kd", form="one_stage").default_stages
    with pytest.raises(ConfigError, match="distillation trains the student's vision"):
        task.check_stages([StageConfig(name="a", share=1.0, train=("projector", "language"))])
    for settings, message in (
        ({"levels": {"clip": 1.0}}, r"method.levels names 'clip', and the teachers are teacher"),
        ({"levels": {"teacher": "blocks.7"}}, r"no image level 'blocks.7'"),
        ({"anchor_share": 1.2}, "anchor_share"),
        ({"anchor_share": 0.6}, "has one encoder, so method.anchor_share is not read: name more in more_teachers"),
        ({"distill_weight": 0}, "distill_weight"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_task("move_kd", **settings)  # type: ignore[arg-type]

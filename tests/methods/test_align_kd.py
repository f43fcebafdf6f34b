"""Align-KD: terms in plain loops, the published functions' numbers, its maps, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from written_out import kl, reduced, rows_of

from cmapkd.config import ConfigError
from cmapkd.data.types import Batch
from cmapkd.features.attention_blocks import heads_of, looked_at, text_to_vision
from cmapkd.features.visual_rows import check_same_texts
from cmapkd.methods.align_kd import AlignKD
from cmapkd.objectives import TokenDivergence, attention_error, focused_distance
from cmapkd.training.recompute import recompute_blocks
from writers import assert_same, batch_of, loss_of, make_judge, make_run, make_task, make_writer, results

PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "align_kd.json").read_text())


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def task(**settings: Any) -> AlignKD:
    """Maps in float64 that are no means of heads, so that mistakes show."""
    method = make_task("align_kd", **settings)
    assert isinstance(method, AlignKD)
    torch.manual_seed(3)
    for layer in (method.map_heads, method.map_tokens):
        layer.double()
        for parameter in layer.parameters():
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64)
    return method


# ------------------------------------------------------------------------------------------------ written out


def coarser(cells: Tensor) -> Tensor:
    """A grid of 3 x 3 tokens as one of 2 x 2, each the mean of the four cells that it touches."""
    grid = cells.view(3, 3, -1)
    return torch.stack([grid[i : i + 2, j : j + 2].flatten(0, 1).mean(0) for i in range(2) for j in range(2)])


class Alone:
    """What the library says of one dialogue: logits, visual tokens and eager attention of a layer."""

    def __init__(self, model: Any, inputs: Any, layer: int) -> None:
        net = model.model
        net.set_attn_implementation("eager")
        try:
            output = net(**model.arguments(inputs), output_attentions=True)
        finally:
            net.set_attn_implementation("sdpa")
        self.logits = output.logits[0, :, : model.vocabulary.size]
        self.maps = output.attentions[layer][0]
        self.visual = inputs.visual[0].nonzero().flatten().tolist()
        self.seen: Any = None
        if self.visual:
            found = net.model.get_image_features(inputs.pictures["pixel_values"], return_dict=True).pooler_output
            self.seen = torch.cat(list(found)).reshape(len(self.visual), -1)
        last = inputs.answer[0].nonzero().flatten().tolist()[-1]
        self.texts = [place for place in range(last) if place not in self.visual]
        self.behind = [place for place in range(last + 1) if self.visual and place > self.visual[-1]]


def written_out(method: AlignKD, batch: Batch) -> dict[str, Tensor]:
    config, judge, terms = method.config, method.teacher, {}
    assert judge is not None
    student: Any = batch.inputs["student"]
    teacher: Any = batch.inputs["teacher"]
    ce = [
        [-row.log_softmax(-1)[token] for row, token in zip(*each, strict=True)]
        for each in rows_of(method.student, student)
    ]
    terms["answers"] = reduced(ce, config.reduction)
    divergences, visions, errors = [], [], []
    for number in range(len(batch)):
        own = Alone(method.student, student.rows([number]), config.layer)
        with torch.no_grad():
            theirs = Alone(judge.model, teacher.rows([number]), config.layer)
        size = own.logits.shape[1]
        pairs = list(zip(own.logits[own.texts], theirs.logits[theirs.texts], strict=True))
        if config.positions == "answers":
            pairs = pairs[-len(ce[number]) :]
        if own.visual:
            if config.positions == "all":
                head = judge.model.model.lm_head.weight[:size]
                with torch.no_grad():
                    states = judge.model.model.model(**judge.model.arguments(teacher.rows([number])))
                    seen = coarser(states.last_hidden_state[0][theirs.visual]) @ head.T
                pairs += list(zip(own.logits[own.visual], seen, strict=True))
            mapped = method.map_tokens(coarser(theirs.seen))
            errors_of_tokens = (mapped - own.seen).square().mean(-1)
            attended = coarser(theirs.maps.mean(0).sum(0)[theirs.visual][:, None])[:, 0]
            order = sorted(range(len(attended)), key=lambda place: -float(attended[place]))[: config.focus]
            visions.append(errors_of_tokens.mean())
            if order:
                visions[-1] = visions[-1] + errors_of_tokens[order].mean()
            for query, judged in zip(own.behind, theirs.behind, strict=True):
                mass = coarser(theirs.maps[:, judged, theirs.visual].T) * 9 / 4
                for place, key in enumerate(own.visual):
                    aim = method.map_heads(mass[place])
                    errors += [(own.maps[head_, query, key] - aim[head_]) ** 2 for head_ in range(len(aim))]
        divergences.append([kl(theirs_.softmax(-1), mine.softmax(-1)) for mine, theirs_ in pairs])
    terms["distillation"] = reduced(divergences, config.reduction)
    terms["vision"], terms["attention"] = torch.stack(visions).mean(), torch.stack(errors).mean()
    return {name: terms[name] for name in method.term_names}


@pytest.mark.parametrize(
    "settings",
    [{"focus": 2}, {"positions": "answers", "focus": 0, "reduction": "sample_mean"}, {"reduction": "batch_sum"}],
    ids=str,
)
def test_terms_and_gradients_are_the_sums_written_out(settings: dict[str, Any]) -> None:
    """Of pictures whose grids of visual tokens differ between both models, and of a dialogue without a picture."""
    method = task(**settings)
    batch = batch_of(method, [0, 1, 3])
    found = results(method, batch)
    method.zero_grad()
    terms = written_out(method, batch)
    sum(method.weights[name] * value for name, value in terms.items()).backward()  # type: ignore[union-attr]
    expected = {f"term/{name}": value.detach() for name, value in terms.items()}
    expected |= {f"gradient/{name}": p.grad for name, p in method.named_parameters() if p.grad is not None}
    assert {"gradient/map_heads.weight", "gradient/map_tokens.bias"} <= expected.keys()
    assert_same(found, expected, 1e-6)  # attention is a softmax in float32


def test_micro_batches_are_the_batch() -> None:
    whole, parts = (results(task(focus=2), micro_batch=size) for size in (None, 4))
    assert_same(parts, whole, 1e-6)


def test_dialogues_without_pictures_have_no_terms_of_pictures() -> None:
    method = task()
    found = method(batch_of(method, [3]))
    assert float(found["vision"].value.detach()) == float(found["attention"].value.detach()) == 0
    loss_of(found).backward()
    assert not any(each.grad is None for each in method.map_heads.parameters())  # two processes wait for each other


# ------------------------------------------------------------------------------------------------ published code


def test_visual_tokens_are_compared_as_published() -> None:
    student, maps = tensor(PUBLISHED["student"]["visual"]).requires_grad_(), PUBLISHED["map_tokens"]
    weight, bias = (tensor(maps[name]).requires_grad_() for name in ("weight", "bias"))
    attention = tensor(PUBLISHED["teacher"]["attention"]).mean(1).sum(1)[:, 1:5]
    mapped = tensor(PUBLISHED["teacher"]["visual"]) @ weight.T + bias
    rows = zip(student, mapped, attention, strict=True)
    loss = torch.stack([focused_distance(*row, focus=PUBLISHED["focus"]) for row in rows]).mean()
    expected = PUBLISHED["vision"]
    assert float(loss.detach()) == pytest.approx(expected["value"], rel=1e-10)
    found = torch.autograd.grad(loss, (student, weight, bias))
    torch.testing.assert_close(found[0], tensor(expected["gradient"]), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found[1], tensor(expected["weight"])[..., 0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found[2], tensor(expected["bias"]), rtol=1e-9, atol=1e-10)


def test_attention_is_compared_as_published() -> None:
    student, teacher = (tensor(PUBLISHED[who]["attention"]) for who in ("student", "teacher"))
    weight, bias = (tensor(PUBLISHED["map_heads"][name]).requires_grad_() for name in ("weight", "bias"))
    student.requires_grad_()
    visual = torch.tensor([[False, True, True, True, True, False, False, False]] * 2)
    inputs: Any = SimpleNamespace(visual=visual, texts=SimpleNamespace(mask=torch.ones_like(visual)))
    blocks = zip(text_to_vision(student, inputs), text_to_vision(teacher, inputs), strict=True)
    loss = torch.stack([attention_error(own, theirs, weight, bias) for own, theirs in blocks]).sum()  # type: ignore[arg-type]
    loss = loss / (2 * 2 * 3 * 4)
    expected = PUBLISHED["attention"]
    assert float(loss.detach()) == pytest.approx(expected["value"], rel=1e-10)
    found = torch.autograd.grad(loss, (student, weight, bias))
    torch.testing.assert_close(found[0], tensor(expected["gradient"]), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found[1], tensor(expected["weight"])[..., 0, 0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found[2], tensor(expected["bias"]), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(
        looked_at(teacher, inputs).view(2, 4), teacher.mean(1).sum(1)[:, 1:5]
    )  # what top tokens are chosen by


def test_the_released_mask_leaves_a_term_without_models() -> None:
    """Pictures do not attend to later texts, so what is left is the bias of the map."""
    bias = tensor(PUBLISHED["map_heads"]["bias"])
    assert PUBLISHED["attention_under_the_released_mask"] == pytest.approx(float(bias.square().mean()), rel=1e-9)


def test_the_divergence_is_the_published_one_without_its_floor() -> None:
    student, teacher = (tensor(PUBLISHED[who]["logits"]).flatten(0, 1) for who in ("student", "teacher"))
    student.requires_grad_()
    loss = TokenDivergence()(student, teacher).mean()
    entropy = float(-(teacher.softmax(-1) * teacher.log_softmax(-1)).sum(-1).mean())
    expected = PUBLISHED["distillation"]
    assert float(loss.detach()) + entropy == pytest.approx(expected["value"], rel=1e-10)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, tensor(expected["gradient"]).flatten(0, 1), rtol=1e-9, atol=1e-10)
    assert expected["as_released_in_float16"] == pytest.approx(expected["value"], rel=1e-3)


# ------------------------------------------------------------------------------------------------ objectives


def test_gradients_of_the_objectives() -> None:
    torch.manual_seed(0)
    student, teacher = torch.rand(2, 3, 4, dtype=torch.float64), torch.rand(3, 3, 4, dtype=torch.float64)
    maps = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    inputs = [each.requires_grad_() for each in (student, *maps)]
    assert gradcheck(lambda s, w, b: attention_error(s, teacher, w, b), inputs)
    exact = torch.eye(2, 3, dtype=torch.float64)
    assert float(attention_error(teacher[:2], teacher, exact, torch.zeros(2, dtype=torch.float64))) == 0
    with pytest.raises(ValueError, match="the same queries and keys"):
        attention_error(student[:, :2], teacher, *maps)
    tokens = torch.randn(2, 5, 3, dtype=torch.float64).requires_grad_()
    attention = torch.tensor([0.1, 0.5, 0.2, 0.0, 0.3])
    assert gradcheck(lambda t: focused_distance(t[0], t[1], attention, focus=2), tokens)
    errors = (tokens[0] - tokens[1]).square().mean(-1)
    torch.testing.assert_close(
        focused_distance(tokens[0], tokens[1], attention, focus=2), errors.mean() + errors[[1, 4]].mean()
    )
    torch.testing.assert_close(focused_distance(tokens[0], tokens[1], attention, focus=16), 2 * errors.mean())


# ------------------------------------------------------------------------------------------------ maps


def test_maps_learn_or_stay_random_as_released(tmp_path: Path) -> None:
    learning = make_task("align_kd")
    assert isinstance(learning, AlignKD)
    assert torch.equal(learning.map_heads.weight, torch.full((2, 2), 0.5))
    assert not learning.map_heads.bias.any()
    before = {name: value.clone() for name, value in learning.state_dict().items()}
    make_run(tmp_path / "learn", learning, steps=1).run()
    moved = {name for name, value in learning.state_dict().items() if not torch.equal(value, before[name])}
    assert {"map_heads.weight", "map_heads.bias", "map_tokens.weight", "map_tokens.bias"} <= moved
    still = make_task("align_kd", adapters="frozen")
    assert isinstance(still, AlignKD)
    assert not any(each.requires_grad for name, each in still.named_parameters() if name.startswith("map"))
    assert not torch.equal(still.map_heads.weight, torch.full((2, 2), 0.5))


def test_terms_are_balanced_at_the_last_matrix_of_the_projector() -> None:
    weighting = {"name": "gradnorm", "warmup_steps": 1, "every": 1}
    method = task(term_weighting=weighting)
    (name,) = method.shared_parameters()
    assert name == "model.model.multi_modal_projector.linear_2.weight"
    assert "term/weighted" in results(method)


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 1}, r"method.layer is 1, and .* has layers 0 to 0"),
        ({"positions": "answer"}, "positions"),
        ({"focus": -1}, "focus"),
        ({"distill_weight": 0, "vision_weight": 0, "attention_weight": 0}, "set method: sft"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task(**settings)


def test_models_whose_attention_cannot_be_read_are_refused() -> None:
    student = make_writer()
    student._language.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="cannot be read"):
        heads_of(student, 0)
    found = make_task("align_kd", student=student, attention_weight=0, focus=0)
    assert not found.teacher_needs.attention


def test_templates_that_differ_are_refused_where_all_positions_count() -> None:
    teacher = make_judge()
    native = teacher.model.processor.native
    native.chat_template = "be brief. " + native.chat_template
    with pytest.raises(ConfigError, match=r"their chat templates differ.*set positions: answers"):
        task(teacher=teacher)
    method = task(teacher=teacher, positions="answers")  # words in front of a picture change no attention block
    loss_of(method(batch_of(method, [0, 1]))).backward()
    whole = task()
    batch = batch_of(whole, [0, 3])
    with pytest.raises(ValueError, match=r"set method.positions=answers"):
        whole(replace(batch, inputs={**batch.inputs, "teacher": batch_of(method, [0, 3]).inputs["teacher"]}))
    native.chat_template = native.chat_template.replace("<image>", "<image> be brief")
    with pytest.raises(ConfigError, match="tokens behind its picture"):
        check_same_texts(whole.student, teacher.model, whole=False, instead="")


def test_layers_do_not_compute_again_where_attention_is_read() -> None:
    with pytest.raises(ConfigError, match="it reads attention maps while a layer computes"):
        recompute_blocks(task())
    recompute_blocks(task(attention_weight=0))
    assert "attention" in str(task().not_cached)

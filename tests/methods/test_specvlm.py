"""`specvlm`: both terms in plain loops and against EAGLE's numbers, and which students can be no draft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from written_out import divergence, reduced, rows_of

from cmapkd.config import ConfigError
from cmapkd.methods import METHODS, StepInfo
from cmapkd.models import FrozenTeacher
from cmapkd.objectives.embedding_targets import embedding_distance
from cmapkd.objectives.tokens import TokenDivergence
from cmapkd.run.config import RunConfig
from writers import assert_same, batch_of, make_converted, make_judge, make_other, make_task, make_writer, results

PUBLISHED = json.loads((Path(__file__).parent / "fixtures/specvlm.json").read_text())


def test_values_and_gradients_are_those_of_eagle() -> None:
    """Its cross-entropy is the divergence and the teacher's entropy; its denominators are 1e-5 too large."""
    tokens, width, size = PUBLISHED["shape"]

    def table(name: str, columns: int) -> Tensor:
        return torch.tensor(PUBLISHED[name], dtype=torch.float64).view(-1, columns)

    head, target, predicted = table("head", width), table("target", width), table("predicted", width)
    assert (head.shape, target.shape) == ((size, width), (tokens, width))
    learned = torch.tensor(PUBLISHED["mask"]).bool()
    predicted.requires_grad_()
    rows, theirs, count = predicted[learned], target[learned], int(learned.sum()) + 1e-5
    features = embedding_distance(rows[:, None], theirs[:, None]).sum() / count
    logits = theirs @ head.T
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum() / count
    distillation = TokenDivergence()(rows @ head.T, logits).sum() / count
    assert features.item() == pytest.approx(PUBLISHED["features"], abs=1e-12)
    assert (distillation + entropy).item() == pytest.approx(PUBLISHED["cross_entropy"], abs=1e-12)
    config: Any = METHODS["specvlm"].Config.from_mapping({"name": "specvlm"})
    loss = config.features_weight * features + config.distill_weight * distillation
    assert (loss + config.distill_weight * entropy).item() == pytest.approx(PUBLISHED["loss"], abs=1e-12)
    (gradient,) = torch.autograd.grad(loss, predicted)
    torch.testing.assert_close(gradient, table("gradient", width), rtol=0, atol=1e-12)


@pytest.mark.parametrize("reduction", ["token_mean", "sample_mean"])
def test_terms_and_gradients_are_sums_written_out(reduction: str) -> None:
    settings = {"reduction": reduction, "answers_weight": 0.3, "distill_weight": 0.7, "features_weight": 0.5}
    task: Any = make_task("specvlm", **settings)
    batch = batch_of(task)
    found = results(task, batch)
    task.zero_grad()
    inputs: Any = batch.inputs
    logits = [rows_of(model, inputs[role]) for role, model in _models(task)]
    values: dict[str, list[list[Tensor]]] = {"answers": [], "distillation": [], "features": []}
    for number, ((own, targets), (theirs, _)) in enumerate(zip(*logits, strict=True)):
        states = [_states(model, inputs[role].rows([number])) for role, model in _models(task)]
        of: dict[str, list[Tensor]] = {name: [] for name in values}
        for place, target in enumerate(targets):
            mapped, wanted = task.project(states[0][place]), states[1][place].detach()
            of["answers"].append(-own[place].log_softmax(-1)[target])
            of["distillation"].append(divergence(own[place], theirs[place].detach(), {}))
            of["features"].append(_smooth(mapped - wanted) / len(wanted))
        for name, kept in of.items():
            values[name].append(kept)
    terms = {name: reduced(each, reduction) for name, each in values.items()}
    torch.stack([task.weights[name] * value for name, value in terms.items()]).sum().backward()
    expected = {f"term/{name}": value.detach() for name, value in terms.items()}
    expected |= {f"gradient/{n}": each.grad for n, each in task.named_parameters() if each.grad is not None}
    assert_same(found, expected, 1e-8)  # norms are in float32
    assert found["gradient/project.weight"].any()


def _models(task: Any) -> list[tuple[str, Any]]:
    return [("student", task.student), ("teacher", task.teacher.model)]


def _states(model: Any, alone: Any) -> Tensor:
    """What the head is given behind the tokens before each of the answer's, from the library's own forward pass."""
    given: list[Tensor] = []
    hook = model.model.lm_head.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
    model.model(**model.arguments(alone))
    hook.remove()
    return given[0][0][alone.answer[0].nonzero().flatten() - 1]


def _smooth(errors: Tensor) -> Tensor:
    return torch.stack([e * e / 2 if abs(e.item()) < 1 else e.abs() - 0.5 for e in errors]).sum()


def test_states_of_one_width_are_compared_as_they_are() -> None:
    """A draft has fewer layers; without the term there is nothing to map."""
    judge = make_judge(width=16, layers=2)
    task: Any = make_task("specvlm", teacher=judge)
    assert task.project is None
    assert make_task("specvlm", features_weight=0).project is None
    batch = batch_of(task)
    own = task.student(batch.inputs["student"]).hidden["answer"].values
    theirs = judge.model(batch.inputs["teacher"]).hidden["answer"].values
    assert task(batch)["features"].value.item() == pytest.approx(F.smooth_l1_loss(own, theirs).item(), rel=1e-9)


def test_the_teacher_s_words_stay_as_they_are() -> None:
    """Then equal states are equal distributions, so that features alone can teach a draft to write."""
    judge = make_judge(width=16, layers=2)
    task: Any = make_task("specvlm", teacher=judge, student=make_writer(seed=3), words="teacher", distill_weight=0)
    own, theirs = task.student.head.weight, judge.model.head.weight
    assert torch.equal(own, theirs)
    assert not own.requires_grad
    found = results(task)
    learned = {name.removeprefix("gradient/student.") for name in found if name.startswith("gradient/")}
    assert learned.isdisjoint(task.student.parts["embeddings"] | task.student.parts["head"])
    assert learned & task.student.parts["language"]
    states = torch.randn(3, 16, dtype=torch.float64)
    assert torch.equal(task.student.logits(states), judge.model.logits(states))
    task.train_only(["embeddings", "language"])
    assert not own.requires_grad
    with pytest.raises(ConfigError, match=r"words are 16 numbers wide in .* and 24 in .*method\.words=own"):
        make_task("specvlm", words="teacher")


def test_without_its_own_term_it_is_token_kd() -> None:
    found = []
    for name, more in (("specvlm", {"features_weight": 0}), ("token_kd", {})):
        found.append(results(make_task(name, distill_weight=0.1, answers_weight=0.4, **more)))
    assert_same(*found)


def test_answers_of_the_draft_s_own_are_followed() -> None:
    """Features, as distributions, are of given and own answers, or with a gate of right ones alone."""
    counts = {}
    for gate in (None, "right"):
        task: Any = make_task("specvlm", on_policy={"share": 1.0, "max_new_tokens": 3, "gate": gate})
        task.step = StepInfo(1, 10, seed=3)
        part = task._rolled_out(batch_of(task))
        sums = task.sums(part, task.student(part.inputs["student"]), task.read_teacher(part))
        counts[gate] = float(sums["features"].number)
        assert (float(sums["features"].total.detach()) > 0) is (counts[gate] > 0)
        assert counts[gate] == float(sums["distillation"].number)
    assert counts[None] > counts["right"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alignment": "bytes"}, "both have one tokenizer: leave it out"),
        ({"distill_weight": 0, "features_weight": 0}, "set method: sft"),
        ({"features_weight": -1}, "features_weight"),
    ],
)
def test_settings_that_train_no_draft_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_task("specvlm", **settings)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (make_other, "different tokenizers"),
        (
            lambda: make_judge(extra=3),
            r"must know every token that the teacher writes, under the same number, and has \d+ tokens",
        ),
        (lambda: FrozenTeacher(make_converted()), "has linear attention, whose state cannot take tokens back"),
        (lambda: FrozenTeacher(make_writer(seed=5)), r"a draft must be smaller.*fewer layers"),
    ],
)
def test_models_that_cannot_be_teacher_and_draft_are_refused(teacher: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_task("specvlm", teacher=teacher())


def test_a_cache_is_refused_where_states_are_read() -> None:
    recipe: dict[str, Any] = {
        "student": "tiny_vlm:small",
        "teacher": "tiny_vlm:scenes-teacher",
        "data": {"train": "scenes?length=20"},
        "training": {"steps": 1},
        "cache": "auto",
    }
    with pytest.raises(ConfigError, match=r"no cache holds, unless method\.features_weight is 0"):
        RunConfig.from_mapping({**recipe, "method": "specvlm"})
    RunConfig.from_mapping({**recipe, "method": {"name": "specvlm", "features_weight": 0, "top_k": 8}})

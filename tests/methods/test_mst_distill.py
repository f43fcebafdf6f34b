"""MST-Distill against the published losses, masks and gate; who learns in which stage, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck

from cmapkd.config import ConfigError
from cmapkd.data.templates import ClassPrompts
from cmapkd.features.specialists import ChannelMask, ClassNetwork
from cmapkd.methods import METHODS, StepInfo, Term, build_method
from cmapkd.methods.mst_distill import MstDistill
from cmapkd.methods.stages import WHOLE_RUN
from cmapkd.models import FrozenTeacher
from cmapkd.objectives import balance_divergence, mutual_divergence, routed_divergence
from helpers import (
    GRADNORM,
    make_classifier,
    make_method,
    make_teacher,
    make_trainer,
    random_batch,
    read_lines,
    second_teacher,
)

PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "mst_distill.json").read_text())
TINY = {"hidden": 12}


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mst(more: tuple[FrozenTeacher, ...] = (), **settings: Any) -> MstDistill:
    method = make_method("mst_distill", more_teachers=more, settings={**TINY, **settings})
    assert isinstance(method, MstDistill)
    return method


def summed(terms: dict[str, Term]) -> Tensor:
    return torch.stack([term.weight * term.value for term in terms.values()]).sum()


def terms_of(
    method: MstDistill, stage: int, student: Tensor, labels: list[int], monkeypatch: pytest.MonkeyPatch
) -> dict[str, Term]:
    """Terms of a stage, by number, for given scores of the student."""
    monkeypatch.setattr(method, "features", lambda _batch: student)
    monkeypatch.setattr(method.student, "logits", lambda *_: student)
    monkeypatch.setattr(method, "labels", lambda _batch: torch.tensor(labels))
    method.enter(method.default_stages[stage])
    return method(random_batch(2), StepInfo(stage=method.stage))


def test_stage_together_is_the_published_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    case, method = PUBLISHED["together"], mst().double()
    scores = {name: tensor(case[name]).requires_grad_() for name in ("student", "joint", "text")}
    monkeypatch.setattr(method, "_inputs", lambda _batch: {})
    monkeypatch.setattr(method.specialists, "plain", lambda _inputs: [scores["joint"], scores["text"]])
    terms = terms_of(method, 0, scores["student"], case["labels"], monkeypatch)
    assert terms["labels"].value.item() == pytest.approx(case["student_ce"], rel=1e-12)
    assert terms["network_labels"].value.item() == pytest.approx(case["network_ce"], rel=1e-12)
    assert summed(terms).item() == pytest.approx(case["loss"], rel=1e-12)
    summed(terms).backward()
    for name, score in scores.items():
        assert score.grad is not None
        torch.testing.assert_close(score.grad.flatten(), tensor(case["gradients"][name]), rtol=1e-10, atol=1e-12)


def with_published_masks(**settings: Any) -> MstDistill:
    """One network that reads given inputs, with the fixture's weights."""
    case, method = PUBLISHED["masks"], mst(networks=["text"], **settings).double()
    network = method.specialists.networks["teacher_text"]
    assert isinstance(network, ClassNetwork)
    network.layers[0] = nn.Linear(len(case["inputs"][0]), case["hidden"]).double()
    for number, layer in enumerate(network.layers, 1):
        layer.load_state_dict({name: tensor(case["network"][f"fc{number}.{name}"]) for name in ("weight", "bias")})
    for mask, found in zip(method.specialists.masks.values(), case["specialists"], strict=True):
        named = {theirs(name): parameter for name, parameter in mask.named_parameters()}
        with torch.no_grad():
            for name, values in found["weights"].items():
                named[name].copy_(tensor(values).view_as(named[name]))
    return method


def theirs(name: str) -> str:
    return name.replace("attention", "mha").replace("score", "fc")


def test_stage_masks_is_the_published_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    case, method = PUBLISHED["masks"], with_published_masks()
    monkeypatch.setattr(method, "_inputs", lambda _batch: {"teacher_text": tensor(case["inputs"])})
    student = tensor(case["student"]).requires_grad_()
    terms = terms_of(method, 1, student, [0] * len(student), monkeypatch)
    assert set(terms) == {"masks"}
    assert terms["masks"].value.item() == pytest.approx(sum(each["loss"] for each in case["specialists"]), rel=1e-11)
    terms["masks"].value.backward()
    assert student.grad is None
    assert all(parameter.grad is None for parameter in method.specialists.networks.parameters())
    for mask, found in zip(method.specialists.masks.values(), case["specialists"], strict=True):
        for name, parameter in mask.named_parameters():
            expected = tensor(found["gradients"][theirs(name)])
            torch.testing.assert_close(parameter.grad.flatten(), expected, rtol=1e-8, atol=1e-11, msg=name)


@pytest.mark.parametrize("case", PUBLISHED["distil"]["cases"], ids=lambda case: f"{case['top']}-{case['stacked']}")
def test_stage_distil_is_the_published_loss(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without the masks that the published hooks leave on."""
    of_all, inputs = PUBLISHED["distil"], PUBLISHED["masks"]["inputs"]
    method = with_published_masks(top=case["top"], stacked=case["stacked"], fade=False)
    task, distill, balance = of_all["weights"]
    method.config = method.config.model_copy(
        update={"label_weight": task, "distill_weight": distill, "balance_weight": balance}
    )
    assert method.gate is not None
    gate = {f"fc{number + 1}.{name}": p for number, map in enumerate(method.gate) for name, p in map.named_parameters()}
    with torch.no_grad():
        for name, values in of_all["gate"].items():
            gate[name].copy_(tensor(values).view_as(gate[name]))
    monkeypatch.setattr(method, "_inputs", lambda _batch: {"teacher_text": tensor(inputs)})
    student = tensor(of_all["student"]).requires_grad_()
    terms = terms_of(method, 2, student, of_all["labels"], monkeypatch)
    values = {"labels": case["ce"], "routed": case["kl"], "balance": case["balance"]}
    assert {name: term.value.item() for name, term in terms.items()} == pytest.approx(values, rel=1e-11)
    if case["top"] == 1:
        share = sum(place for (place,) in case["chosen"]) / len(case["chosen"])
        assert method.measurements["chosen/teacher_text_2"].item() == pytest.approx(share)
    loss = summed(terms)
    assert loss.item() == pytest.approx(case["loss"], rel=1e-11)
    loss.backward()
    learned = {"student": student, **gate}
    for name, expected in case["gradients"].items():
        torch.testing.assert_close(learned[name].grad.flatten(), tensor(expected), rtol=1e-8, atol=1e-11, msg=name)


def test_weights_fade_as_in_the_published_loop() -> None:
    method, stage = mst(), mst().default_stages[2]
    routed = balance = 1.0
    for epoch in range(100):
        method.step = StepInfo(stage=stage, progress=epoch / 100)
        assert method.weights_now["routed"] == pytest.approx(routed), epoch
        assert method.weights_now["balance"] == pytest.approx(balance), epoch
        routed *= 0.5 if epoch % 30 == 0 else 1.0
        balance *= 0.9 if epoch % 10 == 0 else 1.0


def test_losses_are_the_sums_written_out() -> None:
    draws = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, 4, 3, generator=draws).double()
    experts, chosen = torch.stack([b, c], 1), torch.tensor([[0], [1], [1], [0]])

    def kl(target: Tensor, own: Tensor) -> Tensor:
        p, q = (target / 2).softmax(-1), (own / 2).softmax(-1)
        return 4 * sum(p[k] * (p[k] / q[k]).log() for k in range(3))  # type: ignore[return-value]

    pairs = [(x, y) for x in (a, b, c) for y in (a, b, c) if x is not y]
    written = sum(kl(x[i], y[i]) for x, y in pairs for i in range(4)) / 4
    torch.testing.assert_close(mutual_divergence([a, b, c], temperature=2.0), written)
    written = sum(kl(experts[i, int(chosen[i])], a[i]) for i in range(4)) / 4
    torch.testing.assert_close(routed_divergence(a, experts, chosen, temperature=2.0), written)
    likely = a.softmax(1)
    mean = likely.mean(0)
    torch.testing.assert_close(balance_divergence(likely), sum(-(3 * mean[e]).log() / 3 for e in range(3)) / 3)
    assert balance_divergence(torch.full((2, 5), 0.2)).item() == pytest.approx(0.0, abs=1e-6)
    x, y = a.requires_grad_(), b.requires_grad_()
    assert gradcheck(lambda *each: mutual_divergence(each, temperature=2.0), (x, y))
    assert gradcheck(lambda own: routed_divergence(own, experts.detach(), chosen), x)
    assert gradcheck(lambda own: balance_divergence(own.softmax(1)), x)
    with pytest.raises(ValueError, match="two networks or more, all alike"):
        mutual_divergence([a])
    with pytest.raises(ValueError, match=r"chosen \(3, 1\): expected"):
        routed_divergence(a, experts, chosen[:3])
    with pytest.raises(ValueError, match=r"shape \(3,\): expected \[batch, experts\]"):
        balance_divergence(mean)


def test_networks_read_caption_and_picture_of_every_teacher() -> None:
    method, batch = mst((second_teacher(),)), random_batch(6, rich=True)
    assert [*method.read] == ["teacher_joint", "teacher_text", "second_joint", "second_text"]
    found = method.encode_teachers(batch)
    image, text = (F.normalize(each.embedding, dim=-1) for each in (found["second"].image, found["second"].text))
    inputs = method._inputs(batch)
    torch.testing.assert_close(inputs["second_joint"], torch.cat([image, text], 1) * 8**0.5)
    torch.testing.assert_close(inputs["teacher_text"].norm(dim=1), torch.full((6,), 24**0.5))
    assert method.specialists(inputs).shape == (6, 8, 5)
    layers = method.specialists.networks["second_text"].layers
    hidden = layers[0](inputs["second_text"]).relu()
    masked = layers[1](hidden) * method.specialists.masks["second_text_2"](layers[1](hidden))
    torch.testing.assert_close(method.specialists(inputs)[:, 7], layers[2](masked.relu()))
    alone = mst(networks=["image"])
    assert alone.teacher_needs.towers == ("image",)
    assert not alone.config.reads_captions


def test_each_stage_trains_its_own_modules() -> None:
    method, batch = mst(), random_batch(6)
    learning: dict[str, set[str]] = {}
    for stage in method.default_stages:
        method.enter(stage)
        method.zero_grad()
        summed(method(batch, StepInfo(stage=stage))).backward()
        named = {name: parameter for name, parameter in method.named_parameters() if parameter.requires_grad}
        assert all(parameter.grad is not None for parameter in named.values())
        beginnings = ("student.", "specialists.networks.", "specialists.masks.", "gate.")
        learning[stage.name] = {start for start in beginnings if any(name.startswith(start) for name in named)}
    assert learning == {
        "together": {"student.", "specialists.networks."},
        "masks": {"specialists.masks."},
        "distil": {"student.", "gate."},
    }


def test_weightings_by_gradients_find_a_layer_in_every_stage() -> None:
    method, batch = make_method("mst_distill", settings={**TINY, "term_weighting": GRADNORM}).train(), random_batch(6)
    for stage in (WHOLE_RUN, *method.default_stages):
        method.enter(stage)
        for step in range(3):
            method(batch, StepInfo(step, 10, stage))["weighted"].value.backward()
        assert all(f"terms/gradient_norm/{name}" in method.measurements for name in stage.terms or method.term_names)


def test_teachers_are_asked_where_a_term_reads_the_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = mst(), random_batch(6)
    monkeypatch.setattr(method, "_inputs", None)
    distil = method.default_stages[-1]
    method.enter(distil.model_copy(update={"terms": ("labels", "balance")}))
    assert tuple(method(batch, StepInfo(stage=method.stage))) == ("labels", "balance")


def test_other_ways_to_choose() -> None:
    batch = random_batch(6)
    mean = mst(routing="mean", mask_layers=0)
    assert mean.gate is None
    assert mean.specialists.keys == ("teacher_joint", "teacher_text")
    assert [(stage.name, stage.terms) for stage in mean.default_stages] == [
        ("together", ("labels", "network_labels", "mutual")),
        ("distil", ("labels", "routed")),
    ]
    assert sum(stage.share or 0 for stage in mean.default_stages) == pytest.approx(1.0)
    both = mst(top=2, mask_layers=0)
    both.load_state_dict(mean.state_dict(), strict=False)
    torch.testing.assert_close(mean(batch)["routed"].value, both(batch)["routed"].value)
    drawn = mst(routing="random")
    chosen = [
        drawn._chosen(torch.zeros(40, 4, 5), None).flatten()
        for drawn.step in (StepInfo(1, 9), StepInfo(1, 9), StepInfo(2, 9))
    ]
    assert torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[0], chosen[2])
    assert set(chosen[0].tolist()) == {0, 1, 2, 3}


def test_a_run_in_stages_drops_all_but_the_student(tmp_path: Path) -> None:
    trained = make_trainer(tmp_path, mst(), steps=6)
    student = trained.run().student
    assert {name.split(".")[0] for name in student.state_dict()} == {"image", "heads"}
    logged = read_lines(tmp_path / "metrics.jsonl")
    assert {key for line in logged for key in line if key.startswith("chosen/")} == {
        f"chosen/{name}_{layer}" for name in ("teacher_joint", "teacher_text") for layer in (1, 2)
    }


def test_wrong_settings_are_refused() -> None:
    for settings, message in (
        ({"networks": ["text", "text"]}, r"networks is \['text', 'text'\]: name each kind once"),
        ({"hidden": 8}, "hidden is 8: masks of 3 heads on 2 layers need 12 or more"),
        ({"balance_weight": 0}, "the gate learns by this term alone: take routing: random or mean"),
        ({"top": 5}, "method.top is 5, and there are 4 specialists"),
    ):
        with pytest.raises(ConfigError, match=message):
            mst(**settings)
    with pytest.raises(ValueError, match="a mask of 3 heads is for layers of 6 channels or more, not of 5"):
        ChannelMask(5)
    config = METHODS["mst_distill"].Config(name="mst_distill")
    with pytest.raises(ConfigError, match="a classifier tells classes apart, and there is"):
        build_method(config, student=make_classifier(), teacher=make_teacher(), classes=ClassPrompts(("one",), ("{}",)))

"""ALBEF's contrastive part: against the published lines, its queue, its ramp, its resume."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cmapkd.config import ConfigError
from cmapkd.data.types import Batch
from cmapkd.methods import StepInfo
from cmapkd.methods.albef import Albef
from cmapkd.models import Features, TowerFeatures
from cmapkd.objectives import contrastive_loss, soft_contrast
from cmapkd.training import Trainer
from helpers import make_method, make_model, make_trainer, random_batch

# Numbers of the contrastive lines of `ALBEF.forward`; the file names commit and conditions.
CASES = json.loads((Path(__file__).parent / "fixtures" / "albef.json").read_text())["cases"]
FULL = StepInfo(step=9, total=10)  # where alpha has risen


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def albef(**settings: Any) -> Albef:
    method = make_method("albef", settings={"queue": 12, **settings})
    assert isinstance(method, Albef)
    return method.train()


def entropy(anchors: Tensor, candidates: Tensor, scale: float) -> float:
    log_p = (scale * anchors @ candidates.T).log_softmax(-1)
    return float(-(log_p.exp() * log_p).sum(-1).mean())


@pytest.mark.parametrize("case", CASES, ids=["mixed targets", "pairs alone"])
def test_the_loss_equals_the_published_lines(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("student_image", "student_text", "teacher_image", "teacher_text", "queue_image", "queue_text")
    v, t, v_m, t_m, queue_v, queue_t = (tensor(case[name]) for name in names)
    learned = [v.requires_grad_(), t.requires_grad_(), tensor(1 / case["temp"]).requires_grad_()]
    student = make_model(dim=v.shape[1])
    settings = {"alpha": case["alpha"], "queue": len(queue_v), "alpha_warmup": 0}
    method = make_method("albef", student=student, settings=settings).double().train()
    assert isinstance(method, Albef)
    assert method.queue is not None
    method.queue.push(queue_v, queue_t, torch.arange(len(queue_v)))
    of_student = Features(TowerFeatures(v), TowerFeatures(t), logit_scale=learned[2])
    of_teacher = Features(TowerFeatures(v_m), TowerFeatures(t_m), logit_scale=tensor(1.0))
    monkeypatch.setattr(method, "encode_student", lambda _: of_student)
    monkeypatch.setattr(method, "encode_teacher", lambda _: of_teacher)
    terms = method(random_batch(len(v)), FULL)
    loss = torch.stack([term.weight * term.value for term in terms.values()]).sum()
    unit = torch.nn.functional.normalize
    images, texts = unit(torch.cat([v_m, queue_v])), unit(torch.cat([t_m, queue_t]))
    of_target = (
        entropy(unit(v_m), texts, 1 / case["temp"]) + entropy(unit(t_m), images, 1 / case["temp"])
    ) / 2  # published: the cross-entropy, which has it
    assert loss.item() + case["alpha"] * of_target == pytest.approx(case["value"], rel=1e-9)
    found = torch.autograd.grad(loss, learned)
    expected = case["gradients"]
    torch.testing.assert_close(found[0], tensor(expected["student_image"]), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found[1], tensor(expected["student_text"]), rtol=1e-8, atol=1e-10)
    assert found[2].item() == pytest.approx(-expected["temp"] * case["temp"] ** 2, rel=1e-8)


def test_shares_rise_and_weigh_the_terms() -> None:
    method = albef(alpha=0.4, alpha_warmup=0.1)
    for step, share in ((0, 0.0), (5, 0.2), (10, 0.4), (80, 0.4)):
        terms = method(random_batch(4), StepInfo(step=step, total=100))
        weights = {name: term.weight for name, term in terms.items()}
        assert weights == pytest.approx({"contrastive": 1 - share, "distill": share})
    method = albef(alpha_warmup=0)
    method(random_batch(4), StepInfo())
    assert method.share == 0.4


def test_terms_that_never_count_are_left_out() -> None:
    assert albef().term_names == ("contrastive", "distill")
    assert albef(alpha=0).term_names == ("contrastive",)
    assert albef(alpha=1).term_names == ("contrastive", "distill")  # while alpha rises
    assert albef(alpha=1, alpha_warmup=0).term_names == ("distill",)


def test_at_first_it_is_clips_loss_of_a_student_that_is_its_teacher() -> None:
    method, batch = albef(), random_batch(4)
    method.momentum.model.load_state_dict(method.student.state_dict())
    terms, student = method(batch, FULL), method.encode_student(batch)
    expected = contrastive_loss(student.image.embedding, student.text.embedding, logit_scale=student.logit_scale)
    torch.testing.assert_close(terms["contrastive"].value, expected)
    assert terms["distill"].value.item() == pytest.approx(0, abs=1e-6)


def test_the_queue_holds_earlier_pairs_but_never_the_samples_own() -> None:
    method, batch = albef(queue=6), random_batch(4)
    assert method.queue is not None
    first = method(batch, FULL)["contrastive"].value
    pairs = method.encode_student(batch), method.encode_teacher(batch)
    four = [tower.embedding for features in pairs for tower in (features.image, features.text)]
    scale, own = pairs[0].logit_scale, torch.eye(4, dtype=torch.bool)
    found = method(batch, FULL)["contrastive"].value
    expected = soft_contrast(*four, logit_scale=scale, queue=(four[2], four[3]), exclude=own).hard
    torch.testing.assert_close(found, expected)
    assert found > first + 0.01
    assert method.queue.filled == 6
    method.eval()
    keys = method.queue.keys.clone()
    method(batch, FULL)
    assert torch.equal(method.queue.keys, keys)  # a loss that is only looked at moves nothing


def test_pictures_name_the_queues_entries_where_they_are_told_apart() -> None:
    """Of two samples with one picture, neither is a candidate of the other, whatever their names."""
    method, batch = albef(several_positives=True), random_batch(4)
    assert method.queue is not None
    batch.extra["pictures"] = torch.tensor([-1, 5, 5, 7])
    method(batch, FULL)
    known = method.queue.references(method._keys(batch, method.encode_student(batch)))
    assert method.queue.keys[:4].ge(0).all()
    same = torch.eye(4, dtype=torch.bool)
    same[1, 2] = same[2, 1] = True
    assert torch.equal(known.exclude, same)


def test_without_a_queue_there_is_the_batch_alone() -> None:
    method, batch = albef(queue=0), random_batch(4)
    one, other = method(batch, FULL), method(replace(batch, ids=("a", "b", "c", "d")), FULL)
    assert method.queue is None
    for name in one:
        torch.testing.assert_close(one[name].value, other[name].value)


def test_only_the_student_learns_and_its_teacher_follows() -> None:
    method = albef(momentum=0.75)
    torch.stack([term.value for term in method(random_batch(4), FULL).values()]).sum().backward()
    learns = {name for name, parameter in method.named_parameters() if parameter.grad is not None}
    assert learns == {name for name, _ in method.named_parameters() if name.startswith("student.")}
    before = {name: value.clone() for name, value in method.momentum.model.named_parameters()}
    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter.add_(1.0)
    method.after_step(FULL)
    of_student = dict(method.student.named_parameters())
    for name, value in method.momentum.model.named_parameters():
        if value.ndim:  # the student's scale is kept in its range before
            torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * of_student[name], msg=name)
    assert method.momentum.model.log_logit_scale.exp() <= 100


def test_a_resume_finds_queue_and_teacher_as_they_were(tmp_path: Path) -> None:
    def trainer(out: str) -> Trainer:
        return make_trainer(tmp_path / out, albef(momentum=0.5), steps=6)

    whole, cut = trainer("whole"), trainer("cut")
    whole.run()
    step = cut._step

    def until(batch: Batch) -> Any:
        if cut.progress.step == 3:
            cut._save()
            raise KeyboardInterrupt
        return step(batch)

    cut._step = until  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    again = trainer("cut")
    again.run(resume=True)
    state = again.method.state_dict()
    assert "queue.image" in state
    assert any(name.startswith("momentum.") for name in state)
    for name, value in whole.method.state_dict().items():
        assert torch.equal(state[name], value), name


def test_msd_is_albef_with_a_queue_in_micro_batches() -> None:
    """As docs/methods.md says it: terms, and what the queue then holds, are those of the batch encoded at once."""
    docs = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    assert "`method: {name: albef, queue: 65536}` with `training.micro_batch: 32`" in docs
    found = []
    for micro_batch in (None, 3):
        method = albef(queue=65_536).double()
        method.micro_batch = micro_batch
        for seed in (1, 2):
            batch = replace(random_batch(8, seed=seed, dtype=torch.float64), ids=tuple(f"{seed}-{i}" for i in range(8)))
            terms = method(batch, FULL)
        assert method.queue is not None
        assert method.queue.filled == 16
        found.append([*(term.value for term in terms.values()), method.queue.image[:16], method.queue.keys[:16]])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_settings_out_of_range_are_refused() -> None:
    for settings, message in (
        ({"alpha": 1.5}, r"alpha: .*<= 1"),
        ({"momentum": 1.0}, r"momentum: .*< 1"),
        ({"queue": -1}, r"queue: .*>= 0"),
    ):
        with pytest.raises((ConfigError, ValueError), match=message):
            albef(**settings)


def test_the_scale_stays_in_clips_range() -> None:
    method = albef()
    with torch.no_grad():
        method.student.log_logit_scale.fill_(9.0)
    method.after_step(StepInfo())
    assert method.student.log_logit_scale.item() == pytest.approx(math.log(100))

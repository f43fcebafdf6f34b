"""`switch_kd`: differences of logits against loops and published numbers; what the switch feeds the teacher with."""

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
from cmapkd.features.visual_grid import resampled, resampled_rows
from cmapkd.models import FrozenTeacher
from cmapkd.models.token_types import Rows
from cmapkd.objectives.logit_differences import knees, logit_differences
from writers import assert_same, batch_of, make_judge, make_task, make_writer, results

PUBLISHED = json.loads((Path(__file__).parent / "fixtures/switch_kd.json").read_text())


@pytest.mark.parametrize("case", PUBLISHED["cases"], ids=lambda case: f"{case['student_led']} {case['top_k']}")
def test_fixed_forward_differences_are_those_of_the_published_bild(case: dict[str, Any]) -> None:
    student, teacher = (torch.tensor(PUBLISHED[f"{who}_logits"], dtype=torch.float64) for who in ("student", "teacher"))
    student.requires_grad_()
    how = {"top_k": case["top_k"], "temperature": case["temperature"], "divergence": "forward"}
    found = logit_differences(student, teacher, leader="student" if case["student_led"] else "teacher", **how)
    torch.testing.assert_close(found, torch.tensor(case["value"], dtype=torch.float64), rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    torch.testing.assert_close(gradient, torch.tensor(case["gradient"], dtype=torch.float64), rtol=1e-12, atol=1e-12)


def knee(falling: list[float]) -> int:
    """How many stand up to the place furthest below the chord, in a loop."""
    most, best = -math.inf, 0
    for place, value in enumerate(falling):
        below = 1 - place / (len(falling) - 1) - (value - falling[-1]) / (falling[0] - falling[-1])
        if below > most + 1e-12:
            most, best = below, place
    return max(2, best + 1)


def differences(student: Tensor, teacher: Tensor, leader: Tensor, candidates: int, temperature: float) -> Tensor:
    """Of one row, reverse, at the leader's knee, written out."""
    ids = sorted(range(len(leader)), key=lambda token: -float(leader[token].detach()))[:candidates]
    ids = ids[: knee([float(leader[token].detach()) for token in ids])]
    pairs = [(ids[i], ids[j]) for i in range(len(ids)) for j in range(i + 1, len(ids))]
    q, p = (torch.stack([(z[i] - z[j]) / temperature for i, j in pairs]).softmax(0) for z in (student, teacher))
    return (q * (q / p).log()).sum()


def both(student: Tensor, teacher: Tensor) -> Tensor:
    """Of one row, led by the one and by the other, among eight candidates."""
    return sum(differences(student, teacher, leader, 8, 3.0) for leader in (teacher, student))  # type: ignore[return-value]


def test_differences_at_the_knee_are_the_sums_written_out() -> None:
    torch.manual_seed(0)
    student, teacher = 2 * torch.randn(6, 20, dtype=torch.float64), 2 * torch.randn(6, 20, dtype=torch.float64)
    for leader, logits in (("teacher", teacher), ("student", student)):
        found = logit_differences(student, teacher, leader=leader, candidates=9, temperature=0.8)  # type: ignore[arg-type]
        expected = [
            differences(*rows, 9, 0.8)  # type: ignore[arg-type]
            for rows in zip(student, teacher, logits, strict=True)
        ]
        torch.testing.assert_close(found, torch.stack(expected))
        given = student.clone().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda z, leader=leader: logit_differences(z, teacher, leader=leader, candidates=9), (given,)
        )
        moved = logit_differences(student + 3, teacher - 5, leader=leader, candidates=9, temperature=0.8)  # type: ignore[arg-type]
        torch.testing.assert_close(moved, found)
        same = logit_differences(student, student, leader=leader)  # type: ignore[arg-type]
        torch.testing.assert_close(same, torch.zeros_like(same), rtol=0, atol=1e-12)
    curve = torch.exp(-torch.arange(64, dtype=torch.float64) / 12)
    assert knees(torch.stack([curve, torch.ones_like(curve)])).tolist() == [knee(curve.tolist()), 2]
    assert 10 < knee(curve.tolist()) < 40


def test_what_the_differences_refuse() -> None:
    rows = torch.randn(2, 5)
    for given, message in (
        ({"student_logits": rows[:1]}, "one vocabulary"),
        ({"leader": "nobody"}, "leader is 'nobody'"),
        ({"top_k": 1}, "1 logits are compared"),
        ({"temperature": 0.0}, "temperature"),
    ):
        with pytest.raises(ValueError, match=message):
            logit_differences(**{"student_logits": rows, "teacher_logits": rows, "leader": "teacher", **given})  # type: ignore[arg-type]


def written_out(task: Any, batch: Any) -> dict[str, Tensor]:
    """The terms, with the student's picture put into the library's own teacher by hand."""
    inputs, judge = batch.inputs["student"], task.teacher.model
    ours = rows_of(task.student, inputs)
    with torch.no_grad():
        theirs = rows_of(judge, batch.inputs["teacher"])
    switched = []
    for number in range(len(batch)):
        alone, judged = inputs.rows([number]), batch.inputs["teacher"].rows([number])
        words = judge.model.get_input_embeddings()(judged.texts.ids)
        if "pixel_values" in alone.pictures and len(alone.pictures["pixel_values"]):
            tower = task.student.model.model
            pixels = alone.pictures["pixel_values"].double()
            seen = tower.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
            side = round(judged.visual.sum().item() ** 0.5)
            if task.config.switch == "vision":
                seen = stretched(task.adapter(seen), side)
                seen = judge.model.model.multi_modal_projector(seen)
            else:
                seen = stretched(task.adapter(tower.multi_modal_projector(seen)), side)
            words = words.masked_scatter(judged.visual[..., None], seen)
        states = judge.model.model.language_model(inputs_embeds=words).last_hidden_state
        logits = judge.model.lm_head(states)[0, :, : judge.vocabulary.size]
        switched.append(logits[judged.answer[0].nonzero().flatten() - 1])
    triples = [
        (mine, judged, other)
        for (own, _), (known, _), fed in zip(ours, theirs, switched, strict=True)
        for mine, judged, other in zip(own, known, fed, strict=True)
    ]
    targets = [token for _, tokens in ours for token in tokens]
    return {
        "answers": F.cross_entropy(torch.stack([mine for mine, _, _ in triples]), torch.tensor(targets)),
        "distillation": torch.stack([both(mine, known) for mine, known, _ in triples]).mean(),
        "visual_switch": torch.stack([both(other, known) for _, known, other in triples]).mean(),
    }


def stretched(tokens: Tensor, side: int) -> Tensor:
    grid = tokens.transpose(1, 2).unflatten(-1, (round(tokens.shape[1] ** 0.5), -1))
    return F.interpolate(grid, size=(side, side), mode="bilinear").flatten(2).transpose(1, 2)


@pytest.mark.parametrize("switch", ["vision", "projector"])
def test_the_terms_are_the_sums_written_out(switch: str) -> None:
    """Of a teacher with another width and another number of visual tokens; also in micro-batches."""
    task = make_task("switch_kd", teacher=make_judge(vision_width=24), switch=switch, candidates=8).double()
    batch = batch_of(task, range(5))
    found = results(task, batch)
    task.zero_grad()
    assert_same(results(task, batch, micro_batch=2), found)
    task.zero_grad()
    terms = written_out(task, batch)
    sum(terms.values()).backward()  # type: ignore[union-attr]
    expected = {f"term/{name}": value.detach() for name, value in terms.items()}
    expected |= {f"gradient/{name}": each.grad for name, each in task.named_parameters() if each.grad is not None}
    assert "gradient/adapter.weight" in expected
    assert_same(found, expected, tolerance=1e-8)


def test_a_teacher_with_its_own_eyes_says_the_same() -> None:
    task = make_task("switch_kd", student=make_writer(), teacher=FrozenTeacher(make_writer()), answers_weight=0.0)
    found = results(task)
    for name in ("distillation", "visual_switch"):
        assert float(found[f"term/{name}"]) == pytest.approx(0, abs=1e-12)
    assert not list(task.adapter.parameters())  # type: ignore[union-attr, operator]


def test_the_switch_trains_what_the_student_sees_with() -> None:
    only = {"answers_weight": 0.0, "distill_weight": 0.0}
    for switch, parts in (("vision", {"vision"}), ("projector", {"vision", "projector"})):
        task = make_task("switch_kd", switch=switch, **only).double()
        moved = {name.removeprefix("gradient/student.") for name, value in results(task).items() if value.any()}
        learned = {part for part, names in task.student.parts.items() if names & moved}
        assert learned == parts
    texts = make_task("switch_kd", **only)
    assert float(results(texts, batch_of(texts, [3, 7]))["term/visual_switch"]) == pytest.approx(0, abs=1e-12)


def test_what_cannot_be_switched_is_refused() -> None:
    for settings, message in (
        ({"top_k": 1}, "top_k"),
        ({"candidates": 100}, "candidates"),
        ({"top_k": 8, "candidates": 32}, r"candidates \(32\) is read where a knee is sought, and top_k \(8\)"),
        ({"switch": "projector", "visual_weight": 0}, r"visual_weight is 0, .* leave switch \(projector\) out"),
        ({"distill_weight": 0, "visual_weight": 0}, "set method: sft"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_task("switch_kd", **settings)
    with pytest.raises(ValueError, match="8 visual tokens of a picture cannot stand in the places of 9"):
        resampled(torch.zeros(1, 8, 2), 9)
    rows = Rows(torch.zeros(5, 2), torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0, 1, 2, 3, 0]))
    with pytest.raises(ValueError, match=r"\[4, 1\] visual tokens of the student and \[9, 9\]"):
        resampled_rows(rows, torch.ones(2, 9, dtype=torch.bool))

"""RADIO-style distillation of several teachers: its terms against the formula, and how it is put together."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmapkd.config import ConfigError
from cmapkd.data.types import ModelInput
from cmapkd.methods import StageConfig, StepInfo
from cmapkd.methods.radio import Radio, RadioConfig
from cmapkd.models import FrozenTeacher, build_model
from cmapkd.training.checkpoint import list_checkpoints, read_checkpoint
from helpers import make_method, make_model, make_teacher, make_trainer, random_batch, second_teacher

TERMS = ("contrastive", "teacher_image", "teacher_text", "second_image", "second_text")


def radio(*, more: list[FrozenTeacher] | None = None, **settings: Any) -> Radio:
    more = [second_teacher()] if more is None else more
    method = make_method("radio", more_teachers=more, settings=settings).double().train()
    for teacher in method.teachers.values():
        teacher.model.double()
    assert isinstance(method, Radio)
    return method


def batch_of(seed: int = 0) -> Any:
    return random_batch(6, seed=seed, dtype=torch.float64, rich=True)


def adapted(method: Radio, name: str, rows: Tensor) -> Tensor:
    """The adapter written out, with torch's functions."""
    first, norm, _, last = method.adapters[name].inside
    inner = nn.functional.layer_norm(rows @ first.weight.T + first.bias, norm.weight.shape, norm.weight, norm.bias)
    out = nn.functional.gelu(inner) @ last.weight.T + last.bias
    return out + rows if rows.shape[1] == out.shape[1] else out


def angles(ours: Tensor, theirs: Tensor) -> list[float]:
    cosines = nn.functional.cosine_similarity(ours, theirs)
    return [math.acos(float(cosine)) for cosine in cosines.detach()]


@pytest.mark.parametrize("distance", ["balanced", "angle", "cosine"])
def test_terms_are_the_formula(distance: str) -> None:
    method, batch = radio(distance=distance, teacher_weights={"second": 0.5}, text_weight=2.0), batch_of()
    assert method.term_names == TERMS
    terms = method(batch, StepInfo())
    student, teachers = method.encode_student(batch), method.encode_teachers(batch)
    for name in TERMS[1:]:
        role, _, tower = name.rpartition("_")
        ours, theirs = (getattr(features, tower).embedding for features in (student, teachers[role]))
        found = angles(adapted(method, name, ours), theirs)
        expected = sum(1 - math.cos(angle) if distance == "cosine" else angle**2 for angle in found) / len(found)
        if distance == "balanced":
            units = nn.functional.normalize(theirs, dim=-1)
            expected /= sum(angle**2 for angle in angles(units, units.mean(0).expand_as(units))) / len(units)
        assert terms[name].value.item() == pytest.approx(expected, rel=1e-9), name
        assert terms[name].weight == (0.5 if role == "second" else 1.0) * (2.0 if tower == "text" else 1.0)
    assert ("dispersion/second_text" in method.measurements) == (distance == "balanced")


def test_a_width_that_agrees_has_a_residual() -> None:
    method = radio(more=[make_teacher(dim=16, image_size=32, seed=8, role="second")])
    assert [method.adapters[name].residual for name in TERMS[1:]] == [False, False, True, True]
    assert method.adapters["teacher_image"].inside[0].out_features == 24
    rows = torch.randn(2, 16, dtype=torch.float64)
    torch.testing.assert_close(method.adapters["second_image"](rows), adapted(method, "second_image", rows))


def test_dispersions_stay_after_their_steps() -> None:
    method = radio(dispersion_steps=2)
    seen = []
    for step in range(4):
        method(batch_of(step), StepInfo(step=step, total=9))
        seen.append(method.measurements["dispersion/teacher_image"].item())
    assert seen[0] != seen[1]
    assert seen[1] == seen[2] == seen[3]
    method.eval()
    number = method.dispersions["teacher_image"].number.item()
    method(batch_of(9), StepInfo())
    assert method.dispersions["teacher_image"].number.item() == number == 12


def test_dispersions_are_found_by_the_first_steps_with_the_term() -> None:
    """Also where a stage left the term out for longer: else it would be divided by next to zero."""
    method = radio(dispersion_steps=2)
    alone, both = StageConfig(name="alone", share=0.5, terms=("contrastive",)), StageConfig(name="both", share=0.5)
    method(batch_of(0), StepInfo(step=0, total=9, stage=alone))
    noted = [method(batch_of(n), StepInfo(step=n, total=9, stage=both))["teacher_image"].value for n in range(5, 9)]
    assert all(0.05 < value < 100 for value in noted)
    assert int(method.dispersions["teacher_image"].batches) == 2
    fresh = radio().eval()  # nothing was noted: the batch's own
    assert 0.05 < fresh(batch_of(0), StepInfo())["teacher_image"].value < 100


def test_dispersions_of_the_cache_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    method = radio(dispersion="cache", dispersion_pairs=50)
    rows = {role: torch.randn(50, teacher.embed_dim) + 1 for role, teacher in method.teachers.items()}
    asked: list[tuple[str, int]] = []
    for role, teacher in method.teachers.items():

        def drawn(num: int, role: str = role) -> Any:
            asked.append((role, num))
            return ((part, -part, None) for part in rows[role].split(20))

        monkeypatch.setattr(teacher, "reference_embeddings", drawn)
    for step in range(2):
        method(batch_of(step), StepInfo(step=step))
    assert asked == [("teacher", 50), ("second", 50)]
    units = nn.functional.normalize(rows["second"].double(), dim=-1)
    expected = sum(angle**2 for angle in angles(units, units.mean(0).expand_as(units))) / 50
    for tower in ("image", "text"):
        assert method.measurements[f"dispersion/second_{tower}"].item() == pytest.approx(expected, rel=1e-6)


def test_a_live_teacher_has_no_answers_to_draw() -> None:
    with pytest.raises(ValueError, match="set cache: auto"):
        radio(dispersion="cache")(batch_of(), StepInfo())


def test_an_image_tower_alone_is_a_further_teacher() -> None:
    torch.manual_seed(5)
    eyes = FrozenTeacher(build_model("pictures:tiny:small"), "eyes")
    method, batch = radio(more=[eyes]), batch_of()
    pixels = torch.randn(6, 3, eyes.model.image_spec.size, eyes.model.image_spec.size, dtype=torch.float64)
    inputs = {**batch.inputs, "eyes": ModelInput(pixels, eyes.model.tokenizer(["a"] * 6))}
    assert method.term_names == ("contrastive", "teacher_image", "teacher_text", "eyes_image")
    terms = method(replace(batch, inputs=inputs), StepInfo())
    assert all(term.value.isfinite() for term in terms.values())


def test_what_nobody_reads_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    method = radio(text_weight=0.0, teacher_weights={"second": 0.0})
    assert method.term_names == ("contrastive", "teacher_image")
    assert method.teacher_needs.towers == ("image",)
    assert method.encode_teachers(batch_of())["second"].text.embedding.shape == (6, 0)
    asked: list[str] = []
    answer = method._encode_teacher

    def noted(part: Any, role: str = "teacher") -> Any:
        asked.append(role)
        return answer(part, role)

    monkeypatch.setattr(method, "_encode_teacher", noted)
    assert tuple(method(batch_of(), StepInfo())) == method.term_names
    assert asked == ["teacher"]


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"names 'secnd' \(did you mean 'second'\?\), and the teachers are teacher, "):
        radio(teacher_weights={"secnd": 1.0})
    with pytest.raises(ConfigError, match=r"teacher_weights\.second is -1: give 0 or more"):
        radio(teacher_weights={"second": -1.0})
    with pytest.raises(ConfigError, match="dispersion: cache is for distance: balanced, and distance is angle"):
        RadioConfig.from_mapping({"distance": "angle", "dispersion": "cache"})


def test_a_resumed_run_is_the_same_and_its_student_has_no_adapters(tmp_path: Path) -> None:
    def trainer(out: Path) -> Any:
        method = make_method("radio", student=make_model(), settings={"dispersion_steps": 3})
        return make_trainer(out, method, steps=4, checkpoint_every=2)

    whole = trainer(tmp_path)
    whole.run()
    state, _ = read_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1])
    assert state["method"]["dispersions.teacher_text.number"] == 24
    assert not any("adapters" in key for key in whole.student.state_dict())
    list_checkpoints(tmp_path / "checkpoints")[-1].rename(tmp_path / "last")
    again = trainer(tmp_path)
    again.run(resume=True)
    for name, value in whole.method.state_dict().items():
        assert torch.equal(again.method.state_dict()[name], value), name

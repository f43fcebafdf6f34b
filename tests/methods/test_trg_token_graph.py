"""TRG: which tokens are drawn, what each term reads, what is refused. tests/objectives has its losses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from cmapkd.features.drawn_places import drawn_orders, drawn_places
from cmapkd.features.pyramid import level_grid
from cmapkd.methods import StepInfo
from cmapkd.methods.trg_token_graph import TokenGraph, TokenGraphConfig
from cmapkd.models import LevelRequest
from cmapkd.objectives import context_distance, neighbour_divergence, token_contrast
from helpers import make_method, make_model, make_teacher, random_batch

TERMS = ("contrastive", "similarity", "inner", "local", "global")
WEIGHTS = {"task_weight": 0, "distill_weight": 0, "inner_weight": 0, "local_weight": 0, "global_weight": 0}
IDS = tuple(f"m{i}" for i in range(40))


def made(**settings: Any) -> TokenGraph:
    method = make_method("trg_token_graph", settings=settings)
    assert isinstance(method, TokenGraph)
    return method


def test_places_are_drawn_for_each_sample_by_itself() -> None:
    drawn = drawn_places(IDS, count=3, of=9, key=(5, 1))
    assert drawn.shape == (40, 3)
    assert bool((drawn.diff(dim=1) > 0).all())  # different ones, ascending
    assert set(drawn.flatten().tolist()) == set(range(9))
    assert torch.equal(drawn[7:9], drawn_places(IDS[7:9], count=3, of=9, key=(5, 1)))
    for key in ((5, 2), (6, 1)):
        assert not torch.equal(drawn, drawn_places(IDS, count=3, of=9, key=key))
    assert torch.equal(drawn_places(IDS, count=20, of=4, key=()), torch.arange(4).expand(40, 4))
    assert torch.equal(drawn_orders(IDS, of=4, key=(0,)).sort(dim=1).values, torch.arange(4).expand(40, 4))


def test_terms_are_the_losses_of_the_drawn_tokens() -> None:
    """The teacher's 3 x 3 grid is resampled to the student's 2 x 2, of which three cells are drawn."""
    method, batch = made(tokens=3, neighbours=2), random_batch(4)
    method.step = StepInfo(3, 10, progress=0.25, seed=9)
    assert method.teacher is not None
    student = method.student(batch.inputs["student"], LevelRequest(("blocks.0",)))
    teacher = method.teacher.model(batch.inputs["teacher"], LevelRequest(("blocks.0",)))
    places = drawn_places(batch.ids, count=3, of=4, key=(9, 3))
    ours, theirs = (
        torch.stack([cells[i, places[i]] for i in range(4)])
        for cells in (
            level_grid(student.image.levels["blocks.0"]),
            level_grid(teacher.image.levels["blocks.0"], (2, 2)),
        )
    )
    assert method.project is not None
    flat = ours.flatten(0, 1), theirs.flatten(0, 1)
    graph = {"neighbours": 2, "bandwidth": 1.0, "temperature": 0.1}
    terms = method.terms(batch)
    assert {name: term.weight for name, term in terms.items()} == dict.fromkeys(TERMS, 1.0)
    for name, expected in {
        "inner": context_distance(ours, theirs, temperature=0.1),
        "local": neighbour_divergence(*flat, **graph),  # type: ignore[arg-type]
        "global": token_contrast(method.project(flat[0]), flat[1], temperature=0.4),  # a quarter of 0.5 to 0.1
    }.items():
        torch.testing.assert_close(terms[name].value, expected.mean(), msg=name)


def test_each_step_draws_other_tokens_and_a_shuffled_teacher_is_another() -> None:
    batch, values = random_batch(4), []
    for step, shuffled in ((0, False), (0, False), (1, False), (0, True)):
        terms = made(tokens=2, shuffled=shuffled)(batch, StepInfo(step, 10))
        values.append(torch.stack([terms[name].value for name in ("inner", "local", "global")]))
    assert torch.equal(values[0], values[1])
    assert not torch.isclose(values[0], values[2]).any()
    assert not torch.isclose(values[0], values[3]).all()


def test_no_token_depends_on_who_else_is_in_a_micro_batch() -> None:
    batch = replace(random_batch(5, dtype=torch.float64), ids=tuple("abcde"))
    found = []
    for micro_batch in (None, 2):
        method = made(tokens=2, neighbours=3).double()
        assert method.teacher is not None
        method.teacher.model.double()
        method.micro_batch = micro_batch
        found.append({name: term.value for name, term in method(batch).items()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_weight_of_zero_switches_a_term_off(weight: str) -> None:
    method = made(**{weight: 0})
    left = tuple(name for name, off in zip(TERMS, WEIGHTS, strict=True) if off != weight)
    assert method.term_names == left == tuple(method(random_batch(3)))
    assert (method.project is None) == (weight == "global_weight")


def test_without_graph_terms_no_level_is_read() -> None:
    method = made(inner_weight=0, local_weight=0, global_weight=0)
    assert method.teacher_detail == "global"
    assert made().teacher_detail == "dense"
    assert set(method(random_batch(3))) == {"contrastive", "similarity"}


def test_layers_by_name_and_share() -> None:
    student, teacher = make_model(depth=3), make_teacher()
    settings = {"student_layer": "blocks.1", "teacher_layer": 0.5}
    method = make_method("trg_token_graph", student=student, teacher=teacher, settings=settings)
    assert isinstance(method, TokenGraph)
    assert method.student_needs.image_levels == ("blocks.1",)
    assert method.teacher_needs.image_levels == ("blocks.0",)
    with pytest.raises(ValueError, match=r"no image level 'blocks\.7' .*known: blocks\.0"):
        make_method("trg_token_graph", student=student, teacher=teacher, settings={"student_layer": "blocks.7"})
    with pytest.raises(ValueError, match="0 is no share of the depth"):
        TokenGraphConfig(name="trg_token_graph", teacher_layer=0.0)
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        TokenGraphConfig(name="trg_token_graph", tokens=1)
    with pytest.raises(ValueError, match=r"must be above 0, got 0\.5 and 0"):
        TokenGraphConfig(name="trg_token_graph", global_temperature=(0.5, 0.0))

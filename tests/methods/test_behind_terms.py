"""Terms of methods over models that write: what must learn for them, and where their gradients are compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cmapkd.config import ConfigError
from cmapkd.methods.stages import WHOLE_RUN, StageConfig
from writers import WRITERS, batch_of, make_task

AT_PROJECTOR = {"form": "one_stage", "relation_level": "projector"}
EVERY = [
    *((name, {}) for name in WRITERS if name != "sft"),
    ("switch_kd", {"switch": "projector"}),
    ("switch_kd", {"visual_weight": 0}),
    ("llava_kd", AT_PROJECTOR),
    ("align_kd", {"focus": 2, "vision_weight": 0}),
    ("align_kd", {"focus": 2, "vision_weight": 0, "attention_weight": 0}),
]


@pytest.mark.parametrize(("name", "settings"), EVERY, ids=str)
def test_every_term_has_a_gradient_where_gradients_are_compared(name: str, settings: dict[str, Any]) -> None:
    """Sums of terms are divided together, so a matrix that a term does not reach has a gradient of zero, not none."""
    method = make_task(name, **settings)
    shared = method.shared_parameters()
    assert shared
    terms = method(batch_of(method, range(3)))
    assert terms
    for term, each in terms.items():
        gradients = torch.autograd.grad(each.value, list(shared.values()), retain_graph=True)
        reached = {name for name, gradient in zip(shared, gradients, strict=True) if gradient.abs().max() > 0}
        assert reached == set(shared), term


def test_gradients_are_compared_before_what_the_stage_compares() -> None:
    method = make_task("switch_kd")
    assert "vision" in next(iter(method.shared_parameters()))
    method.enter(StageConfig(name="a", share=1.0, terms=("answers", "distillation")))
    assert "language_model" in next(iter(method.shared_parameters()))


RELATION_ALONE = {**AT_PROJECTOR, "answers_weight": 0, "distill_weight": 0, "visual_weight": 0}


@pytest.mark.parametrize(
    ("name", "settings", "parts", "message"),
    [
        ("switch_kd", {}, ["projector", "language"], "visual_switch trains the student's vision, and nothing of it"),
        ("switch_kd", {"switch": "projector"}, ["language"], "visual_switch trains the student's vision or projector"),
        ("llava_kd", RELATION_ALONE, ["language"], "relation trains the student's vision or projector"),
        ("align_kd", {"focus": 2}, ["language"], "vision trains the student's vision or projector"),
    ],
)
def test_terms_that_nothing_which_learns_can_change_are_refused(
    name: str, settings: dict[str, Any], parts: list[str], message: str
) -> None:
    method = make_task(name, **settings)
    method.check_stages([WHOLE_RUN])
    with pytest.raises(ConfigError, match=rf"stage 'some': the term {message}"):
        method.check_stages([WHOLE_RUN, StageConfig(name="some", share=1.0, train=tuple(parts))])
    method.check_stages([StageConfig(name="other", share=1.0, train=(parts[0], "vision"))])
    method.train_only(parts)
    for stages in ([], [WHOLE_RUN]):
        with pytest.raises(ConfigError, match=rf"this run: the term {message}"):
            method.check_stages(stages)


def test_stages_without_the_term_need_none_of_its_parts() -> None:
    method = make_task("switch_kd")
    method.train_only(["projector", "language"])
    method.check_stages([StageConfig(name="a", share=1.0, terms=("answers", "distillation"))])
    less = make_task("switch_kd", visual_weight=0)
    less.train_only(["projector"])
    less.check_stages([WHOLE_RUN])
    maps = make_task("align_kd", focus=2)  # a stage of the method's own modules warms them up
    maps.check_stages([StageConfig(name="a", share=1.0, terms=("vision",), train=("modules",))])


@pytest.mark.parametrize(("name", "settings"), [("llava_kd", AT_PROJECTOR), ("align_kd", {"focus": 2})])
def test_tokens_of_pictures_are_counted_on_the_host(
    name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts of the models' rows would be waited for, once in each part of each step."""
    method = make_task(name, **settings)
    batch = batch_of(method, range(4))
    assert method.visual_counts(batch) == ([4, 4, 4, 0], [9, 9, 9, 0])
    monkeypatch.setattr(torch, "bincount", None)
    assert "weighted" not in method(batch)

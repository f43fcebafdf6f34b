"""What every method keeps to, and the terms of the simple ones."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmapkd.methods import METHODS, MethodConfig, StepInfo
from cmapkd.models import Features, TowerFeatures
from cmapkd.models.tiny import TinyDualEncoder
from cmapkd.objectives import contrastive_loss, sigmoid_loss, similarity_divergence
from helpers import (
    CLASSIFYING,
    DUAL,
    MASKED,
    ONE_WIDTH,
    into_first_stage,
    make_method,
    make_model,
    make_teacher,
    random_batch,
)

POLICY = {"name": "policy", "warmup_steps": 1, "window": 2, "edge": 1}
DRAWS = (
    "bank",
    "policy of levels",
    "policy of terms",
    "prompts",
    "masks",
    "c2kd",
    "clip_refine",
    "dmae",
    "tipsv2",
    "trg_token_graph",
    "zscl",
)
DISTILLING = [name for name, kind in METHODS.items() if kind.uses_teacher and name in DUAL]


@pytest.mark.parametrize("name", METHODS)
def test_card_says_what_a_reader_must_know(name: str) -> None:
    card = METHODS[name].card
    for text in (card.title, card.paper, card.needs, card.trainable, card.checked_against):
        assert len(text) > 10
    assert "arXiv" in card.paper or "http" in card.paper
    assert card.equations
    assert any(line.startswith("L ") for line in card.equations)
    assert all(card.departures)
    assert (METHODS[name].__doc__ or "").strip()


@pytest.mark.parametrize("name", METHODS)
def test_settings_are_described_and_have_defaults(name: str) -> None:
    config = METHODS[name].Config
    assert issubclass(config, MethodConfig)
    assert all(field.description for field in config.model_fields.values())
    assert config(name=name).name == name


@pytest.mark.parametrize("name", [*DUAL, *CLASSIFYING])
def test_terms_are_scalars_that_train_the_student(name: str) -> None:
    method = make_method(name)
    terms = method(random_batch(4, pools=method.text_pools, views=method.more_views))
    assert terms
    loss = torch.stack([term.weight * term.value for term in terms.values()]).sum()
    loss.backward()
    learning = [(key, parameter) for key, parameter in method.named_parameters() if parameter.requires_grad]
    assert any(key.startswith("student.") for key, _ in learning)
    assert not [key for key, parameter in learning if parameter.grad is None]
    assert all(bool(parameter.grad.isfinite().all()) for parameter in method.parameters() if parameter.grad is not None)


DRAWING: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in (*DUAL, *CLASSIFYING)},
    "bank": ("cmapkd", {"bank": {"size": 24, "sample": 4}}),
    "policy of levels": ("cmapkd", {"weighting": POLICY}),
    "policy of terms": ("clip_kd", {"term_weighting": POLICY}),
    "prompts": ("hinton", {"form": "classes"}),
    "masks": ("tinyclip", MASKED),
}
"""Every method as it is, and what else draws in a step."""


@pytest.mark.parametrize("name", DRAWING)
def test_terms_are_the_same_whatever_the_process_draws_itself(name: str) -> None:
    """Several processes, at any resume, must compute one loss: what they draw is a function of seed, step and name."""
    kind, settings = DRAWING[name]
    values = []
    for own_seed, seed in ((0, 5), (1, 5), (0, 6)):
        method = make_method(kind, settings=settings).train()
        if name == "masks":
            into_first_stage(method)
        torch.manual_seed(own_seed)
        before = torch.get_rng_state()
        for step in range(6):
            batch = random_batch(8, seed=step, pools=method.text_pools, views=method.more_views)
            named = replace(batch, ids=tuple(f"{step}-{i}" for i in range(8)))
            terms = method(named, StepInfo(step, 6, method.stage, step / 6, seed))
        assert torch.equal(torch.get_rng_state(), before)
        values.append({key: term.value.detach() for key, term in terms.items()})
    first, again, other = values
    assert all(torch.equal(first[key], again[key]) for key in first)
    draws = name in DRAWS
    assert draws == any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", DISTILLING)
def test_teacher_is_refused_when_missing(name: str) -> None:
    with pytest.raises(ValueError, match="distils from a teacher: name one"):
        METHODS[name](METHODS[name].Config(name=name), student=make_model(), teacher=None)


@pytest.mark.parametrize("name", DISTILLING)
def test_teacher_only_answers(name: str) -> None:
    teacher = make_teacher(dim=16) if name in ONE_WIDTH else make_teacher()
    before = {key: value.clone() for key, value in teacher.model.state_dict().items()}
    method = make_method(name, teacher=teacher)
    batch = random_batch(4, views=method.more_views)
    mine = {id(parameter) for parameter in method.parameters()}
    assert not mine & {id(parameter) for parameter in teacher.model.parameters()}
    assert not any(key.startswith("teacher.") for key in method.state_dict())
    theirs = {value.data_ptr() for value in teacher.model.state_dict().values()}
    assert not theirs & {value.data_ptr() for value in method.state_dict().values()}
    assert teacher.model not in set(method.modules())
    method.train()
    assert method.student.training
    assert not any(module.training for module in teacher.model.modules())
    torch.stack([term.value for term in method(batch).values()]).sum().backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.model.parameters())
    optimizer = torch.optim.SGD(method.parameters(), lr=1.0)
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in teacher.model.state_dict().items())
    answers = method.encode_teacher(batch)
    assert not answers.image.embedding.requires_grad
    assert not answers.text.embedding.requires_grad


def test_teacher_is_never_saved_and_shared_by_copies() -> None:
    method = make_method("hinton")
    with pytest.raises(TypeError, match="never saved"):
        pickle.dumps(method.teacher)
    assert copy.deepcopy(method).teacher is method.teacher


def embeddings(features: Features) -> tuple[Tensor, Tensor]:
    return features.image.embedding, features.text.embedding


def test_contrastive_term() -> None:
    method = make_method("contrastive")
    batch = random_batch(5)
    student = method.encode_student(batch)
    (term,) = method.terms(batch).values()
    torch.testing.assert_close(term.value, contrastive_loss(*embeddings(student), logit_scale=student.logit_scale))


class BiasedStudent(TinyDualEncoder):
    """With a logit bias, as SigLIP's."""

    @property
    def logit_bias(self) -> Tensor:
        if "bias" not in self._parameters:
            self.bias = nn.Parameter(torch.tensor(-5.0))
        return self.bias


def test_a_student_with_a_bias_is_trained_with_the_sigmoid_loss() -> None:
    method = make_method("contrastive", student=make_model(kind=BiasedStudent))
    batch = random_batch(5)
    student = method.encode_student(batch)
    expected = sigmoid_loss(*embeddings(student), logit_scale=student.logit_scale, logit_bias=-5.0)
    torch.testing.assert_close(method.terms(batch)["contrastive"].value, expected)


def test_hinton_terms() -> None:
    method = make_method("hinton", settings={"temperature": 2.0, "distill_weight": 3.0, "task_weight": 0.5})
    batch = random_batch(5)
    student, teacher = method.encode_student(batch), method.encode_teacher(batch)
    terms = method.terms(batch)
    assert {name: term.weight for name, term in terms.items()} == {"contrastive": 0.5, "similarity": 3.0}
    expected = similarity_divergence(
        *embeddings(student),
        *embeddings(teacher),
        student_scale=student.logit_scale,
        teacher_scale=teacher.logit_scale,
        temperature=2.0,
    )
    torch.testing.assert_close(terms["similarity"].value, expected)


def test_projector_maps_both_modalities_and_is_the_identity_at_equal_width() -> None:
    from cmapkd.features import PairProjector

    features = Features(TowerFeatures(torch.randn(3, 4)), TowerFeatures(torch.randn(3, 4)), torch.tensor(2.0))
    wide = PairProjector(4, 6)(features)
    assert wide.image.embedding.shape == wide.text.embedding.shape == (3, 6)
    same = PairProjector(4, 4)
    assert not list(same.parameters())
    assert not list(PairProjector(4, 4, shared=True).parameters())
    assert torch.equal(same(features).text.embedding, features.text.embedding)


def test_shared_projector_is_one_map_that_begins_by_keeping_every_cosine() -> None:
    from cmapkd.features import PairProjector

    features = Features(TowerFeatures(torch.randn(3, 4)), TowerFeatures(torch.randn(3, 4)), torch.tensor(2.0))
    project = PairProjector(4, 6, shared=True)
    assert [*project.state_dict()] == ["both.weight"]  # a tensor under two names could not be saved

    def cosines(pair: Features) -> torch.Tensor:
        image, text = (torch.nn.functional.normalize(x.embedding, dim=-1) for x in (pair.image, pair.text))
        return image @ text.T

    torch.testing.assert_close(cosines(project(features)), cosines(features))

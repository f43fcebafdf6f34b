"""CLIP-CID: its terms written out, its clusters through a checkpoint, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from cmapkd.config import ConfigError
from cmapkd.features.closed_form import spherical_kmeans
from cmapkd.methods.clip_cid import ClipCid, ClipCidConfig
from cmapkd.methods.targets import Answered
from helpers import made_up, make_method, make_model, make_teacher, random_batch


def unprepared(**settings: Any) -> ClipCid:
    return ClipCid(ClipCidConfig(name="clip_cid", **settings), student=make_model(), teacher=make_teacher())


def test_terms_are_the_formulas_written_out() -> None:
    method, batch = make_method("clip_cid").double(), random_batch(6, dtype=torch.float64)
    assert isinstance(method, ClipCid)
    assert method.teacher is not None
    method.teacher.model.double()
    with torch.no_grad():
        terms = method.terms(batch)
        student, teacher = method.encode_student(batch), method.encode_teacher(batch)
        own = normalize(method.project(student.image.embedding), dim=-1) @ method.centres.T / 0.07
        theirs = normalize(teacher.image.embedding, dim=-1) @ method.centres.T / 0.07
    expected = 0.0
    for i in range(6):
        p, q = theirs[i].softmax(0), own[i].softmax(0)
        expected += sum(float(p[k] * (p[k] / q[k]).log()) for k in range(len(method.centres))) / 6
    assert terms["cluster"].value.item() == pytest.approx(expected, rel=1e-5)  # centres are of length one in float32
    assert {name: term.weight for name, term in terms.items()} == dict.fromkeys(
        ("contrastive", "cluster", "instance"), 1
    )
    hinton = make_method("hinton").double()
    hinton.teacher.model.double()
    assert terms["instance"].value.item() == pytest.approx(hinton.terms(batch)["similarity"].value.item(), rel=1e-9)


def test_centres_are_those_of_kmeans_and_return_from_a_checkpoint() -> None:
    method, batch = make_method("clip_cid"), random_batch(4)
    rows = Answered.joined(made_up()()).image
    expected = spherical_kmeans(rows, 5, torch.Generator().manual_seed(0))  # one for each 8 of 40
    assert torch.equal(method.centres, expected)
    again = unprepared()
    with pytest.raises(ValueError, match="no clusters yet"):
        again.terms(batch)
    again.restructure(method.structure)
    again.load_state_dict(method.state_dict())
    for name, term in method.terms(batch).items():
        assert torch.equal(again.terms(batch)[name].value, term.value)
    control = make_method("clip_cid", settings={"clusters": 7, "centres": "random"})
    units = normalize(rows, dim=-1)
    alike, place = (control.centres @ units.T).max(1)
    assert float(alike.min()) > 1 - 1e-5  # each is a picture's
    assert len(set(place.tolist())) == 7


def test_too_few_samples_for_the_clusters_are_refused() -> None:
    for settings, number, needed in (({"clusters": 9}, 8, 9), ({}, 15, 16)):
        message = rf"the teacher answers {number} samples where {needed} are needed: take a data\.train with more"
        with pytest.raises(ConfigError, match=message):
            unprepared(**settings).prepare(made_up(number))


def test_without_its_cluster_term_it_builds_nothing() -> None:
    method = unprepared(cluster_weight=0)
    assert not method.prepares
    assert set(method.terms(random_batch(4))) == {"contrastive", "instance"}

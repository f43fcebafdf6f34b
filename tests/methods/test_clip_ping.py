"""CLIP-PING: its terms in loops, its support through a checkpoint, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cmapkd.config import ConfigError
from cmapkd.features import sample_keys
from cmapkd.methods.clip_ping import ClipPing, ClipPingConfig
from helpers import made_up, make_method, make_model, make_teacher, random_batch

BATCH = 6


def clip_ping(**settings: Any) -> ClipPing:
    method = make_method("clip_ping", settings={"store": "fp32", **settings}).double()
    assert isinstance(method, ClipPing)
    assert method.teacher is not None
    method.teacher.model.double()
    return method


def unprepared(**settings: Any) -> ClipPing:
    config = ClipPingConfig(name="clip_ping", **settings)
    return ClipPing(config, student=make_model(), teacher=make_teacher())


def nce(x: Tensor, y: Tensor, same: list[int], scale: float) -> float:
    """Symmetric, where entries of one neighbour are no negatives of each other."""
    x, y = normalize(x, dim=-1), normalize(y, dim=-1)
    total = 0.0
    for one, other in ((x, y), (y, x)):
        for i in range(len(x)):
            kept = [j for j in range(len(x)) if j == i or same[j] != same[i]]
            total -= math.log(
                math.exp(scale * float(one[i] @ other[i]))
                / sum(math.exp(scale * float(one[i] @ other[j])) for j in kept)
            )
    return total / (2 * len(x))


@pytest.mark.parametrize("neighbours", ["nearest", "shuffled"])
@torch.no_grad()
def test_terms_are_the_loops(neighbours: str) -> None:
    method = clip_ping(neighbours=neighbours)
    batch = random_batch(BATCH, dtype=torch.float64)  # its samples m0 to m5 are in the support
    terms = method.terms(batch)
    student, teacher, bank = method.encode_student(batch), method.encode_teacher(batch), method.support
    keys, entries = sample_keys(batch.ids), {"image": bank.image, "text": bank.text}
    found: dict[str, list[int]] = {}
    for tower, rows in entries.items():
        queries = getattr(teacher, tower).embedding
        found[tower] = []
        for query, key in zip(queries, keys, strict=True):
            cosines = [-2 if bank.keys[j] == key else float(normalize(query, dim=0) @ rows[j]) for j in range(40)]
            nearest = cosines.index(max(cosines))
            other = (nearest + 1 + int(key) % 38) % 40
            found[tower].append(nearest if neighbours == "nearest" else other + int(bank.keys[other] == key))
    own = {"image": method.to_image(student.image.embedding), "text": method.to_text(student.text.embedding)}
    for name, by in (("nn", {"image": "image", "text": "text"}), ("xnn", {"image": "text", "text": "image"})):
        expected = sum(
            nce(own[tower], entries[tower][found[by[tower]]], found[by[tower]], 1 / 0.07) / 2 for tower in entries
        )
        assert terms[name].value.item() == pytest.approx(expected, rel=1e-6)  # the scale is a float32 logarithm
    assert tuple(terms) == method.term_names == ("contrastive", "nn", "xnn")
    assert {term.weight for term in terms.values()} == {1.0}


def test_equal_neighbours_are_no_negatives() -> None:
    """All samples have one neighbour: nothing is left to tell apart."""
    method, batch = clip_ping(task_weight=0), random_batch(BATCH, seed=1, dtype=torch.float64)
    for bank, tower in ((method.support.image, "image"), (method.support.text, "text")):
        mean = normalize(getattr(method.encode_teacher(batch), tower).embedding.mean(0), dim=0)
        bank.copy_(-mean)
        bank[9] = mean
    terms = method.terms(batch)
    assert {name: term.value.item() for name, term in terms.items()} == {"nn": 0.0, "xnn": 0.0}


@torch.no_grad()
def test_the_same_thing_under_another_name_is_no_neighbour() -> None:
    method, batch = clip_ping(), random_batch(BATCH, dtype=torch.float64)
    teacher, bank = method.encode_teacher(batch), method.support
    image, text = (normalize(tower.embedding, dim=-1)[0] for tower in (teacher.image, teacher.text))

    def found(of_image: Tensor, of_text: Tensor) -> list[int]:
        """The neighbours of the first sample, beside this further entry."""
        bank.image[10], bank.text[10] = normalize(of_image, dim=-1), normalize(of_text, dim=-1)
        return [int(places[0]) for places in method._neighbours(batch, teacher)]

    without = found(-image, -text)
    assert 10 not in without
    assert found(image, text) == without  # the pair once more
    assert found(image, text + 0.05 * bank.text[11]) == without  # the picture with another caption
    assert found(-image, text) == without
    assert found(image + 0.3 * bank.image[11], -text)[0] == 10  # a picture that is alike
    bank.image[:], bank.text[:] = image, text  # nothing else is left: by names alone
    assert [places[0].item() for places in method._neighbours(batch, teacher)] == [1, 1]


@torch.no_grad()
def test_shuffled_is_never_the_sample_itself() -> None:
    method, batch = clip_ping(neighbours="shuffled"), random_batch(BATCH, dtype=torch.float64)
    teacher, bank = method.encode_teacher(batch), method.support
    offsets = (1 + sample_keys(batch.ids) % (bank.size - 2)).tolist()
    assert len(set(offsets)) > 1  # samples that share a neighbour do not share what stands in its place
    for place, (offset, image) in enumerate(zip(offsets, normalize(teacher.image.embedding, dim=-1), strict=True)):
        neighbour = (place - offset) % bank.size  # so far before the sample itself
        before = bank.image.clone()
        bank.image[neighbour] = 0.9 * image + 0.1 * bank.image[neighbour]
        assert method._neighbours(batch, teacher)[0][place] == place + 1
        bank.image.copy_(before)
    small = unprepared(neighbours="shuffled")
    with pytest.raises(ConfigError, match="neither the neighbour nor the sample itself, and of 2 samples none is left"):
        small.prepare(made_up(number=2))


def test_gradients_reach_the_student_both_maps_and_the_scale() -> None:
    method = clip_ping(task_weight=0)
    terms = method.terms(random_batch(BATCH, dtype=torch.float64))
    (terms["nn"].value + terms["xnn"].value).backward()
    without = {name for name, parameter in method.named_parameters() if parameter.grad is None}
    assert without == {"student._log_logit_scale"}


def test_a_term_of_weight_zero_is_not_computed() -> None:
    method = clip_ping(nn_weight=0, xnn_weight=0)
    method.encode_teacher = None  # type: ignore[method-assign, assignment]  nobody asks it
    assert tuple(method.terms(random_batch(BATCH, dtype=torch.float64))) == ("contrastive",)


def test_the_support_is_in_checkpoints_with_its_size() -> None:
    before, batch = make_method("clip_ping"), random_batch(BATCH)
    again = unprepared()
    with pytest.raises(ValueError, match="no support yet"):
        again.terms(batch)
    assert before.structure == {"support": 40}
    again.restructure(before.structure)
    again.load_state_dict(before.state_dict())
    for name, term in before.terms(batch).items():
        assert torch.equal(again.terms(batch)[name].value, term.value)


def test_the_support_is_as_large_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []

    def survey(role: str = "teacher", *, num: int | None = None, **_: Any) -> Any:
        asked.append(num)
        return made_up(number=num or 40)()

    method = unprepared(support=7)
    method.prepare(survey)
    assert asked == [7]
    assert method.support.image.shape == (7, 24)
    assert method.support.image.dtype == torch.float16


def test_one_sample_has_no_neighbour() -> None:
    with pytest.raises(ConfigError, match=r"the teacher answers 1 sample: take a data\.train with more samples"):
        unprepared().prepare(made_up(number=1))

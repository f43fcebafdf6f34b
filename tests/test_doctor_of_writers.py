"""The doctor's findings on models that write: each fault is planted, and found."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from cmapkd.data.open import open_source
from cmapkd.data.prompting import Prompting
from cmapkd.data.turns import Turn
from cmapkd.diagnosis.diagnose import _of_teacher
from cmapkd.diagnosis.writing import Asked, check_dialogues, check_looks, check_start, check_top
from cmapkd.models import GenerativeModel, build_model
from cmapkd.run import RunConfig

pytestmark = pytest.mark.usefixtures("one_thread")


class _Blind(nn.Module):
    """A projector that gives every picture the same tokens, as a splice at the wrong place would."""

    def __init__(self, projector: nn.Module) -> None:
        super().__init__()
        self.projector = projector

    def forward(self, values: Tensor) -> Tensor:
        return torch.zeros_like(self.projector(values))


@pytest.fixture(scope="module")
def teacher() -> GenerativeModel:
    model = build_model("tiny_vlm:scenes-teacher")
    assert isinstance(model, GenerativeModel)
    return model


@pytest.fixture(scope="module")
def asked() -> Asked:
    return Asked.of(open_source("scenes@val?length=40"), Prompting(kind="captions"))


def test_a_teacher_that_looks_and_one_that_cannot(teacher: GenerativeModel, asked: Asked) -> None:
    (looks,) = check_looks("teacher", teacher, asked)
    assert looks.level == "ok"
    blind = copy.deepcopy(teacher)
    blind.model.model.multi_modal_projector = _Blind(blind.model.model.multi_modal_projector)  # type: ignore[attr-defined]
    (found,) = check_looks("teacher", blind, asked)
    assert found.level == "problem"
    assert "it does not look at the picture" in found.detail


@pytest.mark.parametrize(("factor", "level"), [(1.0, "ok"), (1e3, "note"), (float("nan"), "problem")])
def test_weights_that_cannot_be_right(teacher: GenerativeModel, asked: Asked, factor: float, level: str) -> None:
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        model.model.lm_head.weight.mul_(factor)  # type: ignore[attr-defined]
    (found,) = check_start(model, asked)
    assert found.level == level
    assert found.detail.endswith("check its weights") == (level != "ok")


def test_a_dialogue_of_which_nothing_is_learned(teacher: GenerativeModel, asked: Asked) -> None:
    dialogue = (Turn("user", "What is this?", pictures=1), Turn("assistant", "red", learned=False))
    nothing = Asked(asked.source, [*asked.dialogues[:3], dialogue], [*asked.indices[:3], asked.indices[3]])
    read, told = check_dialogues("teacher", teacher, nothing, max_tokens=None, max_bad_share=0.5)
    assert (read.level, read.detail.startswith("of 3 read: 16 visual tokens")) == ("ok", True)
    assert told.level == "note"
    assert told.detail == "25% cannot be used, the first: the last answer is marked as one that is not learned"


def test_an_image_encoder_beside_a_writer_has_been_trained(teacher: GenerativeModel, asked: Asked) -> None:
    values = {"student": "tiny_vlm:small", "method": "sft", "data": {"train": "scenes"}, "training": {"steps": 2}}
    config, expert = RunConfig.from_mapping(values), build_model("tiny:debug", captions=["a red square"])
    (found,) = _of_teacher(config, "teacher", expert, teacher, asked.source, asked)
    assert (found.level, found.what) == ("problem", "teacher weights")
    expert.random_towers = ("text",)  # which is not read
    assert not [*_of_teacher(config, "teacher", expert, teacher, asked.source, asked)]


def test_the_probability_that_a_cache_leaves_out(teacher: GenerativeModel, asked: Asked) -> None:
    shares = []
    for number in (1, 8):
        (found,) = check_top("teacher", teacher, asked, number, 1.0)
        assert found.level == "ok"
        shares.append(float(found.detail.split("leave out ")[1].split(" %")[0]))
    assert 100 > shares[0] > shares[1] > 0
    (found,) = check_top("teacher", teacher, asked, teacher.vocabulary.size, 1.0)
    assert found.level == "note"

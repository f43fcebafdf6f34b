"""A model that writes is asked in one call; the output of a command holds nothing that a library says."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from PIL import Image

from cmapkd.data.types import BadSampleError
from cmapkd.models import GenerativeModel, build_model, load_model
from cmapkd.models.asking import dialogues
from cmapkd.models.quiet import quiet

RED, BLUE = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
TINY = {"name": "tiny_vlm:small", "options": {"vision_layers": 1, "layers": 1, "width": 32, "vision_width": 48}}


@pytest.fixture(scope="module")
def model() -> GenerativeModel:
    from cmapkd.models import ModelConfig

    torch.manual_seed(0)
    made = build_model(ModelConfig.from_mapping(TINY), captions=["Is there a red circle?", "yes", "two squares"] * 4)
    assert isinstance(made, GenerativeModel)
    return made


def test_one_of_either_goes_with_all_of_the_other() -> None:
    asked = list(dialogues(RED, ["What?", "Why?"]))
    assert [(turns[0].text, turns[0].pictures, seen) for turns, seen in asked] == [
        ("What?", 1, [RED]),
        ("Why?", 1, [RED]),
    ]
    shown = list(dialogues([RED, None], "What?"))
    assert [(turns[0].pictures, len(seen)) for turns, seen in shown] == [(1, 1), (0, 0)]
    assert len(list(dialogues(None, "What?"))) == 1
    assert list(dialogues([], "What?")) == []


def test_pairs_must_fit() -> None:
    with pytest.raises(ValueError, match="2 pictures and 3 questions: give one for each"):
        list(dialogues([RED, BLUE], ["a", "b", "c"]))
    with pytest.raises(TypeError, match="question 1 is of type int"):
        list(dialogues(RED, ["a", 3]))  # type: ignore[list-item]


def test_answers_are_those_of_each_pair_alone(model: GenerativeModel, tmp_path: Path) -> None:
    RED.save(tmp_path / "red.png")
    pictures, questions = [tmp_path / "red.png", BLUE, None], ["What is it?", "Is it a red circle?", "Say something."]
    together = model.answer(pictures, questions, max_new_tokens=6)
    alone = [model.answer(*pair, max_new_tokens=6)[0] for pair in zip(pictures, questions, strict=True)]
    assert together == alone == model.answer(pictures, questions, max_new_tokens=6, batch_size=2)
    assert len(together) == 3
    assert all(isinstance(text, str) for text in together)


def test_a_saved_model_answers_alike_and_its_modes_stay(model: GenerativeModel, tmp_path: Path) -> None:
    model.save(tmp_path / "student")
    again = load_model(tmp_path)
    assert isinstance(again, GenerativeModel)
    again.train()
    assert again.answer(RED, "What is it?", max_new_tokens=5) == model.answer(RED, "What is it?", max_new_tokens=5)
    assert again.training
    assert not any(parameter.grad is not None for parameter in again.parameters())


def test_wrong_questions_and_numbers_are_told(model: GenerativeModel) -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        model.answer(RED, "What?", batch_size=0)
    with pytest.raises(ValueError, match="more than 512"):
        model.answer(RED, "word " * 400)
    with pytest.raises(FileNotFoundError, match="image 0"):
        model.answer("nowhere.png", "What?")
    with pytest.raises(BadSampleError, match="image 0"):
        model.answer(b"no picture", "What?")


def test_saving_and_loading_say_nothing(
    model: GenerativeModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging as library

    level = logging.getLogger("torch.utils._pytree").level
    with quiet():
        model.save(tmp_path / "model")
        for _ in library.tqdm(range(2)):
            pass
    load_model(tmp_path / "model")
    assert capfd.readouterr().err == ""
    assert logging.getLogger("torch.utils._pytree").level == level
    for _ in library.tqdm(range(1), desc="its own"):  # bars are back
        pass
    assert "its own" in capfd.readouterr().err

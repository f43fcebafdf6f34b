"""VQA v2's files, and question sets in tars."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from making import picture, write_zip

from cmapkd.config import ConfigError
from cmapkd.data.open import open_source
from cmapkd.data.prompting import Prompting
from cmapkd.data.readers import ChatReader
from cmapkd.data.types import BadSampleError, QuestionAnswer
from cmapkd.data.views import WHOLE, draw_view
from cmapkd.models import GenerativeModel, build_model


def ten(*answers: str) -> list[dict[str, Any]]:
    return [{"answer": answers[i % len(answers)], "answer_confidence": "yes", "answer_id": i + 1} for i in range(10)]


QUESTIONS = [
    {"image_id": 42, "question": "What colour is it?", "question_id": 420},
    {"image_id": 7, "question": "How many?", "question_id": 70},
    {"image_id": 42, "question": "Is it a cat? ", "question_id": 421},
]
ANNOTATIONS = [
    {"question_id": 70, "image_id": 7, "answer_type": "number", "question_type": "how many", "answers": ten("2", "3")},
    {"question_id": 420, "image_id": 42, "answer_type": "other", "question_type": "what", "answers": ten("red")},
    {"question_id": 421, "image_id": 42, "answer_type": "yes/no", "question_type": "is", "answers": ten("yes", "no")},
]


def write(folder: Path, questions: list[Any] | None = None, annotations: list[Any] | None = None) -> str:
    """The two files; their names joined as a source names them."""
    first, second = folder / "questions.json", folder / "annotations.json"
    given = QUESTIONS if questions is None else questions
    first.write_text(json.dumps({"data_subtype": "val2014", "questions": given, "license": {}}))
    second.write_text(json.dumps({"annotations": ANNOTATIONS if annotations is None else annotations}))
    return f"{first},{second}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "val2014").mkdir()
    for number in (7, 42):
        (tmp_path / "val2014" / f"COCO_val2014_{number:012d}.jpg").write_bytes(picture(number))
    return tmp_path


def test_questions_of_one_image_are_one_sample(folder: Path) -> None:
    source = open_source(f"vqa:{write(folder)},{folder}/val2014")
    assert [source[i].id for i in range(len(source))] == ["42", "7"]
    sample = source[0]
    assert sample.image.getpixel((0, 0)) == (42, 0, 0)
    assert sample.captions == ()
    assert sample.questions == (
        QuestionAnswer("What colour is it?", ("red",) * 10, "other", "420"),
        QuestionAnswer("Is it a cat?", ("yes", "no") * 5, "yes/no", "421"),
    )
    assert source[1].questions[0].kind == "number"
    assert len(open_source(f"vqa:{write(folder)},{folder}/val2014?limit=1")) == 1


@pytest.mark.parametrize("name", ["val2014/COCO_val2014_{:012d}.jpg", "{:012d}.jpg", "{}.jpg", "{}.png", "{}"])
def test_other_names_of_images(folder: Path, name: str) -> None:
    images = write_zip(folder / "images.zip", [(name.format(number), picture(number)) for number in (7, 42)])
    source = open_source(f"vqa:{write(folder)},{images}")
    assert source[1].image.getpixel((0, 0)) == (7, 0, 0)


def test_without_annotations(folder: Path) -> None:
    write(folder)
    source = open_source(f"vqa:{folder}/questions.json,{folder}/val2014")
    assert source[1].questions == (QuestionAnswer("How many?", (), "other", "70"),)


def test_bad_entries(folder: Path) -> None:
    questions = [*QUESTIONS, {"image_id": 9, "question": "Gone?", "question_id": 90}, {"question_id": 99}]
    questions += [
        {"image_id": 10, "question": None, "question_id": 100},
        {"image_id": 11, "question": "?", "question_id": 1},
    ]
    questions += [{"image_id": 12, "question": "No answers?", "question_id": 2}, {"image_id": 13, "question": "No id?"}]
    kinds = {90: "other", 99: "other", 100: "other", 1: "colour"}
    annotations = [*ANNOTATIONS, {"question_id": 2, "answer_type": "other"}]
    annotations += [{"question_id": i, "answer_type": kind, "answers": ten("a")} for i, kind in kinds.items()]
    (folder / "val2014" / "COCO_val2014_000000000011.jpg").write_bytes(picture(1))
    source = open_source(f"vqa:{write(folder, questions, annotations)},{folder}/val2014")
    found = {}
    for index in range(len(source)):
        try:
            _ = source[index]
        except BadSampleError as error:
            found[error.sample_id] = error.reason
    assert set(found) == {"9", "10", "11", "12", "row-0", "row-1"}
    assert found["9"] == "image file is missing: COCO_val2014_000000000009.jpg"
    assert "question is malformed: \"{'question_id': 99}\" has no question_id or names no image" in found["row-0"]
    assert "'No id?'}" in found["row-1"]
    assert "answer is not text: '{}'" in found["12"]
    assert "qa is malformed" in found["10"]
    assert "kind of question is unknown: 'colour'" in found["11"]


def test_answers_that_are_missing_or_of_another_split(folder: Path) -> None:
    for questions, answered, message in (
        (
            QUESTIONS,
            ANNOTATIONS[1:],
            "1 questions have no annotation, such as 70: both files must be of the same split",
        ),
        (QUESTIONS[1:], ANNOTATIONS, "1 annotations have no question, such as 420"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_source(f"vqa:{write(folder, questions, answered)},{folder}/val2014")


def test_refusals(folder: Path) -> None:
    files = write(folder)
    first, second = files.split(",")
    (folder / "broken.json").write_text("[")
    (folder / "list.json").write_text("[]")
    for spec, message in {
        f"{first}": "must name questions, annotations and images",
        f"{files},{files},{folder}": "must name questions, annotations and images",
        f"{second},{first},{folder}/val2014": "'questions' in the first file",
        f"{folder}/broken.json,{folder}/val2014": "is not JSON",
        f"{folder}/list.json,{folder}/val2014": "holds a list, not an object",
        f"{files},{folder}/val2015": "neither a folder nor a .zip. .*did you mean 'val2014'",
        f"{files},{folder}": "none of the first 2 images .*COCO_val2014_000000000042.jpg",
        f"{files},{folder}/val2014?split=x": "unknown option 'split'",
    }.items():
        with pytest.raises(ConfigError, match=message):
            open_source(f"vqa:{spec}")


def test_fingerprint_follows_the_files(folder: Path) -> None:
    before = open_source(f"vqa:{write(folder)},{folder}/val2014").fingerprint()
    changed = [*ANNOTATIONS[:2], ANNOTATIONS[2] | {"answers": ten("no")}]
    assert open_source(f"vqa:{write(folder, annotations=changed)},{folder}/val2014").fingerprint() != before


def test_easy_vqa(shared: Path) -> None:
    source = open_source(f"webdataset:{shared}/easy_vqa/dev-*.tar")
    samples = [source[i] for i in range(0, 500, 25)]
    answers = set(json.loads((shared / "easy_vqa" / "answers.json").read_text()))
    assert len(source) == 500
    assert all(set(question.answers) <= answers for sample in samples for question in sample.questions)
    kinds = {question.kind for sample in samples for question in sample.questions}
    assert kinds == {"yes/no", "other"}
    assert samples[0].image.size == (64, 64)
    assert samples[0].captions == ()


def test_nlvr(shared: Path) -> None:
    source = open_source(f"webdataset:{shared}/nlvr/dev-*.tar")
    assert len(source) == 1467
    for index in range(0, 1467, 100):
        (question,) = source[index].questions
        assert question.kind == "yes/no"
        assert question.answers in (("true",), ("false",))
        assert bool(source[index].captions) == (question.answers == ("true",))


@pytest.mark.parametrize("name", ["easy_vqa", "nlvr"])
def test_their_questions_are_dialogues_of_a_model_that_writes(shared: Path, name: str) -> None:
    model = build_model("tiny_vlm:scenes-teacher")
    assert isinstance(model, GenerativeModel)
    source, prompting = open_source(f"webdataset:{shared}/{name}/dev-*.tar"), Prompting(suffix="Say one word.")
    for index in range(0, 60, 20):
        sample = source[index]
        dialogue = prompting.choose(sample, draw_view(sample.id, 0, WHOLE, sample.image.size), 0)
        asked = next(each for each in sample.questions if dialogue[0].text.startswith(each.question))
        assert dialogue[0].text.endswith("Say one word.")
        assert dialogue[1].text in asked.answers
        item = ChatReader(model.processor).read(sample.image, None, dialogue)
        assert int(item.visual.sum()) == 16
        assert int(item.answer.sum()) == len(model.processor.encode_answer(dialogue[1].text))

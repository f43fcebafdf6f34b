"""VQA v2 as it is downloaded: a file of questions, one of annotations, and a folder of COCO images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cmapkd.config import ConfigError
from cmapkd.data.coco import NamedImages
from cmapkd.data.folders import open_images
from cmapkd.data.places import existing_file
from cmapkd.data.reading import Images
from cmapkd.data.rows import Columns
from cmapkd.data.stored import SampleFilter
from cmapkd.data.tables import FIRST_IMAGES, TableSource, hash_file

EXAMPLE = "vqa:v2_OpenEnded_mscoco_val2014_questions.json,v2_mscoco_val2014_annotations.json,val2014"

_COLUMNS = Columns(("image",), (), ("id",), ())


def open_vqa(rest: str, *, keep: SampleFilter | None = None) -> TableSource:
    """`QUESTIONS_JSON,ANNOTATIONS_JSON,IMAGES`, or without annotations where there are none (test-dev).

    A sample is an image with all its questions; its id is the image's number.

    Raises:
        ConfigError: a file is missing or not of VQA's form, or questions and annotations are not of the same split.
    """
    *names, folder = [part.strip() for part in rest.split(",")]
    if len(names) not in (1, 2) or not all((*names, folder)):
        raise ConfigError(f"vqa:{rest} must name questions, annotations and images: {EXAMPLE}")
    paths = [existing_file(name, "vqa questions or annotations") for name in names]
    contents = [_read(path) for path in paths]
    keys = [next((key for key in ("questions", "annotations") if isinstance(values.get(key), list)), None)
            for values in contents]  # fmt: skip
    if keys != ["questions", "annotations"][: len(keys)]:
        raise ConfigError(f"vqa:{rest} needs a list 'questions' in the first file and 'annotations' in the second")
    questions = contents[0]["questions"]
    annotations = _annotations(rest, questions, contents[1]["annotations"]) if len(contents) == 2 else None
    images = NamedImages(open_images(folder, "vqa images"))
    rows = _rows(questions, annotations, _name_form(questions, str(contents[0].get("data_subtype")), images))
    digest = "\0".join(hash_file(path) for path in paths)
    return TableSource(f"vqa:{rest}", enumerate(rows), images, columns=_COLUMNS, contents=digest, keep=keep)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"vqa file {str(path)!r} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"vqa file {str(path)!r} holds a {type(values).__name__}, not an object as VQA v2 has it")
    return values


def _annotations(rest: str, questions: list[Any], annotations: list[Any]) -> dict[Any, Mapping[str, Any]]:
    """Annotations by question id; every question has one, and there are no others."""
    found: dict[Any, Mapping[str, Any]] = {each["question_id"]: each for each in annotations if _numbered(each)}
    asked = {each["question_id"] for each in questions if _numbered(each)}
    for what, missing in (("questions have no annotation", asked - set(found)),
                          ("annotations have no question", set(found) - asked)):  # fmt: skip
        if missing:
            raise ConfigError(
                f"vqa:{rest}: {len(missing)} {what}, such as {min(missing, key=str)!r}: both files must be of the "
                "same split."
            )
    return found


def _numbered(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("question_id"), int | str)


def _rows(
    questions: list[Any], annotations: Mapping[Any, Mapping[str, Any]] | None, form: str
) -> Iterator[Mapping[str, Any] | str]:
    """One row an image, with all its questions."""
    rows: dict[Any, dict[str, Any]] = {}
    for question in questions:
        image = question.get("image_id") if _numbered(question) else None
        if not isinstance(image, int | str) or isinstance(image, bool):
            yield f"question is malformed: {str(question)[:60]!r} has no question_id or names no image"
            continue
        row = rows.setdefault(image, {"id": image, "image": _name(form, image), "qa": []})
        identity = question.get("question_id")
        said = {"answers": []} if annotations is None else annotations[identity]
        row["qa"].append({
            "question": question.get("question"), "answers": said.get("answers", [{}]),  # {}: makes the sample bad
            "kind": said.get("answer_type"), "id": identity,
        })  # fmt: skip
    yield from rows.values()


def _name_form(questions: list[Any], subset: str, images: Images) -> str:
    """How image files are named: as COCO 2014 or 2017 does, or by the number alone."""
    named = (each.get("image_id") for each in questions if _numbered(each))
    numbers = [number for number in named if isinstance(number, int | str)][:FIRST_IMAGES]
    forms = (f"COCO_{subset}_PADDED.jpg", "PADDED.jpg", "NUMBER.jpg", "NUMBER.png", "NUMBER")
    return next((form for form in forms if any(images.has(_name(form, number)) for number in numbers)), forms[0])


def _name(form: str, image: int | str) -> str:
    padded = f"{image:012d}" if isinstance(image, int) else image
    return form.replace("PADDED", padded).replace("NUMBER", str(image))

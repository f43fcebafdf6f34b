"""VQA v2 as it is downloaded: a file of questions, one of annotations, and a folder of COCO images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cmapkd.config import ConfigError
from cmapkd.data.folders import open_images
from cmapkd.data.places import existing_file
from cmapkd.data.reading import Images
from cmapkd.data.stored import Keep
from cmapkd.data.tables import FIRST_IMAGES, Columns, TableSource, hash_file

_COLUMNS = Columns(("image",), (), ("id",), ())


def open_vqa(rest: str, *, keep: Keep | None = None) -> TableSource:
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
    images = open_images(folder, "vqa images")
    rows = _rows(questions, annotations, _name_of(questions, str(contents[0].get("data_subtype")), images))
    digest = "\0".join(hash_file(path) for path in paths)
    return TableSource(f"vqa:{rest}", enumerate(rows), images, columns=_COLUMNS, contents=digest, keep=keep)


EXAMPLE = "vqa:v2_OpenEnded_mscoco_val2014_questions.json,v2_mscoco_val2014_annotations.json,val2014"


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
    found = {each.get("question_id"): each for each in annotations if isinstance(each, dict)}
    asked = {each.get("question_id") for each in questions if isinstance(each, dict)}
    for what, missing in (("questions have no annotation", asked - set(found)),
                          ("annotations have no question", set(found) - asked)):  # fmt: skip
        if missing:
            raise ConfigError(
                f"vqa:{rest}: {len(missing)} {what}, such as {min(missing, key=str)!r}: both files must be of the "
                "same split."
            )
    return found


def _rows(
    questions: list[Any], annotations: Mapping[Any, Mapping[str, Any]] | None, name_of: Any
) -> Iterator[Mapping[str, Any] | str]:
    """One row an image, with all its questions."""
    rows: dict[Any, dict[str, Any]] = {}
    for question in questions:
        image = question.get("image_id") if isinstance(question, dict) else None
        if not isinstance(image, int | str) or isinstance(image, bool):
            yield f"question is malformed: {str(question)[:60]!r} names no image"
            continue
        row = rows.setdefault(image, {"id": image, "image": name_of(image), "qa": []})
        identity = question.get("question_id")
        said = annotations[identity] if annotations is not None else {}
        row["qa"].append({
            "question": question.get("question"), "answers": said.get("answers"), "kind": said.get("answer_type"),
            "id": identity,
        })  # fmt: skip
    yield from rows.values()


def _name_of(questions: list[Any], subset: str, images: Images) -> Any:
    """From an image's number to its file: as COCO 2014 or 2017 name it, or the number itself."""
    numbers = [each["image_id"] for each in questions if isinstance(each, dict) and "image_id" in each][:FIRST_IMAGES]

    def padded(image: Any) -> str:
        return f"{image:012d}" if isinstance(image, int) else str(image)

    forms = [lambda image: f"COCO_{subset}_{padded(image)}.jpg", lambda image: f"{padded(image)}.jpg"]
    forms += [lambda image, suffix=suffix: f"{image}.{suffix}" for suffix in ("jpg", "png")]  # type: ignore[misc]
    forms.append(str)
    return next((form for form in forms if any(images.has(form(number)) for number in numbers)), forms[0])

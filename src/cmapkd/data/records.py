"""What is said of an image, read from the keys that public data sets use: captions, label, questions, boxes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cmapkd.data.turns import Dialogue
from cmapkd.data.types import BadSampleError, Box, QuestionAnswer, Source

CAPTION_KEYS = (
    "captions", "caption", "texts", "text", "title", "sentences", "sentence", "alt_text", "description", "descriptions",
)  # fmt: skip
IMAGE_KEYS = (
    "image", "filepath", "file_name", "filename", "file", "path", "image_path", "img", "jpg", "png", "images",
    "image_file", "image_name", "img_path", "picture", "photo", "photograph",
)  # fmt: skip
ID_KEYS = ("id", "key", "image_id", "sample_id")
LABEL_KEYS = ("label", "labels", "cls", "class")
TEXT_KEYS = {"synthetic": ("synthetic", "syn_text")}  # further texts that are always read, by pool: keys that hold them
QUESTION_KINDS = ("yes/no", "number", "other")

MAX_TEXT_BYTES = 16 * 2**20
MAX_CAPTION = 100_000  # characters
MAX_WORD = 2_000
"""Characters without a space between: tokenizers take time by their square, CLIP's 17 seconds for 16,000."""


class Unusable(ValueError):
    """The reason for a bad sample, raised where its id is not known; sources turn it into `BadSampleError`."""


class Unreachable(Unusable):
    """The same where the sample may be good, and what holds it cannot be had now."""


@dataclass(frozen=True, slots=True)
class Record:
    """A sample without its image. `captions` is None where nothing is said of captions, () where there are none.

    Attributes:
        turns: a dialogue.
        no_turns: why the dialogue that stands there cannot be used; none where it can, or where there is no dialogue.
        text_only: whether there is a dialogue, no image and nothing else that could be said of one.
    """

    captions: tuple[str, ...] | None = None
    label: int | None = None
    questions: tuple[QuestionAnswer, ...] = ()
    boxes: tuple[Box, ...] = ()
    texts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    turns: Dialogue = ()
    text_only: bool = False
    no_turns: str | None = None

    @property
    def silent(self) -> bool:
        """Whether nothing is said beside a dialogue."""
        return not (self.captions or self.label is not None or self.questions or self.boxes)


def iter_captions(source: Source) -> Iterator[str]:
    """Every caption of every readable sample, in order, without decoding images."""
    for index in range(len(source)):
        try:
            yield from source.captions(index)
        except BadSampleError:
            continue


def parse_json(data: bytes, what: str = "json") -> dict[str, Any]:
    """A JSON object.

    Raises:
        Unusable: not UTF-8, not JSON, not an object, or too large.
    """
    if len(data) > MAX_TEXT_BYTES:
        raise Unusable(f"{what} is too large: {len(data)} bytes, limit {MAX_TEXT_BYTES}")
    try:
        values = json.loads(decode_text(data, what))
    except RecursionError:
        raise Unusable(f"{what} is malformed: nested too deeply") from None
    except ValueError as error:
        if isinstance(error, Unusable):
            raise
        raise Unusable(f"{what} is malformed: {error}") from None
    if not isinstance(values, dict):
        raise Unusable(f"{what} is malformed: it holds a {type(values).__name__}, not an object")
    return values


def decode_text(data: bytes, what: str) -> str:
    if len(data) > MAX_TEXT_BYTES:
        raise Unusable(f"{what} is too large: {len(data)} bytes, limit {MAX_TEXT_BYTES}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unusable(f"{what} is not UTF-8: byte {data[error.start]:#04x} at {error.start}") from None


def parse_lines(text: str) -> tuple[str, ...]:
    """Captions of a text file: one a line, blank lines left out."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def parse_record(
    values: Mapping[str, Any],
    *,
    caption_keys: Sequence[str] = CAPTION_KEYS,
    label_keys: Sequence[str] = LABEL_KEYS,
    labels: Mapping[str, int] | None = None,
    texts: Sequence[str] = (),
) -> Record:
    """Reads captions (the first of `caption_keys` that is there), label, questions, boxes and further texts.

    Args:
        labels: numbers of class names, for labels given as text.
        texts: keys of further pools of text beside `TEXT_KEYS`, which are the pools' names.
    Raises:
        Unusable: a key is there with a value that cannot be what it says.
    """
    captions = next((parse_captions(values[key]) for key in caption_keys if values.get(key) is not None), None)
    label = next((parse_label(values[key], labels) for key in label_keys if values.get(key) is not None), None)
    return Record(captions, label, tuple(_questions(values)), tuple(_boxes(values)), parse_texts(values, texts))


def parse_texts(values: Mapping[str, Any], more: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
    """Texts of the pools that a record has, each from the first of its keys that is there; `more` are pools by key.

    Raises:
        Unusable: a key holds something else than text.
    """
    found = {
        pool: next((parse_captions(values[key]) for key in keys if values.get(key) is not None), ())
        for pool, keys in (TEXT_KEYS | {pool: (pool,) for pool in more}).items()
    }
    return {pool: texts for pool, texts in found.items() if texts}


def parse_id(values: Mapping[str, Any], keys: Sequence[str] = ID_KEYS) -> str | None:
    """The id of a record as text; None where it has none.

    Raises:
        Unusable: the id is neither text nor a whole number.
    """
    value = next((values[key] for key in keys if values.get(key) is not None), None)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int) or str(value).strip() == "":
        raise Unusable(f"id is neither text nor a whole number: {str(value)[:60]!r}")
    return check_text(str(value).strip(), "id")


def parse_captions(value: Any) -> tuple[str, ...]:
    """One text or a list of them, stripped, empty ones left out; lists of {"raw": ...} as Karpathy writes them too."""
    entries = value if isinstance(value, list | tuple) else [value]
    captions = []
    for entry in entries:
        text = entry.get("raw") if isinstance(entry, dict) else entry
        if _missing(text):
            continue
        if not isinstance(text, str):
            raise Unusable(f"caption is not text: {type(text).__name__}")
        if text.strip():
            captions.append(check_caption(text.strip()))
    return tuple(captions)


def check_text(text: str, what: str) -> str:
    """Refuses text that is no Unicode: bytes that were not UTF-8 (read as lone surrogates), or half a JSON escape."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        found = f"byte {code - 0xDC00:#04x}" if 0xDC80 <= code <= 0xDCFF else f"lone surrogate U+{code:04X}"
        raise Unusable(f"{what} is not UTF-8: {found} at character {error.start}") from None
    return text


def check_caption(text: str, what: str = "caption") -> str:
    """Refuses what is no Unicode, and what is too long for a tokenizer."""
    if len(text) > MAX_CAPTION:
        raise Unusable(f"{what} is too long: {len(text)} characters, limit {MAX_CAPTION}")
    if len(text) > MAX_WORD and (longest := max(map(len, text.split()))) > MAX_WORD:
        raise Unusable(f"{what} is too long: {longest} characters without a space, limit {MAX_WORD}")
    return check_text(text, what)


def parse_label(value: Any, labels: Mapping[str, int] | None = None) -> int:
    if isinstance(value, str) and labels is not None and value.strip() in labels:
        return labels[value.strip()]
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            raise Unusable(f"label is unknown: {value.strip()!r} is neither a number nor a known class name") from None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise Unusable(f"label is not a class number: {value!r}")
    return value


def _questions(values: Mapping[str, Any]) -> Iterator[QuestionAnswer]:
    question, (key, entries) = values.get("question"), _listed(values)
    if isinstance(question, str):
        yield _question(question, _answer(values))
    elif not _missing(question):
        raise Unusable(f"question is not text: {str(question)[:60]!r}")
    for entry in entries:
        if isinstance(entry, dict) and isinstance(entry.get("question"), str):
            identity = parse_id(entry, ("question_id", "id"))
            yield _question(entry["question"], _answer(entry), entry.get("kind"), identity, _category(entry))
        elif isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str):
            yield _question(entry[0], entry[1])
        else:
            raise Unusable(
                f"{key} is malformed: {str(entry)[:60]!r} is neither [question, answer] nor an object with both"
            )


def _listed(values: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """The key of a record's list of questions, and what it holds, each entry with its answer."""
    there = [key for key in ("qa", "questions") if not _missing(values.get(key))]
    if not there:
        return "qa", []
    if len(there) > 1:
        raise Unusable("there are qa and questions: give only one of the two")
    (key,), alone = there, _missing(values.get("question"))
    entries, answers = _from_json(values[key], key), _from_json(values.get("answers"), "answers")
    if not isinstance(entries, list):
        raise Unusable(f"{key} is not a list of questions and answers: {type(entries).__name__}")
    if not (entries and all(isinstance(entry, str) for entry in entries)):
        if alone and not _missing(answers):
            raise Unusable(f"answers stand beside {key}, whose entries have their own: leave one of the two out")
        return key, entries
    if not alone:
        raise Unusable(f"answers could be those of question or of {key}: give only one of the two")
    if not isinstance(answers, list) or len(answers) != len(entries):
        found = f"{len(answers)} answers" if isinstance(answers, list) else "no list of answers"
        raise Unusable(f"{key} has {len(entries)} questions as text, but beside them: {found}")
    return key, [[question, answer] for question, answer in zip(entries, answers, strict=True)]


def _from_json(value: Any, key: str) -> Any:
    """A list that a table holds as JSON text, as a list."""
    if not (isinstance(value, str) and value.lstrip().startswith("[")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        if key == "answers":  # a text that begins with a bracket
            return value
        raise Unusable(f"{key} is malformed: neither a list nor the JSON of one") from None


def _missing(value: Any) -> bool:
    """Whether this is no value, or a table's missing one."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _category(entry: Mapping[str, Any]) -> str | None:
    category = entry.get("category")
    if category is not None and not isinstance(category, str):
        raise Unusable(f"category of a question is not text: {str(category)[:60]!r}")
    return category


def _answer(values: Mapping[str, Any]) -> Any:
    key = next((key for key in ("answer", "answers") if values.get(key) is not None), None)
    return [] if key is None else _from_json(values[key], key) if key == "answers" else values[key]


def _question(
    question: str, answer: Any, kind: Any = None, identity: str | None = None, category: str | None = None
) -> QuestionAnswer:
    """`kind` is read off the answers where the data does not say it."""
    entries = answer if isinstance(answer, list) else [answer]
    answers = []
    for entry in entries:
        value = entry.get("answer", entry) if isinstance(entry, dict) else entry  # VQA v2: [{"answer": "yes", ...}]
        if _missing(value):
            continue
        if isinstance(value, bool):
            value = "true" if value else "false"
        if not isinstance(value, str | int | float):
            raise Unusable(f"answer is not text: {str(value)[:60]!r}")
        answers.append(check_text(str(value).strip(), "answer"))
    if kind is not None and kind not in QUESTION_KINDS:
        raise Unusable(f"kind of question is unknown: {str(kind)[:40]!r} is none of {', '.join(QUESTION_KINDS)}")
    text = check_caption(question.strip(), "question")
    return QuestionAnswer(text, tuple(answers), kind or kind_of(answers), identity, category)


def kind_of(answers: Sequence[str]) -> str:
    """`yes/no`, `number` or `other`, read off the answers."""
    if answers and all(answer.lower() in ("yes", "no", "true", "false") for answer in answers):
        return "yes/no"
    if answers and all(answer.isdecimal() for answer in answers):
        return "number"
    return "other"


def _boxes(values: Mapping[str, Any]) -> Iterator[Box]:
    entries = values.get("boxes")
    if not isinstance(entries, list):
        return
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise Unusable(f"box is malformed: {str(entry)[:60]!r} has no name")
        box = [entry.get(key) for key in ("x", "y", "width", "height")]
        yield parse_box(box, entry["name"], crowd=bool(entry.get("crowd")), area=entry.get("area"))


def parse_box(numbers: Any, name: str, *, crowd: bool = False, area: Any = None) -> Box:
    """A box from [left, top, width, height]."""
    if not isinstance(numbers, list) or len(numbers) != 4 or not all(map(_finite, numbers)):
        raise Unusable(f"box is malformed: {str(numbers)[:60]} is not four finite numbers")
    if area is not None and (not _finite(area) or area < 0):
        raise Unusable(f"box is malformed: its area {str(area)[:60]} is not a number of square pixels")
    x, y, width, height = (float(number) for number in numbers)
    if width < 0 or height < 0:
        raise Unusable(f"box is malformed: width {width:g} and height {height:g} must not be negative")
    return Box(x, y, width, height, check_text(name, "box name"), crowd, None if area is None else float(area))


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

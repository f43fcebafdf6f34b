"""Whether a sample's texts have a caption and an id, by a glance: what is odd is left to `read_record`."""

from __future__ import annotations

import json
import re
from typing import Any

from cmapkd.data.tar_names import JSON_CAPTION_KEYS

_LONG = 1000  # characters of a text or an id: longer ones are left to `read_record`, below every limit of `records`

# Keys whose values need more than a look: parse_record, parse_id and with_turns read them.
ODD_KEYS = frozenset(
    {"label", "cls", "question", "questions", "qa", "boxes", "synthetic", "syn_text", "messages", "conversations"}
    | {"prompt", "completion", "chosen", "rejected", "query", "response", "history", "system"}
)
_PLAIN_JSON = re.compile(rb'\s*\{\s*"caption"\s*:\s*"[!#-\[\]-~]')  # an object that begins with a caption

# What a text member says of its sample.
NOT_THERE, SAYS, NO_KEY, EMPTY, ODD = range(5)


def glance(data: bytes) -> tuple[int, str | None]:
    """Whether a sample's JSON has a caption, and its id; ODD where `read_record` must tell.

    A damaged JSON may seem to have a caption. Its sample is not silent either, and has no id of its own.
    """
    if (
        _PLAIN_JSON.match(data) is not None
        and data.count(b'"caption"') == 1
        and b'"captions"' not in data
        and b'"id"' not in data
        and b"\\u" not in data  # with which these keys could be written in other letters
    ):
        return SAYS, None
    try:
        values = _decode(data.decode())
    except (ValueError, RecursionError):
        return ODD, None
    if type(values) is not dict or not ODD_KEYS.isdisjoint(values):
        return ODD, None
    identity = values.get("id")
    if identity is not None:
        identity = str(identity).strip() if type(identity) is int and abs(identity) < 2**63 else identity
        if type(identity) is not str or not (identity := identity.strip()) or not _is_short(identity):
            return ODD, None
    for key in JSON_CAPTION_KEYS:
        said = values.get(key)
        if said is not None:
            return glance_at_captions(said), identity
    return NO_KEY, identity


def glance_at_captions(said: Any) -> int:
    """Whether the value of a JSON's caption key has a caption."""
    if type(said) is str and said.isascii() and 0 < len(said) <= _LONG and not said[0].isspace():
        return SAYS
    found = EMPTY
    for text in said if type(said) is list else (said,):
        if type(text) is not str or not _is_short(text):
            return ODD
        if found == EMPTY and text.strip():
            found = SAYS
    return found


def glance_at_text(data: bytes) -> int:
    """Whether a text file has a caption."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return ODD
    if not _is_short(text):
        return ODD
    return SAYS if text.strip() else EMPTY


def _is_short(text: str) -> bool:
    return len(text) <= _LONG and (text.isascii() or not any(0xD800 <= ord(letter) < 0xE000 for letter in text))


_decode = json.JSONDecoder().decode

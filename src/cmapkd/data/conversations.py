"""Dialogues as public data sets write them: TRL, ms-swift, LLaVA and ShareGPT, queries with responses."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cmapkd.data.records import Record, Unusable, check_caption
from cmapkd.data.turns import Dialogue, Role, Turn

PLACEHOLDER = "<image>"
"""Where a picture stands in a text, as LLaVA and ms-swift write it."""

_PAIRED = ("chosen", "rejected")  # a good and a worse answer, behind a prompt or with it in front of both

TURN_KEYS = ("messages", "conversations", "prompt", "completion", "query", "response", "history", "system", *_PAIRED)
"""Every key that dialogues are read from."""

UNREAD_KEYS = ("videos", "audios", "tools")
"""Keys of the same formats whose values change what an answer means, and that nobody here reads."""

MAX_TURNS = 1000

_ROLES: Mapping[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


@dataclass(frozen=True, slots=True)
class _Said:
    """A turn as it is written: pieces of text, None where a picture stands."""

    role: Role
    pieces: tuple[str | None, ...]
    learned: bool = True


def with_turns(record: Record, values: Mapping[str, Any], *, pictures: int) -> Record:
    """The record with the dialogue that stands beside it, if there is one.

    A dialogue that cannot be used leaves its reason in `no_turns`: models that read captions do without it. Once the
    record is whole, `checked_turns` refuses one that says nothing else.

    Args:
        pictures: how many the record names.
    """
    try:
        turns = parse_turns(values, pictures=pictures)
    except Unusable as error:
        return replace(record, no_turns=str(error))
    return replace(record, turns=turns, text_only=record.silent and not pictures) if turns else record


def checked_turns(record: Record) -> Record:
    """The record itself.

    Raises:
        Unusable: a dialogue that cannot be used is all that it says.
    """
    if record.no_turns is not None and record.silent:
        raise Unusable(record.no_turns)
    return record


def is_dialogue(values: Mapping[str, Any]) -> bool:
    """Whether a dialogue stands under these keys."""
    together = (("messages",), ("conversations",), ("prompt", "completion"), ("query", "response"), _PAIRED)
    return any(all(values.get(key) is not None for key in keys) for keys in together)


def parse_turns(values: Mapping[str, Any], *, pictures: int) -> Dialogue:
    """The dialogue of a record, in the one form that everything else reads; () where there is none.

    A system turn may stand first. Then user and assistant take turns, and the last turn is an assistant's that is
    learned: turns after it teach nothing and are left out. A picture stands before the text of its user turn, also
    where the data write it behind the text. Where the texts of a dialogue are plain and none of them has a placeholder,
    the picture stands in the first user turn, as TRL and ms-swift have it; LLaVA's form must write its placeholder.

    Args:
        pictures: how many the record names; 0 or 1 in this version.
    Raises:
        Unusable: a turn cannot be what its key says, or placeholders and pictures do not agree.
    """
    if all(values.get(key) is not None for key in _PAIRED):
        return _with_rejected(values, pictures=pictures)
    said, may_be_implied = _written(values)
    if not said:
        return ()
    _refuse_unread(values)
    if pictures > 1:
        raise Unusable(f"dialogue has {pictures} pictures: one is read")
    shown = sum(piece is None for each in said for piece in each.pieces)
    if shown == 0 and pictures == 1 and may_be_implied:
        first = next((place for place, each in enumerate(said) if each.role == "user"), None)
        if first is not None:
            said[first] = replace(said[first], pieces=(None, *said[first].pieces))
            shown = 1
    if shown != pictures:
        raise Unusable(f"dialogue has {shown} placeholders of pictures, but {pictures} pictures")
    return _checked([_turn(each) for each in said])


def _with_rejected(values: Mapping[str, Any], *, pictures: int) -> Dialogue:
    """The dialogue that ends with the chosen answer, beside which the rejected one stands.

    A prompt is under its own key, or begins both dialogues, which then are alike up to their last turn. Where a whole
    dialogue stands beside them too, it must be the chosen one.

    Raises:
        Unusable: one of the two is no dialogue, they have other prompts or are the same, or another stands beside them.
    """
    _refuse_unread(values)
    prompt = values["prompt"] if values.get("prompt") is not None else values.get("query")
    others, history = {"system": values.get("system")}, values.get("history")
    if history and prompt is None:
        raise Unusable("history stands beside chosen and rejected without the prompt that follows it")

    def ending(key: str) -> Dialogue:
        said = values[key]
        if history:
            return parse_turns({"query": prompt, "response": said, "history": history, **others}, pictures=pictures)
        if prompt is not None:
            return parse_turns({"prompt": prompt, "completion": said, **others}, pictures=pictures)
        entries = _list(said, key)
        own = "conversations" if entries and isinstance(entries[0], dict) and "from" in entries[0] else "messages"
        return parse_turns({own: entries, **others}, pictures=pictures)

    chosen, rejected = (ending(key) for key in _PAIRED)
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("the chosen and the rejected answer are not to the same prompt")
    if chosen[-1].text == rejected[-1].text:
        raise Unusable("the chosen and the rejected answer are the same")
    alone = {key: value for key, value in values.items() if key not in _PAIRED}
    if is_dialogue(alone) and _or_none(alone, pictures=pictures) != chosen:
        raise Unusable("a dialogue stands beside chosen and rejected, and is not the chosen one: leave one out")
    return (*chosen[:-1], replace(chosen[-1], rejected=rejected[-1].text))


def _or_none(values: Mapping[str, Any], *, pictures: int) -> Dialogue | None:
    try:
        return parse_turns(values, pictures=pictures)
    except Unusable:
        return None


def _refuse_unread(values: Mapping[str, Any]) -> None:
    for key in UNREAD_KEYS:
        if values.get(key):
            raise Unusable(f"dialogue has {key}, which are not read")


def _written(values: Mapping[str, Any]) -> tuple[list[_Said], bool]:
    """The turns of the first format that is there, and whether its picture may go without a placeholder."""
    system = [_Said("system", _text(values["system"], "system"))] if values.get("system") else []
    if values.get("messages") is not None:
        messages = _messages(values["messages"], "messages", "role", "content")
        return messages if messages[0].role == "system" else [*system, *messages], _all_plain(values["messages"])
    if values.get("conversations") is not None:
        entries = _messages(values["conversations"], "conversations", "from", "value")
        return entries if entries[0].role == "system" else [*system, *entries], False
    if values.get("prompt") is not None and values.get("completion") is not None:
        prompt, completion = values["prompt"], values["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            asked = [_Said("user", _text(prompt, "prompt")), _Said("assistant", _text(completion, "completion"))]
            return [*system, *asked], True
        parts = [
            _messages(part, key, "role", "content") for part, key in ((prompt, "prompt"), (completion, "completion"))
        ]
        return [*parts[0], *parts[1]], _all_plain(prompt) and _all_plain(completion)
    if values.get("query") is not None and values.get("response") is not None:
        pairs = [*_history(values.get("history")), (values["query"], values["response"])]
        return system + [
            turn
            for query, response in pairs
            for turn in (_Said("user", _text(query, "query")), _Said("assistant", _text(response, "response")))
        ], True
    return [], False


def _history(value: Any) -> Iterator[tuple[Any, Any]]:
    entries = [] if value is None else _list(value, "history")
    for entry in entries:
        if not isinstance(entry, list) or len(entry) != 2:
            raise Unusable(f"history is malformed: {str(entry)[:60]!r} is not a query and its response")
        yield entry[0], entry[1]


def _list(value: Any, key: str) -> list[Any]:
    """A list, also one that a table holds as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Unusable(f"{key} is malformed: neither a list nor the JSON of one") from None
    if not isinstance(value, list):
        raise Unusable(f"{key} is not a list of turns: {type(value).__name__}")
    if len(value) > MAX_TURNS:
        raise Unusable(f"{key} is too long: {len(value)} turns, limit {MAX_TURNS}")
    return value


def _messages(value: Any, key: str, role_key: str, text_key: str) -> list[_Said]:
    """Turns with a role and a content; each format's own keys go first, those of the other are read too."""
    said = []
    for entry in _list(value, key):
        role = (
            entry.get(role_key, entry.get("from" if role_key == "role" else "role"))
            if isinstance(entry, dict)
            else None
        )
        if not isinstance(role, str):
            raise Unusable(f"{key} is malformed: {str(entry)[:60]!r} has no {role_key}")
        if role not in _ROLES:
            raise Unusable(f"role is unknown: {role[:40]!r} is none of {', '.join(_ROLES)}")
        content = entry.get(text_key, entry.get("value" if text_key == "content" else "content"))
        pieces = _contents(content, key) if isinstance(content, list) else _text(content, key)
        loss = entry.get("loss")
        if not isinstance(loss, bool | None) or (loss and _ROLES[role] != "assistant"):
            raise Unusable(f"loss is malformed: {loss!r} of the {role}'s turn; only an assistant's turn is learned")
        said.append(_Said(_ROLES[role], pieces, loss is not False))
    if not said:
        raise Unusable(f"{key} is empty")
    return said


def _all_plain(value: Any) -> bool:
    return all(isinstance(entry.get("content"), str) for entry in _list(value, "messages"))


def _text(value: Any, what: str) -> tuple[str | None, ...]:
    """The pieces of a text with placeholders in it."""
    if not isinstance(value, str):
        raise Unusable(f"{what} is not text: {type(value).__name__}")
    pieces: list[str | None] = []
    for number, piece in enumerate(value.split(PLACEHOLDER)):
        pieces += ([None] if number else []) + ([piece.strip()] if piece.strip() else [])
    return tuple(pieces)


def _contents(entries: Sequence[Any], key: str) -> tuple[str | None, ...]:
    """The pieces of a content that is a list of texts and pictures."""
    pieces: list[str | None] = []
    for entry in entries:
        kind = entry.get("type") if isinstance(entry, dict) else None
        if kind == "image":
            named = next((name for name in ("image", "url", "path", "image_url") if entry.get(name)), None)
            if named:
                raise Unusable(f"{key} names a picture inside a turn ({named}): name it under images")
            pieces.append(None)
        elif kind == "text" and isinstance(entry.get("text"), str):
            if PLACEHOLDER in entry["text"]:
                raise Unusable(f"{PLACEHOLDER} stands in a text whose pictures are entries of a list")
            pieces += [entry["text"].strip()] if entry["text"].strip() else []
        else:
            raise Unusable(f"{key} is malformed: {str(entry)[:60]!r} is neither a text nor an image")
    return tuple(pieces)


def _turn(said: _Said) -> Turn:
    """A turn with its picture in front."""
    pieces = said.pieces
    shown = pieces.count(None)
    if shown and said.role != "user":
        raise Unusable(f"a picture stands in the {said.role}'s turn: only a user shows pictures")
    if shown and None not in (pieces[0], pieces[-1]):
        raise Unusable("a picture stands in the middle of a text: it is read before the text or behind it")
    text = "\n".join(piece for piece in pieces if piece is not None)
    return Turn(said.role, check_caption(text, "turn"), shown, said.learned)


def _checked(turns: Sequence[Turn]) -> Dialogue:
    """The turns up to the last one that is learned, in an order that can be."""
    for place, turn in enumerate(turns):
        if not turn.text and not turn.pictures:
            raise Unusable("answer is empty" if turn.role == "assistant" else f"the {turn.role}'s turn is empty")
        if turn.role == "system" and place:
            raise Unusable("a system turn does not stand first")
    spoken = [turn.role for turn in turns if turn.role != "system"]
    expected = ["user", "assistant"] * ((len(spoken) + 1) // 2)
    if spoken != expected[: len(spoken)]:
        raise Unusable(f"user and assistant do not take turns: {', '.join(spoken[:6])}")
    if not spoken or spoken[-1] != "assistant":
        raise Unusable("the last turn is not the assistant's")
    learned = [place for place, turn in enumerate(turns) if turn.role == "assistant" and turn.learned]
    if not learned:
        raise Unusable("nothing is learned: every turn of the assistant says loss: false")
    return tuple(turns[: learned[-1] + 1])

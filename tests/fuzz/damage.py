"""Ways to spoil bytes, JSON and text: pure functions of their input and a `random.Random`."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

CONTROL = "".join(map(chr, range(1, 32))) + "\x7f\x80\x9b\u200b\u202e\u2028\ufeff"
TERMINAL = "\x1b[2J\x1b[31m\x1b]0;owned\x07\x1b[8m"
HTML = "<script>alert(1)</script><img src=x onerror=alert(1)>&amp;|`]( javascript:x)"
MARKUP = "[/red][link=file:///etc/passwd]x[/][bold"

TEXTS: tuple[Callable[[Random], str], ...] = (
    lambda _: "",
    lambda _: "   \t ",
    lambda _: "\0",
    lambda _: "a\0b",
    lambda _: CONTROL,
    lambda _: TERMINAL,
    lambda _: HTML,
    lambda _: MARKUP,
    lambda _: "../../escape",
    lambda _: "${oc.env:HOME}",
    lambda _: "{0.__class__}%s%n",
    lambda draws: "x" * draws.choice((1_000, 70_000, 1_200_000)),
    lambda draws: "word " * draws.choice((2_000, 200_000)),
    lambda _: "\u0301" * 5_000,
    lambda _: "🙂👨‍👩‍👧" * 500,
    lambda draws: "".join(chr(draws.choice((draws.randrange(32, 0xD800), draws.randrange(0xE000, 0x110000)))) for _ in range(50)),
    lambda draws: "!" * draws.choice((10, 100_000)),
)  # fmt: skip


def odd_text(draws: Random) -> str:
    return draws.choice(TEXTS)(draws)


def not_utf8(draws: Random) -> bytes:
    return draws.choice(
        (b"caf\xe9", b"\xff\xfea\0b\0", b"\x80\x81", b"\xed\xa0\x80", b"ok \xc3", b"\xf8\x88\x80\x80\x80")
    )


def spoil(data: bytes, draws: Random) -> bytes:
    """Cuts, flips, overwrites, inserts or removes something."""
    if not data:
        return bytes(draws.randrange(256) for _ in range(draws.randrange(64)))
    how = draws.randrange(7)
    at = draws.randrange(len(data))
    if how == 0:
        return data[:at]
    if how == 1:
        changed = bytearray(data)
        for _ in range(draws.choice((1, 1, 1, 8, 64))):
            changed[draws.randrange(len(changed))] ^= 1 << draws.randrange(8)
        return bytes(changed)
    length = draws.choice((1, 4, 16, 512))
    if how == 2:
        return data[:at] + bytes(length) + data[at + length :]
    if how == 3:
        return data[:at] + draws.randbytes(length) + data[at:]
    if how == 4:
        return data[:at] + data[at + length :]
    if how == 5:
        return data[:at] + b"\xff" * min(length, 8) + data[at + min(length, 8) :]
    other = draws.randrange(len(data))
    return data[:at] + data[other:]


def odd_value(draws: Random) -> Any:
    """Something that is seldom expected where a JSON holds a text or a number."""
    deep: Any = 0
    for _ in range(draws.choice((3, 60))):
        deep = [deep]
    return draws.choice((
        None, True, False, 0, -1, 1.5, -0.0, 2**31, 2**63, -(2**63), 10**30, 10**400, 1e308, float("nan"), float("inf"),
        "", "0", "-1", "\ud800", "\udcff", "../../etc/passwd", "/etc/passwd", "a\0b", [], {}, [[]], [None], [{}], {"": None},
        ["x"] * 100, {"a": {"b": {"c": 1}}}, deep, odd_text(draws),
    ))  # fmt: skip


def change(values: Any, draws: Random) -> Any:
    """A copy of plain data with one to three things replaced, removed, doubled or moved."""
    values = copy.deepcopy(values)
    for _ in range(draws.choice((1, 1, 2, 3))):
        holder, key = draws.choice(_places(values) or [(None, None)])
        if holder is None:
            return odd_value(draws)
        how = draws.randrange(5)
        if how == 0:
            del holder[key]
        elif how == 1 and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif how == 2 and isinstance(holder, dict):
            holder[odd_text(draws)[:100]] = holder.pop(key)
        else:
            holder[key] = odd_value(draws)
    return values


def _places(values: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    if isinstance(values, dict | list):
        for key in values if isinstance(values, dict) else range(len(values)):
            found.append((values, key))
            found += _places(values[key])
    return found


def odd_json(values: Any, draws: Random) -> bytes:
    """Plain data as a JSON that is damaged, or whole with something odd in it."""
    how = draws.randrange(10)
    if how < 6:
        return json.dumps(change(values, draws)).encode("utf-8", "surrogatepass")
    text = json.dumps(values).encode()
    if how < 8:
        return spoil(text, draws)
    return draws.choice((
        b"", b"null", b"[]", b"{}", b"0", b'"text"', b"[" * 100_000, b'{"a":' * 50_000, b"9" * 10_000, b"\xef\xbb\xbf" + text,
        text.decode().encode("utf-16"), b"\0" * 100, text + text, b"[" + text + b"]", b'{"\xff": 1}', b"1e999", b"NaN",
    ))  # fmt: skip

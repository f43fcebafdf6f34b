"""The quick walk over a tar's headers says what `tarfile` says, of every tar of the corpus and of any text in one."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from corpus import KINDS, pairs, tar_of
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cmapkd.data.conversations import TURN_KEYS
from cmapkd.data.records import TEXT_KEYS, Unusable
from cmapkd.data.shard_index import build, pack
from cmapkd.data.tar_entries import whole_way
from cmapkd.data.tar_glance import EMPTY, NO_KEY, ODD, ODD_KEYS, SAYS, glance, glance_at_text
from cmapkd.data.tar_index import build_index, read_record
from cmapkd.data.tar_walk import Members, walk

FORMS = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT, "ustar": tarfile.USTAR_FORMAT}


def compare(path: Path) -> bool:
    """Checks that both ways give the same index, byte for byte; whether the quick one was taken."""
    status = path.stat()
    stamp = (status.st_size, status.st_mtime_ns)
    try:
        expected = pack(whole_way(path, stamp), stamp)
    except (Unusable, OSError) as error:
        with pytest.raises(type(error)) as found:
            build(str(path), stamp)
        assert str(found.value) == str(error)
        return False
    assert build(str(path), stamp) == expected
    return quick(path) is not None


def quick(path: Path) -> Members | None:
    with path.open("rb") as file:
        return walk(file.fileno(), os.fstat(file.fileno()).st_size)


@pytest.mark.parametrize("kind", ["tar, damaged", "tar, hostile members", "tar, odd records"])
def test_every_tar_of_the_corpus_has_one_index(kind: str, tmp_path: Path) -> None:
    taken = []
    for seed in range(60):
        folder = tmp_path / str(seed)
        folder.mkdir()
        KINDS[kind](Random(f"{kind} {seed}"), folder)
        taken.append(compare(folder / "a.tar"))
    assert kind != "tar, odd records" or all(taken)
    assert kind == "tar, odd records" or 3 < sum(taken) < 57  # both ways were tried


def written(path: Path, members: Iterable[tuple[tarfile.TarInfo, bytes]], form: str = "pax") -> Path:
    path.write_bytes(tar_of(members, FORMS[form]))
    return path


def member(name: str, data: bytes, **values: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    for key, value in values.items():
        setattr(info, key, value)
    return info, data


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_that_writers_use_are_walked(form: str, tmp_path: Path) -> None:
    long, accents = "x" * 120, "zwölf/été"
    lists = {
        "empty": [],
        "plain": pairs(5),
        "one window is too small": [(f"{n}.{kind}", bytes(9000 * n)) for n in range(4) for kind in ("png", "bin")],
        "apart": [*pairs(4)[::2], *pairs(4)[1::2]],
        "long name": [(f"{'a/' * 30}{'b' * 60}.png", b"x"), ("c.png", b"")],
        "twice": [*pairs(2), *pairs(1)],
        "texts": [("a.png", b""), ("a.txt", b"one"), ("b.png", b""), ("b.caption", b" \n"), ("c.png", b"")],
    }
    if form != "ustar":
        lists["longer and accents"] = [(f"{long}.png", b"x"), (f"{accents}.json", b'{"caption": "x"}')]
    for name, members in lists.items():
        path = tmp_path / f"{name}.tar"
        path.write_bytes(tar_of(members, FORMS[form]))
        assert compare(path), name
    timed = [member(f"{n}.txt", b"a", mtime=1e9 + n / 3 if form == "pax" else n, uid=3_000_000 * (form != "ustar"),
                    uname="ü") for n in range(3)]  # fmt: skip
    folder = [member(name, b"", type=tarfile.DIRTYPE) for name in ("folder", "folder.v2", "../out.png")] + timed
    assert compare(written(tmp_path / "t.tar", timed, form))
    assert compare(written(tmp_path / "d.tar", folder, form))


def test_what_is_odd_takes_the_whole_way(tmp_path: Path) -> None:
    odd = {
        "link": [member("a.png", b"", type=tarfile.SYMTYPE, linkname="b")],
        "outside": [member("../a.png", b"x")],
        "pax size": [member("a.png", b"x", pax_headers={"size": "1"})],
        "character set": [member("a.png", b"x", pax_headers={"hdrcharset": "BINARY"})],
        "a link's path": [member("a.png", b"x", pax_headers={"linkpath": "b"})],
        "sparse": [member("a.png", b"x", pax_headers={"GNU.sparse.major": "1"})],
    }
    for name, members in odd.items():
        assert not compare(written(tmp_path / f"{name}.tar", members)), name
    whole = tar_of(pairs(3))
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for name, data in {"no end": whole[:end], "cut": whole[:-11_000], "empty": b""}.items():
        (tmp_path / f"{name}.tar").write_bytes(data)
        assert not compare(tmp_path / f"{name}.tar"), name


@pytest.mark.parametrize("at", [0, 105, 113, 124, 130, 148, 156, 257, 330, 345, 511])
def test_any_byte_of_a_header_may_be_wrong(at: int, tmp_path: Path) -> None:
    whole = tar_of(pairs(3))
    path = tmp_path / "a.tar"
    for value in (0, 32, 48, 55, 56, 45, 95, 0x78, 0x4C, 0x80, 255):
        for mend in (False, True):  # with a checksum that does not hold, and with one that does
            data = bytearray(whole)
            header = 1024  # of the second member
            data[header + at] = value
            if mend:
                data[header + 148 : header + 156] = b" " * 8
                data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
            path.write_bytes(data)
            compare(path)


# ------------------------------------------------------------------------------------------------ texts

_KEYS = (
    "id",
    "caption",
    "captions",
    "url",
    "width",
    "label",
    "qa",
    "boxes",
    "synthetic",
    "messages",
    "system",
    "answer",
)
_TEXTS = st.text(max_size=8) | st.sampled_from(("", " ", "\x85", "one", "x" * 2000, "\ud800", "\ufeff"))
_VALUES = st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | _TEXTS
_ANY = _VALUES | st.lists(_VALUES, max_size=3) | st.dictionaries(_TEXTS, _VALUES, max_size=2)
_many = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def truth(texts: dict[str, bytes]) -> tuple[bool | None, str | None]:
    """Whether there is a caption, and the id, as they are read."""
    try:
        record, identity = read_record(texts)
    except Unusable:
        return None, None
    return bool(record.captions), identity


@_many
@given(st.dictionaries(st.sampled_from(_KEYS), _ANY, max_size=4), st.binary(max_size=2), st.integers(0, 12))
@example({"caption": "one", "id": 7}, b"", 0)
@example({"caption": "one", "label": "x"}, b"", 0)
@example({"caption": "one", "url": {"caption": None, "id": 3}}, b"", 0)
def test_a_glance_at_a_json_tells_the_truth_or_nothing(values: dict[str, Any], noise: bytes, at: int) -> None:
    data = json.dumps(values).encode()
    if noise:
        data = data[:at] + noise + data[at:]
    said, identity = glance(data)
    if said == ODD:
        return
    captioned, its_id = truth({"json": data})
    assert (captioned is not False) == (said == SAYS)
    assert identity == its_id
    if said == NO_KEY:  # then a text file may have one
        assert truth({"json": data, "txt": b"one"}) == (True, identity)
    if said == EMPTY:
        assert truth({"json": data, "txt": b"one"}) == (False, identity)


def test_plain_texts_need_no_more_than_a_glance() -> None:
    record = {"caption": "two dogs", "url": "https://a.b/c.jpg", "key": "00012", "status": "success", "width": 3,
              "exif": '{"Image Orientation": "1"}', "sha256": "ab", "error_message": None}  # fmt: skip
    assert glance(json.dumps(record).encode()) == (SAYS, None)
    assert glance(json.dumps(record | {"caption": "zwölf \U0001f600", "id": " 12 "}).encode()) == (SAYS, "12")
    assert glance(b'{"captions": ["", "b"]}') == (SAYS, None)
    assert glance_at_text("über".encode()) == SAYS


@_many
@given(st.binary(max_size=20) | _TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_a_glance_at_a_text_file_tells_the_truth_or_nothing(data: bytes) -> None:
    said = glance_at_text(data)
    if said != ODD:
        assert truth({"txt": data})[0] == (said == SAYS)


def test_keys_that_are_read_are_known_to_the_glance() -> None:
    assert {*TURN_KEYS, *(key for keys in TEXT_KEYS.values() for key in keys)} <= ODD_KEYS
    read: set[str] = set()

    class Watched(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            read.add(key)
            return super().get(key, default)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cmapkd.data.tar_index.parse_json", lambda data: Watched(caption="one"))
        read_record({"json": b"{}"})
    assert {"label", "qa", "caption"} <= read
    # only beside one of these is what the others say read
    assert read - ODD_KEYS <= {"id", "caption", "captions"}


def test_a_hostile_tar_is_walked_in_bounded_time(tmp_path: Path) -> None:
    """A chain of empty headers is as long as the file; extended headers of gigabytes are never read."""
    info = tarfile.TarInfo("a.png")
    info.size = 2**40
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    file = io.BytesIO()
    file.write(header)
    (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(1024))
    compare(tmp_path / "a.tar")
    back = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT))
    back[124:136] = b"\xff" * 10 + b"\xfd\xff"  # -513: back to this very header
    back[148:156] = b" " * 8
    back[148:156] = b"%06o\0 " % sum(back)
    (tmp_path / "c.tar").write_bytes(tar_of(pairs(1))[:2048] + bytes(back) + bytes(1024))
    compare(tmp_path / "c.tar")
    index = build_index(tmp_path / "c.tar", (0, 0))
    assert index.warnings == ["c.tar is damaged at byte 2048: a size below 0; what precedes is read"]
    long = tarfile.TarInfo("././@LongLink")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 2**33
    (tmp_path / "b.tar").write_bytes(long.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    compare(tmp_path / "b.tar")

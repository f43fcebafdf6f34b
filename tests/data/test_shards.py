"""Tar shards: what is read, what is refused, and that nothing bad takes its neighbours with it."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import pytest
from making import as_json, picture, write_tar

from cmapkd.config import ConfigError
from cmapkd.data.open import SourceWarning, open_source
from cmapkd.data.shards import ShardSource
from cmapkd.data.stored import SampleFilter
from cmapkd.data.types import BadSampleError, Box, QuestionAnswer, Source


def pairs(count: int, text: dict[int, bytes] | None = None) -> list[tuple[str, bytes]]:
    members = []
    for i in range(count):
        members.append((f"{i:06}.png", picture(i)))
        members.append((f"{i:06}.json", (text or {}).get(i, as_json(captions=[f"number {i}", "second"]))))
    return members


def reasons(source: Source) -> dict[int, str]:
    found = {}
    for index in range(len(source)):
        try:
            _ = source[index]
        except BadSampleError as error:
            found[index] = error.reason
    return found


def test_samples_in_order(tmp_path: Path) -> None:
    source = ShardSource(str(write_tar(tmp_path / "s.tar", pairs(3))))
    assert isinstance(source, Source)
    assert [sample.id for sample in source] == ["s/000000", "s/000001", "s/000002"]
    assert source[2].captions == ("number 2", "second") == source.captions(2)
    assert source[2].image.getpixel((0, 0)) == (2, 0, 0)
    assert source[-1].id == "s/000002"
    assert source.class_names is None
    with pytest.raises(IndexError, match="has 3 samples"):
        source[3]


ASKED = {"question": "2 or 3?", "answer": "2", "kind": "other", "question_id": 9}
CROWD = {"x": 1, "y": 2, "width": 3, "height": 4, "name": "cats", "crowd": True, "area": 5.5}


def test_fields(tmp_path: Path) -> None:
    members = [
        ("a.PNG", picture()),
        ("a.json", as_json(id="the id", caption=" one ", question="Is it?", answer="true", label=4)),
        ("b.png", picture()),
        ("b.txt", b"first\n\nsecond\n"),
        ("b.cls", b" 7 "),
        ("c.png", picture()),
        ("c.json", as_json(id=12, qa=[["what color?", "teal"], {"question": "how many?", "answers": ["2", "3"]}])),
        ("f.png", picture()),
        (
            "f.json",
            as_json(qa=[ASKED | {"category": "numbers"}], boxes=[CROWD]),
        ),
        ("d.png", picture()),
        ("d.json", as_json(caption="of the json", key="d")),
        ("d.txt", b"of the text"),
        ("e.png", picture()),
        ("e.json", as_json(width=3, boxes=[{"x": 1, "y": 2, "width": 3, "height": 4, "name": "cat"}])),
        ("e.txt", b"of the text"),
    ]
    a, b, c, f, d, e = ShardSource(str(write_tar(tmp_path / "s.tar", members)))
    assert (a.id, a.captions, a.label) == ("the id", ("one",), 4)
    assert a.questions == (QuestionAnswer("Is it?", ("true",), "yes/no"),)
    assert (b.id, b.captions, b.label) == ("s/b", ("first", "second"), 7)
    assert c.id == "12"
    assert [(q.answers, q.kind) for q in c.questions] == [(("teal",), "other"), (("2", "3"), "number")]
    assert f.questions == (QuestionAnswer("2 or 3?", ("2",), "other", "9", "numbers"),)
    assert f.boxes == (Box(1, 2, 3, 4, "cats", crowd=True, area=5.5),)
    assert d.captions == ("of the json",)
    assert e.captions == ("of the text",)
    assert (e.boxes[0].x, e.boxes[0].height, e.boxes[0].name) == (1, 4, "cat")


def test_bad_samples_leave_the_others_alone(tmp_path: Path) -> None:
    bad = {
        1: b'{"caption": ',
        2: b'{"caption": "caf\xe9"}',
        3: b'["a list"]',
        4: as_json(caption=5),
        5: b'{"caption": "half \\ud800"}',
        6: b"[" * 100_000,
        7: as_json(captions=["x"], label="cat"),
        8: as_json(captions=["x"], qa=[["no answer"]]),
        9: as_json(id=[1], caption="x"),
    }
    members = [*pairs(10, bad), ("10.png", b""), ("10.txt", b"x"), ("11.txt", b"no image")]
    members += [("12.png", picture()), ("12.txt", b"caf\xe9"), ("13.png", picture()), ("13.txt", b"fine")]
    source = ShardSource(str(write_tar(tmp_path / "s.tar", members)))
    found = reasons(source)
    starts = {
        1: "json is malformed",
        2: "json is not UTF-8: byte 0xe9 at 16",
        3: "json is malformed: it holds a list",
        4: "caption is not text: int",
        5: "caption is not UTF-8: lone surrogate U+D800",
        6: "json is malformed: nested too deeply",
        7: "label is unknown: 'cat'",
        8: "qa is malformed",
        9: "id is neither text",
        10: "image is empty",
        11: "no image: its members are txt",
        12: "caption is not UTF-8: byte 0xe9 at 3",
    }
    assert sorted(found) == sorted(starts)
    for index, start in starts.items():
        assert found[index].startswith(start)


def test_grouping_by_the_first_dot_and_the_folder(tmp_path: Path) -> None:
    members = [
        ("./x/1.png", picture(1)),
        ("x/1.txt", b"one"),
        ("y.z/1.png", picture(2)),
        ("y.z/1.seg.png", picture(3)),
        ("y.z/1.txt", b"two"),
        ("._x", b"mac"),
        ("x/.hidden.png", b""),
        ("README", b"no field"),
    ]
    source = ShardSource(str(write_tar(tmp_path / "s.tar", members)))
    assert [(s.id, s.captions, s.image.getpixel((0, 0))) for s in source] == [
        ("s/x/1", ("one",), (1, 0, 0)),
        ("s/y.z/1", ("two",), (2, 0, 0)),
    ]


def test_members_of_a_sample_need_not_be_neighbours(tmp_path: Path) -> None:
    members = pairs(4)
    source = ShardSource(str(write_tar(tmp_path / "s.tar", members[::2] + members[1::2])))
    assert [s.captions[0] for s in source] == [f"number {i}" for i in range(4)]


def test_duplicates_are_bad_and_name_the_first(tmp_path: Path) -> None:
    same = as_json(id="same", caption="x")
    members = [*pairs(4, {1: same, 3: same}), ("000000.png", picture(9))]
    found = reasons(ShardSource(str(write_tar(tmp_path / "s.tar", members))))
    assert found == {
        3: "duplicate id: the sample at position 1 has it already",
        4: "duplicate id: the sample at position 0 has it already",
    }


def test_ids_and_fingerprint_survive_a_move_and_a_copy(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write_tar(tmp_path / "a" / "train-0.tar", pairs(2))
    write_tar(tmp_path / "a" / "train-1.tar", pairs(2))
    first = ShardSource(f"{tmp_path}/a/train-*.tar")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    os.utime(tmp_path / "b" / "train-0.tar", (1, 1))
    second = ShardSource(f"{tmp_path}/b/train-{{0..1}}.tar")
    assert [first.id(i) for i in range(4)] == [second.id(i) for i in range(4)]
    assert first.id(3) == "train-1/000001"
    assert first.fingerprint() == second.fingerprint()
    write_tar(tmp_path / "b" / "train-1.tar", pairs(2, {1: as_json(caption="longer")}))
    assert ShardSource(f"{tmp_path}/b/*.tar").fingerprint() != first.fingerprint()
    assert ShardSource(f"{tmp_path}/a/*.tar", keep=SampleFilter(limit=3)).fingerprint() != first.fingerprint()


def test_shards_of_one_name_in_two_folders(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "0.tar", pairs(1))
    assert [s.id for s in ShardSource(f"{tmp_path}/*/0.tar")] == ["a/0/000000", "b/0/000000"]


def test_unsafe_members_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("../../evil.png", "/etc/evil.png", "a/../../evil.png", "good.png", "good.txt"):
            data = b"words" if name.endswith("txt") else picture()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, kind in (("l.png", tarfile.SYMTYPE), ("h.png", tarfile.LNKTYPE), ("d.png", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    with pytest.warns(SourceWarning, match="1 devices or other special files, 2 links, 3 names that point outside"):
        source = open_source(f"webdataset:{path}")
    assert [sample.id for sample in source] == ["s/good"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["s.tar"]


@pytest.mark.parametrize("cut", [700, 1400, 2000, 3000, 5000, 7000])
def test_truncated_tar_keeps_what_is_whole(tmp_path: Path, cut: int) -> None:
    whole = write_tar(tmp_path / "whole.tar", pairs(20))
    path = tmp_path / "s.tar"
    path.write_bytes(whole.read_bytes()[: 20_000 + cut])
    source = ShardSource(str(path))
    assert len(source.warnings) == 1
    assert "truncated" in source.warnings[0]
    found = reasons(source)
    assert 8 <= len(source) - len(found) < 20
    assert set(found) <= {len(source) - 1}
    assert all(reason.startswith("shard is truncated") for reason in found.values())


def test_damaged_header_in_the_middle(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", pairs(6))
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        header = archive.getmember("000003.png").offset
    data[header : header + 512] = b"\xff" * 512
    path.write_bytes(data)
    with pytest.warns(SourceWarning, match=f"damaged at byte {header}"):
        source = open_source(f"webdataset:{path}")
    assert len(source) == 3


def test_one_unreadable_shard_among_good_ones(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", pairs(2))
    (tmp_path / "1.tar").write_bytes(b"")
    with pytest.warns(SourceWarning, match=r"1\.tar is left out: it is not a tar"):
        assert len(open_source(f"webdataset:{tmp_path}")) == 2


def test_compressed_tar_is_refused_with_advice(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(ConfigError, match=r"compressed.*unpack it"):
        ShardSource(f"{tmp_path}/s.tar")


def test_captions_required(tmp_path: Path) -> None:
    none = as_json(captions=[], question="Is it?", answer="false")
    members = [*pairs(4, {1: none, 2: b"{bad"}), ("4.png", picture()), ("5.png", picture()), ("5.txt", b" \n")]
    path = write_tar(tmp_path / "s.tar", members)
    everything = ShardSource(str(path))
    assert len(everything) == 6
    assert everything[1].captions == ()
    assert everything[1].questions[0].answers == ("false",)
    for _ in range(2):  # from the headers, then from the cached index
        source = ShardSource(str(path), keep=SampleFilter(require_captions=True))
        assert [source.id(i) for i in range(len(source))] == ["s/000000", "s/000002", "s/000003"]
        assert source.num_without_caption == 3
        assert list(reasons(source)) == [1]  # malformed is bad, not silent
    limited = ShardSource(str(path), keep=SampleFilter(require_captions=True, limit=2))
    assert [limited.id(i) for i in range(len(limited))] == ["s/000000", "s/000002"]


def test_no_captions_at_all(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("a.png", picture())])
    with pytest.raises(ConfigError, match=r"none of the 1 samples .* has a caption"):
        ShardSource(str(path), keep=SampleFilter(require_captions=True))
    with pytest.raises(ConfigError, match="holds no samples"):
        ShardSource(str(write_tar(tmp_path / "e.tar", [("README", b"x")])))


def test_class_names(tmp_path: Path) -> None:
    members = [("a.png", picture()), ("a.cls", b"dog"), ("b.png", picture()), ("b.json", as_json(label=0))]
    write_tar(tmp_path / "s.tar", members)
    (tmp_path / "classes.json").write_text('["cat", "dog"]')
    source = open_source(f"webdataset:{tmp_path}/s.tar?classes={tmp_path}/classes.json")
    assert source.class_names == ("cat", "dog")
    assert [sample.label for sample in source] == [1, 0]


def test_unwritable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(ShardSource(str(write_tar(tmp_path / "s.tar", pairs(3))))) == 3


def test_a_shard_replaced_after_opening_is_noticed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", pairs(3))
    source = ShardSource(str(path))
    write_tar(path, pairs(4))
    assert set(reasons(source).values()) == {"file has changed since it was opened: s.tar"}
    path.unlink()
    source = pickle.loads(pickle.dumps(source))  # noqa: S301 - our own
    assert set(reasons(source).values()) == {"file cannot be read: No such file or directory (s.tar)"}


def test_pickle_and_fork(tmp_path: Path) -> None:
    source = ShardSource(str(write_tar(tmp_path / "s.tar", pairs(5))))
    _ = source[0]
    again = pickle.loads(pickle.dumps(source))  # noqa: S301 - our own
    assert again.fingerprint() == source.fingerprint()
    assert again[3].captions == source[3].captions
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send([sample.captions for sample in source]))
    child.start()
    mine = [sample.captions for sample in source]
    assert receiver.recv() == mine
    child.join()


def test_many_shards_need_few_handles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmapkd.data.reading.most_files", lambda: 2)
    for i in range(5):
        write_tar(tmp_path / f"{i}.tar", pairs(2))
    source = ShardSource(str(tmp_path))
    for index in (0, 9, 3, 5, 7, 1, 8, 2):
        assert source.captions(index)[0] == f"number {index % 2}"
    assert len(source.files._handles) == 2


def test_flickr8k(shared: Path) -> None:
    source = open_source(f"webdataset:{shared}/flickr8k/dev-*.tar", require_captions=True)
    assert len(source) == 1000
    assert source[0].id == "1022454332_6af2c1449a"
    assert {len(source.captions(i)) for i in range(1000)} == {5}
    assert source[999].image.size == (160, 160)


def test_nlvr_false_sentences_are_no_captions(shared: Path) -> None:
    spec = f"webdataset:{shared}/nlvr/dev-*.tar"
    source = ShardSource(spec.partition(":")[2], keep=SampleFilter(require_captions=True))
    assert (len(source), source.num_without_caption) == (837, 630)
    answers = [s.questions[0].answers for s in open_source(spec, limit=40)]
    assert {("true",), ("false",)} == set(answers)


def test_coco_mini(shared: Path) -> None:
    source = open_source(f"webdataset:{shared}/coco_mini/dev-000000.tar")
    assert (len(source), source[0].id, len(source[0].captions)) == (39, "139", 5)


# ------------------------------------------------------------------------------------------------ dots in names


def test_names_with_more_dots_are_one_sentence_when_the_data_is_opened(tmp_path: Path) -> None:
    members = [(f"S_{i}.wav.{kind}", data) for i in range(3) for kind, data in (("jpg", picture()), ("txt", b"a"))]
    with pytest.raises(
        ConfigError,
        match=r"3 of 3 samples have no image, because the key of a sample ends at the first dot of a name: "
        r"'S_0\.wav\.jpg' is the field 'wav\.jpg' of 'S_0'\. Name the files with one dot, such as 'S_0_wav\.jpg'",
    ):
        open_source(f"webdataset:{write_tar(tmp_path / 'a.tar', members)}")
    mixed = write_tar(tmp_path / "b.tar", members + pairs(2))
    with pytest.warns(SourceWarning, match="3 of 5 samples have no image"):
        source = open_source(f"webdataset:{mixed}")
    assert len(reasons(source)) == 3
    assert open_source(f"webdataset:{write_tar(tmp_path / 'c.tar', [*pairs(2), ('000000.seg.png', picture())])}")[0]
    folders = [(f"train.v1/{name}", data) for name, data in pairs(2)]
    assert open_source(f"webdataset:{write_tar(tmp_path / 'd.tar', folders)}")[1].id == "d/train.v1/000001"

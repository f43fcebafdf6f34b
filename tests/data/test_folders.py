"""Class folders, captioned folders, and zips of them."""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
import stat
import zipfile
from pathlib import Path

import pytest
from making import as_json, picture, write_lines, write_zip

from cmapkd.config import ConfigError
from cmapkd.data.open import SourceWarning, open_source
from cmapkd.data.types import BadSampleError, Source


def plant(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(i) if not name.endswith((".txt", ".json")) else b"")
    return root


def listing(source: Source) -> list[tuple[str, int | None]]:
    return [(source[i].id, source[i].label) for i in range(len(source))]


def test_class_folders(tmp_path: Path) -> None:
    plant(tmp_path, "dog/b.png", "cat/a.png", "cat/deep/c.PNG", "dog/.hidden.png", ".git/x.png", "notes.md")
    source = open_source(f"folder:{tmp_path}")
    assert isinstance(source, Source)
    assert listing(source) == [("cat/a.png", 0), ("cat/deep/c.PNG", 0), ("dog/b.png", 1)]
    assert source.class_names == ("cat", "dog")
    assert source.captions(0) == ()


def test_folders_around_the_classes_are_passed_over(tmp_path: Path) -> None:
    plant(tmp_path, "a/dev/cat/1.png", "a/dev/dog/1.png")
    assert open_source(f"folder:{tmp_path}").class_names == ("cat", "dog")
    plant(tmp_path / "one", "cat/1.png", "cat/2.png")
    assert open_source(f"folder:{tmp_path}/one").class_names == ("cat",)


def test_captions_beside_images(tmp_path: Path) -> None:
    plant(tmp_path, "a.png", "b.png", "c.png", "d.png", "e.png")
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.json").write_bytes(as_json(caption="of b", label=2))
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    (tmp_path / "d.txt").write_text("\n")
    source = open_source(f"folder:{tmp_path}")
    assert source[0].captions == ("one", "two") == source.captions(0)
    assert (source[1].captions, source[1].label) == (("of b",), 2)
    with pytest.raises(BadSampleError, match="caption is not UTF-8"):
        source.captions(2)
    assert source[4].captions == ()
    kept = open_source(f"folder:{tmp_path}", require_captions=True)
    assert [kept.id(i) for i in range(len(kept))] == ["a.png", "b.png", "c.png"]
    assert kept.num_without_caption == 2


def test_metadata_file(tmp_path: Path) -> None:
    plant(tmp_path, "x/0.png", "x/1.png")
    lines = [as_json(file_name="x/0.png", text="zero"), as_json(file_name="x/1.png", text="one")]
    lines += [as_json(file_name="../secret.png", text="outside"), as_json(file_name="/etc/passwd", text="outside")]
    write_lines(tmp_path / "metadata.jsonl", lines)
    source = open_source(f"folder:{tmp_path}")
    assert [source.captions(i) for i in range(2)] == [("zero",), ("one",)]
    for index in (2, 3):
        with pytest.raises(BadSampleError, match="points outside its folder"):
            _ = source[index]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('["dog", "cat", "eel"]', ("dog", "cat", "eel")),
        ('{"dog": "a dog", "cat": "a cat"}', ("a cat", "a dog")),
        ('{"dog": {"index": 0, "name": "hound"}, "cat": {"index": 1, "name": "puss"}}', ("hound", "puss")),
        ('{"0": ["dog", "hound"], "1": ["cat", "puss"]}', ("hound", "puss")),
    ],
)
@pytest.mark.parametrize("place", ["classes.json", "train/classes.json"])
def test_classes_file(tmp_path: Path, text: str, names: tuple[str, ...], place: str) -> None:
    plant(tmp_path / "train", "cat/1.png", "dog/1.png")
    (tmp_path / place).write_text(text)
    source = open_source(f"folder:{tmp_path}/train")
    assert source.class_names == names
    cat, dog = (label for _, label in listing(source))
    assert ("cat" in names[cat] or names[cat] == "puss", "dog" in names[dog] or names[dog] == "hound") == (True, True)
    assert open_source(f"folder:{tmp_path}/train?classes=none").class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('["cat"]', "1 class folders that its classes file does not name, such as 'dog'"),
        ("{", "is not JSON"),
        ("[1]", "is none of"),
        ('{"cat": {"index": "x", "name": "c"}}', "is none of"),
        ("3", "is none of"),
        ('["cat", "cat"]', "must be distinct"),
        ('{"cat": {"index": 5, "name": "c"}}', "numbered from 0"),
    ],
)
def test_bad_classes_file(tmp_path: Path, text: str, message: str) -> None:
    plant(tmp_path / "train", "cat/1.png", "dog/1.png")
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        open_source(f"folder:{tmp_path}/train")


def test_refusals(tmp_path: Path) -> None:
    plant(tmp_path / "mixed", "a.png", "cat/b.png")
    with pytest.raises(ConfigError, match=r"holds images .'a.png'. and folders of images .'cat/b.png'"):
        open_source(f"folder:{tmp_path}/mixed")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no samples"):
        open_source(f"folder:{tmp_path}/empty")
    with pytest.raises(
        ConfigError, match=r"neither a folder nor a .zip. .* holds empty/, mixed/ .did you mean 'mixed'"
    ):
        open_source(f"folder:{tmp_path}/mixd")
    (tmp_path / "x.zip").write_bytes(b"no zip")
    with pytest.raises(ConfigError, match="is not a readable zip"):
        open_source(f"folder:{tmp_path}/x.zip")


def test_bad_images(tmp_path: Path) -> None:
    plant(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "a.png").write_bytes(b"")
    source = open_source(f"folder:{tmp_path}")
    (tmp_path / "b.png").unlink()
    for index, message in ((0, "image is empty"), (1, "image file is missing: b.png")):
        with pytest.raises(BadSampleError, match=message):
            _ = source[index]
    assert source[2].image.size == (8, 6)


def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    plant(tmp_path / "real", "1.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "real")
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
    assert listing(open_source(f"folder:{tmp_path}/set")) == [("cat/1.png", 0)]


def test_zip(tmp_path: Path) -> None:
    members = [("dev/dog/1.png", picture(1)), ("dev/cat/1.png", picture(2)), ("dev/cat/1.txt", b"a cat")]
    path = write_zip(tmp_path / "dev.zip", [*members, ("classes.json", b'["dog", "cat"]')])
    source = open_source(f"folder:{path}")
    assert listing(source) == [("dev/cat/1.png", 1), ("dev/dog/1.png", 0)]
    assert source[0].captions == ("a cat",)
    assert source[0].image.getpixel((0, 0)) == (2, 0, 0)
    again = pickle.loads(pickle.dumps(source))  # noqa: S301 - our own
    assert again[1].image.getpixel((0, 0)) == (1, 0, 0)
    shutil.copy(path, tmp_path / "other.zip")
    assert open_source(f"folder:{tmp_path}/other.zip").fingerprint() == source.fingerprint()
    write_zip(path, [("dev/dog/1.png", picture(3)), *members[1:]])
    assert open_source(f"folder:{path}?classes=none").fingerprint() != source.fingerprint()
    with pytest.raises(BadSampleError, match="has changed since it was opened"):
        _ = pickle.loads(pickle.dumps(source))[0]  # noqa: S301 - our own


def test_unsafe_zip_members_are_left_out(tmp_path: Path) -> None:
    names = ["../evil.png", "/etc/evil.png", "c/../../evil.png", "..\\evil.png", "C:/evil.png", "cat/good.png"]
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in names:
            archive.writestr(zipfile.ZipInfo(name), picture())
        link = zipfile.ZipInfo("cat/link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.warns(SourceWarning, match="6 unsafe members left out"):
        source = open_source(f"folder:{tmp_path}/x.zip")
    assert listing(source) == [("cat/good.png", 0)]
    assert [file.name for file in tmp_path.iterdir()] == ["x.zip"]


def test_damaged_and_oversized_zip_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_zip(
        tmp_path / "x.zip", [("c/a.png", picture(1)), ("c/b.png", picture(2)), ("c/big.png", b"0" * 10**6)]
    )
    data = bytearray(path.read_bytes())
    data[data.index(b"c/a.png") + 20] ^= 0xFF
    path.write_bytes(data)
    monkeypatch.setattr("cmapkd.data.reading.MAX_IMAGE_BYTES", 10**5)
    source = open_source(f"folder:{path}")
    for index, message in ((0, "zip member is damaged"), (2, "too large: 1000000 bytes")):
        with pytest.raises(BadSampleError, match=message):
            _ = source[index]
    assert source[1].label == 0


def test_zip_after_a_fork(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", [(f"c/{i}.png", picture(i)) for i in range(20)])
    source = open_source(f"folder:{path}")
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send([source[i].image.getpixel((0, 0)) for i in range(20)]))
    child.start()
    mine = [source[i].image.getpixel((0, 0)) for i in range(20)]
    assert receiver.recv() == mine
    child.join()


def test_cifar10(shared: Path) -> None:
    source = open_source(f"folder:{shared}/cifar10/dev.zip")
    assert len(source) == 1000
    assert source.class_names[-1] == "truck"
    assert source[999].label == 9
    assert source[0].id == "dev/airplane/0000.jpg"
    assert source[0].image.size == (32, 32)


def test_imagenet_samples_have_english_names(shared: Path) -> None:
    source = open_source(f"folder:{shared}/imagenet_samples/dev.zip")
    assert (len(source), len(source.class_names)) == (100, 1000)
    assert source.class_names[:2] == ("tench", "goldfish")
    assert len({source[i].label for i in range(100)}) == 100

"""The names of sources: their grammar, and what is said of those that name nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from making import as_json, picture, write_tar
from torch.utils.data import DataLoader, Dataset

from cmapkd.config import ConfigError
from cmapkd.data.open import open_source
from cmapkd.data.places import expand_braces, short_names
from cmapkd.data.stored import Texts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for shard in range(3):
        members = [(f"{i}.png", picture(i)) for i in range(4)] + [
            (f"{i}.json", as_json(caption=f"c{i}")) for i in range(4)
        ]
        write_tar(tmp_path / f"train-{shard:04}.tar", members)
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "length"),
    [
        ("train-0001.tar", 4),
        ("train-000?.tar", 12),
        ("train-000?.tar?limit=5", 5),
        ("train-*.tar", 12),
        ("*", 12),
        ("train-{0000..0001}.tar", 8),
        ("train-000{0,2}.tar", 8),
        ("{train-0000,train-*}.tar", 12),
        ("", 12),
    ],
)
def test_patterns(folder: Path, pattern: str, length: int) -> None:
    assert len(open_source(f"webdataset:{folder}/{pattern}")) == length


def test_limits(folder: Path) -> None:
    assert len(open_source(f"webdataset:{folder}?limit=5", limit=3)) == 3
    assert len(open_source(f"webdataset:{folder}?limit=5", limit=30)) == 5


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("webdatset:x", "no kind of data 'webdatset' .did you mean 'webdataset'.*Known: scenes, webdataset"),
        ("some/folder", "no kind of data 'some/folder'"),
        ("", "no kind of data ''"),
        ("webdataset:", "does not say what to read"),
        ("webdataset:{}/dev-*.tar", "'.*dev-.*' matches no file. The folder '.*' holds train-0000.tar, train-0001.tar"),
        ("webdataset:{}/nowhere/at/all/*.tar", "The folder '.*' holds train-0000.tar"),
        ("webdataset:{}/train-{{0000..0004}}.tar", "2 of the 5 names .* First: '.*train-0003.tar' matches no file"),
        ("webdataset:{}/train-{{0000..0001.tar", "braces .* do not match"),
        ("webdataset:{}/train-{{5..1}}.tar", "does not count upwards"),
        ("webdataset:{}/train-{{5}}.tar", "neither a range"),
        ("webdataset:{}/{{0..9999}}{{0..9999}}.tar", "100000000 names"),
        ("webdataset:nowhere://example.org/a.tar", "nowhere"),
        ("webdataset:pipe:curl x", "is not on this machine"),
        ("webdataset:{}/*.tar?limit=0", "limit must be at least 1"),
        ("webdataset:{}/*.tar?limit=x", "limit must be a whole number, got 'x'"),
        ("webdataset:{}/*.tar?limit=1&limit=2", "sets limit twice"),
        (
            "webdataset:{}/*.tar?limt=1",
            "unknown option 'limt' .did you mean 'limit'.*Known for webdataset: classes, limit",
        ),
        ("folder:{}/x", "neither a folder nor a .zip"),
        ("csv:{}/x.csv", "csv '.*x.csv' is not a file. The folder"),
        ("parquet:{}/*.parquet", "matches no file"),
        ("scenes:hardest", "scenes:hardest"),
        ("scenes@trian", "trian"),
        ("scenes@", "names no split"),
        ("scenes?size=big", "size must be a whole number"),
        ("scenes?sise=64", "unknown option 'sise' .did you mean 'size'"),
        ("hf:", "does not say what to read"),
    ],
)
def test_names_of_nothing(folder: Path, spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_source(spec.format(folder))


def test_scenes() -> None:
    source = open_source("scenes:hard@val?size=48&length=7")
    assert len(source) == 7
    assert source[3].image.size == (48, 48)
    assert source.captions(3) == source[3].captions
    assert len(open_source("scenes", split="val", limit=20)) == 20
    assert open_source("scenes@train?limit=3").fingerprint() != open_source("scenes@val?limit=3").fingerprint()


def test_home_and_relative_paths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    assert len(open_source("webdataset:~/train-*.tar")) == 12
    here = open_source("webdataset:train-*.tar")
    assert len(here) == 12
    assert here.fingerprint() == open_source(f"webdataset:{folder}/train-*.tar").fingerprint()


class Captions(Dataset[str]):
    def __init__(self, spec: str) -> None:
        self.source = open_source(spec)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> str:
        sample = self.source[index]
        return f"{sample.id} {sample.captions[0]} {sample.image.getpixel((0, 0))}"


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_loader_workers_read_the_same(folder: Path) -> None:
    data = Captions(f"webdataset:{folder}/train-*.tar")
    alone = [data[i] for i in range(len(data))]
    assert list(DataLoader(data, batch_size=None, num_workers=2)) == alone


def test_braces() -> None:
    assert expand_braces("a") == ["a"]
    assert expand_braces("a{08..11}b") == ["a08b", "a09b", "a10b", "a11b"]
    assert expand_braces("{8..11}") == ["8", "9", "10", "11"]
    assert expand_braces("{a,b}{1..2}") == ["a1", "a2", "b1", "b2"]


def test_short_names() -> None:
    assert short_names([Path("/x/a.tar"), Path("/y/b.tar")]) == ["a", "b"]
    assert short_names([Path("/x/a.tar"), Path("/y/a.tar")]) == ["x/a", "y/a"]


def test_texts_hold_anything() -> None:
    texts = ["", "é", "\ud800", "x" * 1000]
    packed = Texts(texts)
    assert list(packed) == texts == packed[:]
    with pytest.raises(IndexError):
        packed[4]

"""Indexes of shards: made once, by one process, and never believed when they are not whole."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import pickle
import re
import shutil
import sys
import tarfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from making import as_json, picture, write_tar

from cmapkd.config import ConfigError
from cmapkd.data import index_pool, shard_files, shard_index, shard_set
from cmapkd.data.listed import ListedSource
from cmapkd.data.open import SourceWarning, open_source
from cmapkd.data.records import Record, Unusable
from cmapkd.data.shards import ShardSource
from cmapkd.data.stored import SampleFilter, StoredSource
from cmapkd.data.tar_index import build_index
from cmapkd.data.types import BadSampleError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cmapkd" / "index"


def shards(folder: Path, count: int = 3, each: int = 4) -> Path:
    folder.mkdir()
    for shard in range(count):
        members = []
        for number in range(each):
            members += [
                (f"{number:04}.png", picture(number)),
                (f"{number:04}.json", as_json(caption=f"{shard} {number}")),
            ]
        write_tar(folder / f"{shard}.tar", members)
    return folder


def kinds(cache: Path) -> list[str]:
    return sorted(file.suffix for file in cache.iterdir())


def refuse(*arguments: Any) -> Any:
    raise AssertionError("a tar is indexed again")


def test_an_index_is_made_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shards(tmp_path / "data")
    source = ShardSource(str(folder))
    assert kinds(cache) == [".idx", ".idx", ".idx", ".set"]
    assert not source.warnings
    monkeypatch.setattr(shard_files, "build", refuse)
    again = ShardSource(str(folder))
    assert again.fingerprint() == source.fingerprint()
    assert [again.captions(i) for i in range(12)] == [(f"{i // 4} {i % 4}",) for i in range(12)]
    monkeypatch.setattr(shard_set.ShardIndex, "open", refuse)  # nor is an index looked into before a sample is read
    assert len(ShardSource(str(folder))) == 12
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parents[1]))
    write_tar(folder / "3.tar", [("a.png", picture())])  # one more
    built = []
    monkeypatch.setattr(
        shard_files, "build", lambda path, stamp: built.append(Path(path).name) or shard_index.build(path, stamp)
    )
    assert len(ShardSource(str(folder))) == 13
    assert built == ["3.tar"]


def damage(data: bytes) -> Iterator[bytes]:
    yield from (b"", b"{", data[:-1], data[: len(data) // 2], data + b"\0", bytes(len(data)))
    for at in range(0, len(data), 7):
        yield data[:at] + bytes((data[at] ^ 4,)) + data[at + 1 :]


def test_what_is_damaged_is_made_anew_with_a_word(cache: Path, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("a.png", picture()), ("a.txt", b"one"), ("b.png", picture())])
    expected = ShardSource(str(path)).fingerprint()
    (index,), (table,) = cache.glob("*.idx"), cache.glob("*.set")
    whole, its_table = index.read_bytes(), table.read_bytes()
    for data in damage(whole):
        index.write_bytes(data)
        table.unlink()
        source = ShardSource(str(path))
        assert source.fingerprint() == expected
        assert source.warnings == (f"damaged in {cache} and made anew: the index of s.tar",)
        assert (index.read_bytes(), table.read_bytes()) == (whole, its_table)
    for data in damage(its_table):
        table.write_bytes(data)
        source = ShardSource(str(path))
        assert source.fingerprint() == expected
        assert source.warnings == (f"damaged in {cache} and made anew: the table {table.name}",)
        assert table.read_bytes() == its_table
    index.write_bytes(whole[:-5])
    table.unlink()
    with pytest.warns(SourceWarning, match="made anew"):
        open_source(f"webdataset:{path}")


def test_an_index_that_is_lost_after_opening(cache: Path, tmp_path: Path) -> None:
    folder = shards(tmp_path / "data")
    source = ShardSource(str(folder))
    first, second, third = (
        shard_index.index_file(str(folder / f"{i}.tar"), shard_index.stamp_of(str(folder / f"{i}.tar")))
        for i in range(3)
    )
    first.unlink()
    assert source.captions(0) == ("0 0",)
    second.write_bytes(b"no index")
    with pytest.warns(UserWarning, match="the index of 1.tar"):
        assert source.captions(5) == ("1 1",)
    third.unlink()
    write_tar(folder / "2.tar", [("a.png", picture()), ("a.txt", b"another tar")])
    with pytest.raises(Unusable, match=r"file has changed since it was opened: 2\.tar"):
        source._set.index(2)


def test_a_changed_tar_is_noticed(cache: Path, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("a.png", picture()), ("a.json", as_json(id="one", caption="x"))])
    before = ShardSource(str(path))
    size = path.stat().st_size
    write_tar(path, [("a.png", picture()), ("a.json", as_json(id="two", caption="x"))])
    os.utime(path, ns=(1, 1))
    assert path.stat().st_size == size
    after = ShardSource(str(path))
    assert (before.id(0), after.id(0)) == ("one", "two")
    assert before.fingerprint() != after.fingerprint()


def test_an_interrupted_build_goes_on(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shards(tmp_path / "data", 4)
    done = []

    def write(path: Path, data: bytes) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(path)
        shard_index.write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(shard_set, "write", write)
        with pytest.raises(KeyboardInterrupt):
            ShardSource(str(folder))
    assert kinds(cache) == [".idx", ".idx"]
    old, young = cache / "old.part", cache / "young.part"  # a killed process cannot clean up
    for piece in (old, young):
        piece.write_bytes(b"half")
    os.utime(old, (time.time() - 10**6,) * 2)
    built = []
    monkeypatch.setattr(
        shard_files, "build", lambda path, stamp: built.append(Path(path).name) or shard_index.build(path, stamp)
    )
    assert not ShardSource(str(folder)).warnings
    assert built == ["2.tar", "3.tar"]
    assert not old.exists()
    assert young.exists()  # which may be written by a living process


def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        shard_index.write(tmp_path / "a.idx", b"x")
    assert not [*tmp_path.iterdir()]
    path = write_tar(tmp_path / "s.tar", [("a.png", picture()), ("a.txt", b"one")])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = pickle.loads(pickle.dumps(ShardSource(str(path))))  # noqa: S301 - our own
    assert source.captions(0) == ("one",)  # the index is in memory, and goes to workers with the source


def test_several_processes_index_as_one_does(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shards(tmp_path / "data", 5)
    (folder / "5.tar").write_bytes(b"no tar")
    alone = ShardSource(str(folder))
    files = {file.name: file.read_bytes() for file in cache.iterdir()}
    shutil.rmtree(cache)
    monkeypatch.setattr(index_pool, "num_cores", lambda: 2)
    monkeypatch.setattr(index_pool, "LEAST_BYTES", 0)
    built = []
    monkeypatch.setattr(
        shard_files, "build", lambda path, stamp: built.append(Path(path).name) or shard_index.build(path, stamp)
    )
    source = ShardSource(str(folder))
    assert built == ["5.tar"]  # to learn what is wrong with it
    assert source.warnings == alone.warnings
    assert {file.name: file.read_bytes() for file in cache.iterdir()} == files
    shutil.rmtree(cache)
    monkeypatch.setattr(sys, "executable", "/bin/false")  # processes that die are no loss
    assert ShardSource(str(folder)).fingerprint() == alone.fingerprint()


def test_only_one_process_makes_an_index_at_a_time(tmp_path: Path) -> None:
    file = tmp_path / "cache" / "a.lock"
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe()

    def hold() -> None:
        with index_pool.alone(file):
            its.send("held")
            its.recv()

    child = context.Process(target=hold)
    child.start()
    assert mine.recv() == "held"
    with file.open("a") as other, pytest.raises(OSError, match="unavailable"):
        fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    mine.send("go")
    child.join()
    with index_pool.alone(file):
        assert file.exists()
    assert not file.exists()


# ------------------------------------------------------------------------------------------------ beside lists


class ListSource(ListedSource):
    """The samples of tars as lists of entries, which `tarfile` reads: what a source must be, plainly."""

    def __init__(self, folder: Path, keep: SampleFilter) -> None:
        ids: list[str] = []
        captioned: list[bool] = []
        bad: dict[int, str] = {}
        for path in sorted(folder.glob("*.tar")):
            status = path.stat()
            try:
                entries = build_index(path, (status.st_size, status.st_mtime_ns)).entries
            except Unusable:
                continue
            for entry in entries:
                if entry.bad:
                    bad[len(ids)] = entry.bad
                ids.append(entry.id or f"{path.stem}/{entry.key}")
                captioned.append(entry.captioned is not False)
        super().__init__(str(folder), ids, keep=keep, captioned=np.array(captioned, dtype=np.bool_), bad=bad)

    def _contents(self) -> Iterable[str]:
        return ()

    def _record(self, entry: int) -> Record:
        return Record()

    def _image(self, entry: int) -> bytes:
        return picture()


def known(source: StoredSource) -> list[tuple[str, str | None]]:
    """Of every sample its id, and why it is known to be bad."""
    found: list[tuple[str, str | None]] = []
    for index in range(len(source)):
        try:
            found.append((source._find(index)[1], None))
        except BadSampleError as error:
            found.append((error.sample_id, error.reason))
    return found


def anything(draws: Random, shard: int) -> list[tuple[str, bytes]]:
    members = []
    for number in range(draws.randrange(7)):
        members.append((f"{number % 4}.png", b""))  # some keys come twice
        record: dict[str, Any] = {} if draws.random() < 0.4 else {"caption": "one"}
        if draws.random() < 0.5:
            record["id"] = draws.choice(("a", "b", f"{(shard + 1) % 4}/1", str(number), number))
        if draws.random() < 0.2:
            record["label"] = draws.choice((1, "x"))
        end, data = draws.choice((("json", json.dumps(record).encode()), ("txt", draws.choice((b"two", b" ")))))
        members.append((f"{number % 4}.{end}", data))
    return members


def opened(make: Callable[[], StoredSource]) -> StoredSource | str:
    """The source, or what is said of its name and of how many samples there are where it is refused."""
    try:
        return make()
    except ConfigError as error:
        return re.sub(r"\S*data\S*|holds no samples.*", "", str(error))


@pytest.mark.parametrize("seed", range(8))
def test_a_source_is_what_lists_of_its_entries_are(seed: int, cache: Path, tmp_path: Path) -> None:
    draws = Random(seed)
    (tmp_path / "data").mkdir()
    for shard in range(4):
        path = write_tar(tmp_path / "data" / f"{shard}.tar", anything(draws, shard))
        if draws.random() < 0.3:
            path.write_bytes(path.read_bytes()[: -draws.choice((10_240, 9_000, 1_536))])
    fingerprints: dict[str, list[tuple[str, str | None]]] = {}
    for required in (False, True):
        for limit in (None, 1, 5, 1000):
            for part in (None, (0.0, 0.5), (0.5, 1.0)):
                keep = SampleFilter(required, limit, part=part)
                expected = opened(lambda keep=keep: ListSource(tmp_path / "data", keep))
                source = opened(lambda keep=keep: ShardSource(str(tmp_path / "data"), keep=keep))
                if isinstance(expected, str) or isinstance(source, str):
                    assert source == expected
                    continue
                assert known(source) == known(expected)
                assert [source.id(i) for i in range(-len(source), 0)] == [expected.id(i) for i in range(len(source))]
                assert source.num_without_caption == expected.num_without_caption
                assert fingerprints.setdefault(source.fingerprint(), known(source)) == known(source)


def test_ids_that_stand_in_two_shards(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_tar(tmp_path / "data" / "0.tar", [("a.png", b""), ("a.json", as_json(id="1/b")), ("c.png", b"")])
    write_tar(tmp_path / "data" / "1.tar", [("b.png", b""), ("c.png", b"")])
    reason = "duplicate id: the sample at position 0 has it already"
    for _ in range(2):
        source = ShardSource(str(tmp_path / "data"))
        assert known(source) == [("1/b", None), ("0/c", None), ("1/b", reason), ("1/c", None)]


# ------------------------------------------------------------------------------------------------ memory


def test_memory_and_what_workers_are_sent_grow_with_shards_only(cache: Path, tmp_path: Path) -> None:
    each, names = 500, 40
    member = tarfile.TarInfo("")
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data" / "00.tar", "w") as archive:
        for number in range(each):
            member.name = f"{number:09}.jpg"
            archive.addfile(member)
    for number in range(1, names):
        os.link(tmp_path / "data" / "00.tar", tmp_path / "data" / f"{number:02}.tar")
    pattern = str(tmp_path / "data")
    samples = len(ShardSource(pattern))
    assert samples == each * names
    tracemalloc.start()
    source = ShardSource(pattern)
    kept, _ = tracemalloc.get_traced_memory()
    for index in range(0, samples, 11):
        source.id(index)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 1000 * names, kept  # bytes
    assert after < 10 * samples, after
    assert len(pickle.dumps(source)) < 200 * names + 2000


def test_a_source_keeps_no_more_indexes_than_files_may_be_open(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ShardSource(str(shards(tmp_path / "data", 5)))
    monkeypatch.setattr(shard_set, "most_files", lambda: 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for index in (0, 19, 7, 12, 3, 9):
            assert source.captions(index) == (f"{index // 4} {index % 4}",)
            assert len(source._set._maps) <= 2

"""Rows by the shards of the data: sets that share shards share their rows, and nothing else changes."""

from __future__ import annotations

import io
import shutil
import tarfile
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_support import VIEWS, cache_plan, contents, train
from PIL import Image

from cmapkd.cache import CacheError, Wanted, coverage, describe, files, keys_of_run, verify, writer
from cmapkd.cache.folder import CacheFolder
from cmapkd.cache.prepare import CachePlan
from cmapkd.cache.shard_part import ShardPart
from cmapkd.data.open import open_source
from cmapkd.data.ordering import Ordering
from cmapkd.data.parts import PartOfSource
from cmapkd.data.plans import PlanSampler
from cmapkd.data.shard_contents import ShardContents, shard_contents
from cmapkd.data.types import BadSampleError, Sample
from cmapkd.data.views import ViewSpec
from helpers import MemorySource, make_builder, make_method

SIZES = {"a": 8, "b": 6, "c": 1, "d": 9, "e": 5}
ONE_PIECE = 1.0  # MiB: any of these shards
ROWS = {name: 2 * size for name, size in SIZES.items()}  # of both views


class SetOfShards(MemorySource):
    """The samples of named shards, one after the other: a sample is a function of its shard and its place there."""

    def __init__(self, names: Sequence[str], *, unreadable: Sequence[str] = ()) -> None:
        super().__init__(sum(SIZES[name] for name in names))
        self.places = [(name, place) for name in names for place in range(SIZES[name])]
        self.names, self.unreadable = names, unreadable
        self.name = f"shards {'-'.join(names)}"
        self.asked: list[str] = []

    def __getitem__(self, index: int) -> Sample:
        name, place = self.places[index]
        self.asked.append(name)
        sample = MemorySource(bad=(0,) if name in self.unreadable and not place else ())[self._number(index)]
        return sample.renamed(f"{name}/{place}")

    def _number(self, index: int) -> int:
        name, place = self.places[index]
        return 0 if name in self.unreadable and not place else 100 * ord(name) + place

    def captions(self, index: int) -> tuple[str, ...]:
        return MemorySource().captions(self._number(index))

    def shard_counts(self) -> Any:
        return np.array([SIZES[name] for name in self.names])

    def shard_contents(self) -> ShardContents:
        digests = [np.void(blake2b(name.encode(), digest_size=16).digest()) for name in self.names]
        return ShardContents(np.array(digests, "V16"), self.shard_counts())

    def fingerprint(self) -> str:
        return "-".join(self.names)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def plan_of(folder: Path | None, names: str, **options: Any) -> CachePlan:
    source = options.pop("source", None) or SetOfShards([*names])
    return cache_plan(folder, source=source, **{"shard_mib": ONE_PIECE, **options})


def rows_of(plan: CachePlan) -> dict[str, bytes]:
    """Every row by the view and the id of its sample."""
    reader, source = plan.open(), plan.source
    return {
        f"{view} {source[index].id}": reader.rows([view], [index], [source[index].id]).tobytes()
        for view in range(2)
        for index in range(len(source))
    }


# ------------------------------------------------------------------------------------------------ shared shards


def test_a_set_that_gains_shards_needs_the_new_ones_alone(tmp_path: Path) -> None:
    first = plan_of(tmp_path / "c", "abc")
    assert first.build(device="cpu").rows == sum(ROWS[name] for name in "abc")
    before = contents(tmp_path / "c")
    more = plan_of(tmp_path / "c", "dabec")  # in another order, with one in front and one between
    assert more.bytes_missing() == (ROWS["d"] + ROWS["e"]) * more.layout.row_bytes
    more.source.asked.clear()  # type: ignore[attr-defined]
    assert more.build(device="cpu").rows == ROWS["d"] + ROWS["e"]
    assert {*more.source.asked} == {"d", "e"}  # type: ignore[attr-defined]
    after = contents(tmp_path / "c")
    assert before.items() <= after.items()
    alone = plan_of(tmp_path / "alone", "dabec")
    alone.build(device="cpu")
    assert rows_of(more) == rows_of(alone)  # bit for bit
    fewer = plan_of(tmp_path / "c", "be")
    assert fewer.bytes_missing() == 0
    assert rows_of(fewer).items() <= rows_of(alone).items()


def test_without_a_folder_named_the_sets_find_the_same_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert plan_of(None, "ab").folder == plan_of(None, "bcd").folder
    assert plan_of(None, "ab").folder != plan_of(None, "ab", views=ViewSpec(flip=1.0, num_views=2)).folder


def test_parts_of_a_set_share_the_shards_that_are_whole(tmp_path: Path) -> None:
    plan_of(tmp_path / "c", "abd").build(device="cpu")
    part = PartOfSource(SetOfShards("abd"), 2, 8 + 6)  # six samples of a, all of b
    plan = plan_of(tmp_path / "c", "", source=part)
    assert plan.build(device="cpu").rows == 2 * 6
    assert plan.open().num_absent(plan.keys) == 0


def test_long_shards_are_cut_into_pieces(tmp_path: Path) -> None:
    small = plan_of(tmp_path / "c", "ad", shard_mib=0.0005)  # a batch of the teacher or a few
    small.build(device="cpu")
    files = {path.name.rpartition("-")[2] for path in (tmp_path / "c" / "rows" / "v0").glob("*.rows")}
    assert len(files) > 1
    whole = plan_of(tmp_path / "d", "ad")
    whole.build(device="cpu")
    assert len([*(tmp_path / "d" / "rows" / "v0").glob("*.rows")]) == 2
    assert rows_of(small) == rows_of(whole)
    other = plan_of(tmp_path / "c", "adb", shard_mib=1.0)  # the first builder's cut holds
    assert other.build(device="cpu").rows == ROWS["b"]


# ------------------------------------------------------------------------------------------------ few rows


def test_a_run_that_reads_little_stores_no_whole_shards(tmp_path: Path) -> None:
    few = Wanted.of((), [0, 3, 9, 14, 15])  # of a, b, and all of c, which has one sample
    plan = plan_of(tmp_path / "c", "abcd", keys=few)
    assert plan.build(device="cpu").rows == len(few)
    assert plan.open().num_absent(few) == 0
    assert len([*(tmp_path / "c" / "rows").rglob("*.rows")]) == 1
    more = plan_of(tmp_path / "c", "bcda", keys=few)  # other samples have these places now
    with pytest.raises(CacheError, match="lacks"):
        more.open()
    whole = plan_of(tmp_path / "c", "abcd")
    assert whole.build(device="cpu").rows == sum(ROWS[name] for name in "abcd") - 1
    assert rows_of(whole) == rows_of(_built(tmp_path / "alone", "abcd"))
    assert plan_of(tmp_path / "c", "bcda").bytes_missing() == 0


def _built(folder: Path, names: str) -> CachePlan:
    plan = plan_of(folder, names)
    plan.build(device="cpu")
    return plan


# ------------------------------------------------------------------------------------------------ faults


def test_damage_is_found_and_built_anew(tmp_path: Path) -> None:
    plan = _built(tmp_path / "c", "abd")
    before = contents(tmp_path / "c")
    damaged = sorted((tmp_path / "c" / "rows").rglob("*.rows"))[0]
    data = bytearray(damaged.read_bytes())
    data[20] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(CacheError, match="is damaged"):
        rows_of(plan)
    cache = CacheFolder.open(tmp_path / "c")
    assert [name for name, problem in verify(cache, remove_damaged=True) if problem] == [
        str(damaged.relative_to(tmp_path / "c"))
    ]
    assert plan.build(device="cpu").rows in SIZES.values()
    assert contents(tmp_path / "c") == before
    damaged.write_bytes(damaged.read_bytes()[:-3])
    with pytest.raises(CacheError, match=r"has [\d,]+ bytes instead of"):
        plan.open()
    plan.build(device="cpu")
    assert contents(tmp_path / "c") == before
    (tmp_path / "c" / "rows" / "rows.json").write_text("{}")
    with pytest.raises(CacheError, match=r"rows\.json is damaged"):
        plan.open()


def test_a_shard_whose_samples_changed_without_its_digest_is_told(tmp_path: Path) -> None:
    _built(tmp_path / "c", "ab")

    class Changed(SetOfShards):
        def _number(self, index: int) -> int:
            return 50_000 + super()._number(index)

    builder = make_builder(make_method("clip_kd"), Changed("ab"), views=VIEWS)
    reader = plan_of(tmp_path / "c", "ab").open()
    builder.stored = {"teacher": reader}
    with pytest.raises(CacheError, match="answers another sample, view or caption"):
        builder[PlanSampler(14, batch_size=8, seed=0, start=0, stop=1).plan(0)]


def test_unreadable_samples_have_a_row_that_says_so(tmp_path: Path) -> None:
    source = SetOfShards("ab", unreadable="b")
    plan = plan_of(tmp_path / "c", "", source=source)
    built = plan.build(device="cpu")
    assert len(built.bad) == 2  # in both views
    reader = plan.open()
    assert not reader.has(0, 8)
    assert reader.has(0, 9)
    assert describe(CacheFolder.open(tmp_path / "c"))["rows_without_answer"] == 2


def test_what_is_in_it_is_told_without_the_data(tmp_path: Path) -> None:
    plan = _built(tmp_path / "c", "abd")
    _built(tmp_path / "c", "e")
    found = describe(CacheFolder.open(tmp_path / "c"))
    rows = sum(ROWS[name] for name in "abde")
    assert (found["rows"], found["rows_done"], found["shards_missing"]) == (rows, rows, 0)
    assert found["bytes"] == rows * plan.layout.row_bytes
    assert found["fidelity"]["rows"] == rows
    assert all(problem is None for _, problem in verify(CacheFolder.open(tmp_path / "c")))


def test_a_cache_of_an_earlier_version_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Earlier(SetOfShards):
        def shard_contents(self) -> Any:
            return None

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    old = plan_of(None, "", source=Earlier("abd"))
    old.build(device="cpu")
    for folder in (None, old.folder):
        now = plan_of(folder, "abd")
        assert now.folder == old.folder
        assert now.bytes_missing() == 0
        assert rows_of(now) == rows_of(old)
    with pytest.raises(CacheError, match="made from other data"):
        plan_of(old.folder, "ab").open()
    assert plan_of(None, "ab").folder != old.folder


# ------------------------------------------------------------------------------------------------ who builds


def test_processes_share_the_shards_out(tmp_path: Path) -> None:
    whole = _built(tmp_path / "whole", "abcde")
    parts = [plan_of(tmp_path / "three", "abcde").build(device="cpu", rank=rank, world_size=3) for rank in range(3)]
    assert all(0 < part.rows < len(whole.keys) for part in parts)
    assert contents(tmp_path / "three") == contents(tmp_path / "whole")


def test_a_run_reads_it_as_a_live_teacher(tmp_path: Path) -> None:
    live, _ = train(tmp_path / "live", "clip_kd", source=SetOfShards("abcde"))
    cached, _ = train(tmp_path / "cached", "clip_kd", cache={"store": "fp32"}, source=SetOfShards("abcde"))
    assert [*(tmp_path / "cached-cache" / "rows").rglob("*.rows")]
    for mine, theirs in zip(cached, live, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6, abs=1e-6)


def test_a_bank_is_drawn_from_the_set_alone(tmp_path: Path) -> None:
    _built(tmp_path / "c", "abde")
    plan = _built(tmp_path / "c", "de")
    parts = [*plan.open().embeddings(1000, plan.keys, seed=0)]
    samples = torch.cat([part[2] for part in parts]).tolist()
    assert sorted(samples) == sorted([*range(SIZES["d"] + SIZES["e"])] * 2)


# ------------------------------------------------------------------------------------------------ tars


def _tars(folder: Path, sizes: Sequence[int]) -> None:
    folder.mkdir()
    for number, size in enumerate(sizes):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for place in range(size):
                shown = io.BytesIO()
                Image.new("RGB", (24 + place, 20), (20 * place, 0, 0)).save(shown, "PNG")
                for end, data in (("png", shown.getvalue()), ("txt", f"a red boat {number} {place}".encode())):
                    member = tarfile.TarInfo(f"{place:04d}.{end}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def test_tars_added_to_a_folder_are_all_that_is_built(tmp_path: Path) -> None:
    _tars(tmp_path / "tars", [5, 7, 4])
    few = plan_of(tmp_path / "c", "", source=open_source(f"webdataset:{tmp_path}/tars/{{00000..00001}}.tar"))
    assert few.build(device="cpu").rows == 2 * 12
    every = plan_of(tmp_path / "c", "", source=open_source(f"webdataset:{tmp_path}/tars"))
    assert every.build(device="cpu").rows == 2 * 4
    limited = plan_of(tmp_path / "c", "", source=open_source(f"webdataset:{tmp_path}/tars?limit=14"))
    assert limited.build(device="cpu").rows == 2 * 2  # of a shard that is cut
    assert rows_of(limited).keys() <= rows_of(every).keys()
    ids = open_source(f"webdataset:{tmp_path}/tars?part=0-0.5")
    assert shard_contents(ids) is None


def test_what_a_shard_holds_is_its_digest(tmp_path: Path) -> None:
    _tars(tmp_path / "tars", [3, 4])
    source = open_source(f"webdataset:{tmp_path}/tars")
    found = shard_contents(source)
    assert found is not None
    assert found.counts.tolist() == [3, 4]
    (tmp_path / "copy").mkdir()
    for path in (tmp_path / "tars").iterdir():
        (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    copied = shard_contents(open_source(f"webdataset:{tmp_path}/copy"))
    assert copied is not None
    assert copied.digests.tobytes() == found.digests.tobytes()
    cut = found.part(1, 5)
    assert cut.counts.tolist() == [2, 2]
    assert len({cut.digests[n].tobytes() for n in (0, 1)} | {found.digests[n].tobytes() for n in (0, 1)}) == 4
    assert found.part(0, 5).digests[0].tobytes() == found.digests[0].tobytes()


# ------------------------------------------------------------------------------------------------ scale


def test_what_is_planned_of_a_billion_samples_takes_little(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    counts = np.full(140_000, 8_000)
    contents_of = ShardContents(np.zeros(len(counts), "V16"), counts)
    length = int(counts.sum())
    source = _Counts(counts)
    streams = Ordering("window", 64, 16).streams(source, length=length, batch_size=32_768, seed=0)
    assert streams[0].order is not None
    tracemalloc.start()
    began = time.process_time()
    wanted = keys_of_run(
        length, batch_size=32_768, seed=0, steps=50_000, views=ViewSpec(num_views=4), streams=streams
    )  # an epoch and a half
    part = ShardPart(tmp_path, 128, 3080, contents_of, 2, 21_248)
    shards, left = part.take(wanted, np.zeros(part.num_shards, bool))
    seconds, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(left) == 0
    assert 140_000 + 64_000 < len(shards) < 140_000 + 66_000  # 0.46 of an epoch, and edges of windows
    assert peak < 150 * 2**20
    assert seconds < 30


class _Counts(MemorySource):
    def __init__(self, counts: Any) -> None:
        super().__init__(int(counts.sum()))
        self.counts = counts

    def shard_counts(self) -> Any:
        return self.counts


@pytest.mark.parametrize("steps", [3, 20, 45])
@pytest.mark.parametrize("most_listed", [0, 10**9])
def test_what_a_run_reads_in_windows_is_foreseen(steps: int, most_listed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "MOST_LISTED", most_listed)
    counts = [13, 0, 40, 7, 25, 31, 1, 60, 18, 22, 9, 44]
    source = _Counts(np.array(counts))
    streams = Ordering("window", 4, 2).streams(source, length=len(source), batch_size=8, seed=3)
    views = ViewSpec(num_views=2)
    wanted = keys_of_run(len(source), batch_size=8, seed=3, steps=steps, views=views, streams=streams)
    sampler = PlanSampler(len(source), batch_size=8, seed=3, start=0, stop=steps, streams=streams)
    read = {views.view_number(plan.epoch) * len(source) + index for plan in sampler for index in plan.everyone}
    held = {*wanted.listed().tolist()}
    assert read <= held
    if most_listed and steps == 3:
        assert read == held


# ------------------------------------------------------------------------------------------------ several builders


def test_a_file_that_vanishes_while_others_build_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = _built(tmp_path / "c", "abd")
    (tmp_path / "c" / "rows" / "v0" / f"{'0' * 32}-00000.rows").symlink_to(tmp_path / "gone")  # a look at it fails
    (tmp_path / "c" / "rows" / "v0" / ".other.rows.host-1.writing").symlink_to(tmp_path / "gone")
    (tmp_path / "c" / "rows" / "v0" / "notes.json").write_text("mine")
    assert plan.open().num_absent(plan.keys) == 0
    found = [name for name, problem in verify(CacheFolder.open(tmp_path / "c"), remove_damaged=True) if problem]
    assert found == []  # what is not ours is neither called damaged nor removed
    assert (tmp_path / "c" / "rows" / "v0" / "notes.json").exists()


def test_a_finished_shard_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, folder = plan_of(tmp_path / "c", "ab"), tmp_path / "c"
    finish, before = writer._Shard.finish, dict[str, bytes]()

    def overtaken(self: Any) -> None:
        if not before:  # another builder does all of it, while this one is about to finish its first shard
            monkeypatch.setattr(writer._Shard, "finish", finish)
            with pytest.MonkeyPatch.context() as elsewhere:
                elsewhere.setattr(files, "_process_tag", lambda: "host-2")
                plan_of(folder, "ab").build(device="cpu")
            before.update({path.name: path.read_bytes() for path in folder.rglob("*.rows")})
            self._file.write(b"other bits")
        finish(self)

    monkeypatch.setattr(writer._Shard, "finish", overtaken)
    slow.build(device="cpu")
    assert {path.name: path.read_bytes() for path in folder.rglob("*.rows")} == before
    assert not [*folder.rglob("*.writing")]
    assert all(problem is None for _, problem in verify(CacheFolder.open(folder)))


def test_a_shard_that_cannot_be_fetched_ends_the_build_and_stays_unbuilt(tmp_path: Path) -> None:
    class Down(SetOfShards):
        def __getitem__(self, index: int) -> Sample:
            if self.places[index][0] == "b":
                raise BadSampleError(f"b/{index}", "the store does not answer", passing=True)
            return super().__getitem__(index)

    with pytest.raises(CacheError, match=r"does not answer\. A row that says so would stay"):
        plan_of(tmp_path / "c", "", source=Down("ab")).build(device="cpu")
    up = plan_of(tmp_path / "c", "ab")
    up.build(device="cpu")
    assert rows_of(up) == rows_of(_built(tmp_path / "alone", "ab"))


def test_a_bank_is_the_same_whatever_others_add(tmp_path: Path) -> None:
    few = Wanted.of((), [0, 3, 9, 14, 15])
    plan = plan_of(tmp_path / "c", "abcd", keys=few)
    plan.build(device="cpu")

    def bank() -> list[int]:
        return torch.cat([part[2] for part in plan.open().embeddings(4, few, seed=1)]).tolist()

    before = bank()
    _built(tmp_path / "c", "bad")  # now some rows stand twice
    assert bank() == before
    every = torch.cat([part[2] for part in plan.open().embeddings(99, few, seed=1)]).tolist()
    assert sorted(every) == few.listed().tolist()


def test_parts_of_other_sets_do_not_matter(tmp_path: Path) -> None:
    few = Wanted.of((), [0, 3])
    plan_of(tmp_path / "c", "ab", keys=few).build(device="cpu")
    (tmp_path / "c" / "part-00000" / "keys.bin").write_bytes(b"damaged")
    (tmp_path / "c" / "part-copy").mkdir()
    assert _built(tmp_path / "c", "de").open()
    with pytest.raises(CacheError, match=r"keys\.bin is damaged"):
        plan_of(tmp_path / "c", "ab", keys=few).open()


@pytest.mark.parametrize("gone", ["rows.json", "v0"])
def test_a_folder_in_disorder_is_named(gone: str, tmp_path: Path) -> None:
    plan = _built(tmp_path / "c", "ab")
    rows = tmp_path / "c" / "rows"
    if gone == "v0":
        shutil.rmtree(rows / gone)
        (rows / gone).write_text("a file")
    else:
        (rows / gone).unlink()
    for act in (plan.open, lambda: plan.build(device="cpu")):
        with pytest.raises(CacheError, match=r"rows\.json is gone|v0 is no folder"):
            act()


def test_rows_without_their_record_are_seen(tmp_path: Path) -> None:
    _built(tmp_path / "c", "ab")
    record = next((tmp_path / "c" / "rows" / "v1").glob("*.json"))
    record.unlink()  # a build was killed before it
    assert describe(CacheFolder.open(tmp_path / "c"))["shards_missing"] == 1
    assert [problem for _, problem in verify(CacheFolder.open(tmp_path / "c")) if problem] == ["not built yet"]


def test_a_reader_removes_nothing(tmp_path: Path) -> None:
    plan = _built(tmp_path / "c", "ab")
    reader, before = plan.open(), contents(tmp_path / "c").keys()
    for path in (tmp_path / "c").rglob("*.rows"):
        path.write_bytes(path.read_bytes()[:-1])
    reader.num_absent(plan.keys)
    with pytest.raises(CacheError, match=r"has [\d,]+ bytes instead of"):
        plan.open()
    assert contents(tmp_path / "c").keys() == before


def test_a_smaller_batch_of_the_teacher_is_taken_for_new_shards(tmp_path: Path) -> None:
    _built(tmp_path / "c", "a")
    plan, sizes = plan_of(tmp_path / "c", "ab", batch_size=2), list[int]()
    plan.teacher.model.register_forward_hook(lambda module, given, out: sizes.append(len(given[0].texts.ids)))
    plan.build(device="cpu")
    assert max(sizes) == 2


def test_tars_that_lie_elsewhere_have_another_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folders = []
    for name in ("photos", "drawings"):
        _tars(tmp_path / name, [3, 2])
        for pattern in ("{00000..00001}.tar", "00000.tar", "*.tar"):
            folders.append(plan_of(None, "", source=open_source(f"webdataset:{tmp_path / name}/{pattern}")).folder)
    assert folders[:3] == [folders[0]] * 3
    assert folders[3:] == [folders[3]] * 3
    assert folders[0] != folders[3]


def test_a_sample_that_another_tar_has_already_makes_another_digest(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    for number in range(2):
        with tarfile.open(tmp_path / "tars" / f"{number}.tar", "w") as tar:
            shown = io.BytesIO()
            Image.new("RGB", (20, 20)).save(shown, "PNG")
            for end, data in (("png", shown.getvalue()), ("json", b'{"id": "same", "caption": "a boat"}')):
                member = tarfile.TarInfo(f"0.{end}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    both = shard_contents(open_source(f"webdataset:{tmp_path}/tars"))
    second = shard_contents(open_source(f"webdataset:{tmp_path}/tars/1.tar"))
    assert both is not None
    assert second is not None
    assert both.digests[1].tobytes() != second.digests[0].tobytes()

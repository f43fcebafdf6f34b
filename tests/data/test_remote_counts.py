"""Remote tars whose numbers of samples lie beside them: opened without a fetch, and checked as they are read."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from making import as_json, picture, write_tar
from remotes import BATCH, IN_SHARD, SHARDS, assert_same, be_impatient, read, write_shards
from serving import Serving, serving

from cmapkd.config import ConfigError
from cmapkd.data import shard_files
from cmapkd.data.check import SampleLedger
from cmapkd.data.kept_counts import claimed_shards, keeping
from cmapkd.data.open import SourceWarning, open_source, same_reading
from cmapkd.data.parts import PartOfSource
from cmapkd.data.plans import Plan
from cmapkd.data.shard_contents import shard_contents
from cmapkd.data.shard_counts import UNKNOWN, Claims, read_claims
from cmapkd.data.shard_set import ShardWarning
from cmapkd.data.shards import ShardSource
from cmapkd.data.streams import JoinedSource
from cmapkd.data.types import BadSampleError
from cmapkd.diagnosis.data import check_overlap, check_source
from cmapkd.run import RunConfig, contents
from helpers import make_builder, make_method

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # on a single core
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork"),
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("shards")
    write_shards(place)
    return place


@pytest.fixture
def folder(shards: Path, tmp_path: Path) -> Path:
    """A folder of a test's own with the shards, and nothing beside them."""
    place = tmp_path / "store"
    place.mkdir()
    for shard in shards.iterdir():
        os.link(shard, place / shard.name)
    return place


@pytest.fixture
def store(folder: Path) -> Iterator[Serving]:
    pytest.importorskip("aiohttp", reason="of the extra http: uv sync")
    with serving(folder) as state:
        yield state


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    be_impatient(monkeypatch, tmp_path / "cache")


def say(folder: Path, **said: Any) -> None:
    """Writes what img2dataset leaves beside each shard; `s003=7` is a claim of another number of samples."""
    for tar in sorted(folder.glob("*.tar")):
        samples = said.get(f"s{tar.stem}", IN_SHARD)
        if samples is not None:
            values = {"count": 10_000, "successes": samples, "status_dict": {"success": 6, "HTTP 404": 9_994}}
            (folder / f"{tar.stem}_stats.json").write_text(json.dumps(values, indent=4))


def remote(store: Serving, options: str = "", names: str = "{000..015}.tar", **more: Any) -> ShardSource:
    source = open_source(f"webdataset:{store.url}/{names}{options}", **more)
    assert isinstance(source, ShardSource)
    return source


def fetched(store: Serving) -> set[str]:
    """The shards of which any byte was asked for."""
    return {name for method, name in store.asked if method == "GET" and name.endswith(".tar")}


def another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))


def reason_of(source: Any, index: int) -> tuple[str, str]:
    with pytest.raises(BadSampleError) as bad:
        source[index]
    return bad.value.sample_id, bad.value.reason


# ------------------------------------------------------------------------------------------------ counts that are right


def of_stats(folder: Path) -> None:
    say(folder)


def of_open_clip(folder: Path) -> None:
    (folder / "sizes.json").write_text(json.dumps({f"{n:03}.tar": IN_SHARD for n in range(SHARDS)}))


def of_wids(folder: Path) -> None:
    listed = [
        {"url": f"elsewhere/{tar.name}", "nsamples": IN_SHARD, "filesize": tar.stat().st_size}
        for tar in folder.glob("*.tar")
    ]
    values = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": listed}
    (folder / "shardindex.json").write_text(json.dumps(values))


def of_both(folder: Path) -> None:
    """A table goes before the stats, which tell of the others."""
    say(folder, s002=2)
    (folder / "sizes.json").write_text(json.dumps({"002.tar": IN_SHARD, "999.tar": 4}))


@pytest.mark.parametrize("write", [of_stats, of_open_clip, of_wids, of_both])
@pytest.mark.filterwarnings("error:.*remote shards? of")
def test_an_opening_by_counts_fetches_no_shard(write: Callable[[Path], None], folder: Path, store: Serving) -> None:
    write(folder)
    source = remote(store)
    assert len(source) == SHARDS * IN_SHARD
    assert source.shard_counts().tolist() == [IN_SHARD] * SHARDS
    assert source.num_claimed == SHARDS
    assert source.num_without_caption == 0
    assert not source.warnings
    assert not fetched(store)
    assert source[7].captions == ("picture 1 of 1",)
    assert fetched(store) == {"001.tar"}


@pytest.mark.parametrize(("kind", "workers"), [("window", 2), ("global", 0)])
def test_batches_are_those_of_local_tars(kind: str, workers: int, folder: Path, store: Serving) -> None:
    local = open_source(f"webdataset:{folder}/*.tar")
    say(folder)
    there = remote(store)
    assert len(there) == len(local)
    assert_same(read(there, kind=kind, workers=workers), read(local, kind=kind))
    assert there.id(40) == local.id(40)  # type: ignore[attr-defined]
    assert fetched(store) == {f"{shard:03}.tar" for shard in range(SHARDS)}
    assert all(store.fetched(name) == 1 for name in fetched(store))


def test_no_opening_by_counts_is_taken_for_one_by_indexes(folder: Path, store: Serving, tmp_path: Path) -> None:
    say(folder)
    counted, limited = remote(store), remote(store, "?limit=9")
    with pytest.warns(ShardWarning, match="16 remote shards of 16 have no index on this machine yet: each"):
        indexed = remote(store, "?counts=index")
    assert indexed.num_claimed == 0
    assert indexed.fingerprint() == open_source(f"webdataset:{folder}/*.tar").fingerprint()
    told = {each.fingerprint() for each in (counted, limited, indexed)}
    assert len(told) == 3
    assert contents._data("x", counted)["holds"].startswith("96 samples by the counts beside their shards, finger")
    assert contents._data("x", indexed)["holds"].startswith("96 samples, fingerprint")
    held = [shard_contents(each) for each in (counted, indexed, open_source(f"webdataset:{folder}/*.tar"))]
    by_count, by_index, local = ({*each.digests.tolist()} for each in held if each is not None)
    assert by_index == local  # so rows of a teacher's cache are shared
    assert not by_count & by_index
    joined = JoinedSource({"train": indexed, "b": PartOfSource(counted, 0, 5)}, {"b": 0.5})
    assert claimed_shards(joined) == SHARDS
    # a copy elsewhere, of other tags, is the same data; another count is not
    shutil.copytree(folder, tmp_path / "copy")
    with serving(tmp_path / "copy") as other:
        other.tags = {f"{shard:03}.tar": "another" for shard in range(SHARDS)}
        assert remote(other).fingerprint() == counted.fingerprint()
    say(tmp_path / "copy", s004=5, s005=7)
    with serving(tmp_path / "copy") as other:
        assert remote(other).fingerprint() != counted.fingerprint()


def test_a_table_is_kept_whatever_lies_beside_the_shards_later(folder: Path, store: Serving) -> None:
    say(folder)
    before = remote(store).fingerprint()
    say(folder, s003=1)
    store.asked.clear()
    assert remote(store).fingerprint() == before
    assert {method for method, _ in store.asked} == {"HEAD"}


# ------------------------------------------------------------------------------------------------ counts that are wrong


def test_what_a_shard_lacks_is_bad_samples(folder: Path, store: Serving) -> None:
    say(folder, s003=IN_SHARD + 2)
    source = remote(store)
    assert len(source) == SHARDS * IN_SHARD + 2
    assert reason_of(source, 4 * IN_SHARD) == (
        "003#6",
        "shard is short: it has 6 samples, the counts beside it say 8",
    )
    assert source.id(4 * IN_SHARD + 1) == "003#7"
    assert source[4 * IN_SHARD + 2].captions == ("picture 0 of 4",)
    one = read(source)
    assert_same(one, read(source, workers=2))
    bad = dict(chain.from_iterable(batch.bad for batch in one))
    assert {"003#6", "003#7"} == {name for name in bad if "#" in name}
    assert all(len(set(batch.ids)) == BATCH for batch in one)
    ledger = SampleLedger()
    for batch in one:
        ledger.add(len(batch.ids), batch.bad)
    assert ledger.kinds["shard is short"] == 2
    two = [read(source, rank=rank, world_size=2) for rank in range(2)]
    assert [batch.ids for batch in one] == [(*a.ids, *b.ids) for a, b in zip(*two, strict=True)]
    assert_same(read(source, start=5), one[5:])  # a resume


def test_what_a_shard_has_more_is_not_read(folder: Path, store: Serving) -> None:
    say(folder, s003=4, s005=5)
    source = remote(store)
    assert len(source) == SHARDS * IN_SHARD - 3
    with pytest.warns(ShardWarning, match="003.tar has 6 samples, and the counts beside it say 4") as told:
        ids = {source.id(index) for index in range(len(source))}
    assert len([each for each in told if "is not read" in str(each.message)]) == 1
    every = {f"{shard:03}/{number:03}" for shard in range(SHARDS) for number in range(IN_SHARD)}
    assert every - ids == {"003/004", "003/005", "005/005"}


def test_a_shard_that_is_no_tar_or_not_there_any_more_is_bad_samples(folder: Path, store: Serving) -> None:
    (folder / "002.tar").unlink()
    (folder / "002.tar").write_bytes(b"\x1f\x8b" + bytes(20_000))
    say(folder)
    source = remote(store)
    assert reason_of(source, 2 * IN_SHARD + 1)[0] == "002#1"
    assert "it is compressed" in reason_of(source, 2 * IN_SHARD + 1)[1]
    store.failing["003.tar"] = 10**6
    assert reason_of(source, 3 * IN_SHARD)[0] == "003#0"
    assert "003.tar cannot be read" in reason_of(source, 3 * IN_SHARD)[1]
    with pytest.raises(BadSampleError, match="cannot be read"):
        source.id(3 * IN_SHARD)
    batches = read(source)
    bad = {name for batch in batches for name, _ in batch.bad}
    assert bad >= {f"{shard:03}#{number}" for shard in (2, 3) for number in range(IN_SHARD)}


def test_a_truncated_shard_says_so_when_it_is_read(folder: Path, store: Serving) -> None:
    whole = (folder / "004.tar").read_bytes()
    (folder / "004.tar").unlink()
    (folder / "004.tar").write_bytes(whole[:4608])
    say(folder)
    source = remote(store)
    assert not source.warnings
    with pytest.warns(ShardWarning, match=r"^004.tar: .* truncated"):
        assert source[4 * IN_SHARD].captions == ("picture 0 of 4",)
    assert "shard is short" in reason_of(source, 5 * IN_SHARD - 1)[1]


WRONG: dict[str, bytes] = {
    "is no JSON": b'{"successes": ',
    "is no JSON ": b"[" * 100_000,
    "is no JSON  ": b'{"successes": ' + b"9" * 5_000 + b"}",
    "is no JSON object": b"[6]",
    "is no JSON object ": b"null",
    "says -1 where": b'{"successes": -1}',
    "says '6' where": b'{"successes": "6"}',
    "says 6.0 where": b'{"successes": 6.0}',
    "says inf where": b'{"successes": 1e999}',
    "says True where": b'{"successes": true}',
    "says None where": b'{"count": 6}',
    "says [6] where": b'{"successes": [6]}',
    "samples, and its 1,024 bytes have no room": b'{"successes": 3}',
    "samples, and its 1,024 bytes have no room ": b'{"successes": ' + b"9" * 400 + b"}",
    "has 4,194,304 bytes or more": b'{"successes": 1}' + b" " * 2**22,
}
WRONG_TABLES: dict[str, bytes] = {
    "shardlist that is no list": b'{"shardlist": {"a": 1}}',
    "shard without a url: 5": b'{"shardlist": [5]}',
    "shard without a url: {'url': 3}": b'{"shardlist": [{"url": 3}]}',
    "says two things of a.tar": b'{"shardlist": [{"url": "x/a.tar", "nsamples": 1}, {"url": "a.tar", "nsamples": 2}]}',
    "says of a.tar 2000 bytes": b'{"shardlist": [{"url": "a.tar", "nsamples": 1, "filesize": 2000}]}',
    "says of a.tar '1' where": b'{"shardlist": [{"url": "a.tar", "nsamples": "1"}]}',
    "says of a.tar {} where": b'{"a.tar": {}}',
}


@pytest.mark.parametrize(("name", "said"), [("stats", WRONG), ("sizes.json", WRONG_TABLES)])
def test_what_no_count_can_be_is_refused_with_a_word(name: str, said: dict[str, bytes]) -> None:
    for told, data in said.items():
        store: Any = SimpleNamespace(small=lambda urls, most, read, data=data: [read(data[:most]) for _ in urls])
        claims = read_claims(store, ["s3://b/a.tar"], [(1024, 0)], name)
        assert claims.counts.tolist() == [UNKNOWN], told
        assert told.strip() in claims.refused[0]
    many = Claims(np.zeros(0, np.int64), refused=["one", "two", "three", "four", "five"])
    assert many.warnings() == ["counts beside shards are not taken: one; two; three; and 2 more"]


def test_shards_without_a_usable_count_are_fetched_once(folder: Path, store: Serving) -> None:
    say(folder, s003=None, s005=-4, s006=10**30)
    (folder / "007_stats.json").write_bytes(b"")
    with (
        pytest.warns(ShardWarning, match=r"4 remote shards of 16 have no index .* yet, and no count beside them: each"),
        pytest.warns(SourceWarning, match="counts beside shards are not taken: .*005_stats.json says -4 .*007_stats"),
    ):
        source = remote(store)
    assert fetched(store) == {"003.tar", "005.tar", "006.tar", "007.tar"}
    assert len(source) == SHARDS * IN_SHARD
    assert source.num_claimed == SHARDS - 4
    assert_same(read(source, stop=4), read(open_source(f"webdataset:{folder}/*.tar"), stop=4))
    store.asked.clear()
    with pytest.warns(SourceWarning, match="counts beside shards are not taken"):
        assert remote(store).fingerprint() == source.fingerprint()  # kept, and said again
    assert not fetched(store)


def test_without_any_counts_each_shard_is_fetched_once(folder: Path, store: Serving) -> None:
    with pytest.warns(ShardWarning, match="3 remote shards of 3 have no index on this machine yet: each is fetched"):
        source = remote(store, names="{000..002}.tar")
    assert source.num_claimed == 0
    assert source.fingerprint() == open_source(f"webdataset:{folder}/{{000..002}}.tar").fingerprint()
    say(folder)
    assert remote(store, names="{000..002}.tar").num_claimed == 0  # this machine knows the set by its indexes
    assert remote(store, "?counts=stats", names="{000..002}.tar").num_claimed == 3


def test_a_store_that_does_not_tell_is_no_store_without_counts(folder: Path, store: Serving) -> None:
    """Else the next opening might find them, and read other batches."""
    say(folder)
    store.failing["004_stats.json"] = 10**6
    with pytest.raises(ConfigError, match=r"004_stats.json cannot be read: .*503"):
        remote(store)
    store.failing["004_stats.json"] = 2
    assert remote(store).num_claimed == SHARDS


@pytest.mark.filterwarnings("ignore:.*remote shards? of")
def test_what_must_not_be_read_is_not_there(folder: Path, store: Serving) -> None:
    """Buckets that nobody may list answer so about what they do not have."""
    say(folder)
    store.forbidden |= {"004_stats.json", "sizes.json"}
    assert remote(store).num_claimed == SHARDS - 1
    assert fetched(store) == {"004.tar"}


# ------------------------------------------------------------------------------------------------ ids and captions


@pytest.fixture
def talking(tmp_path: Path) -> Iterator[Serving]:
    """Two shards with a silent sample and, in the first, two of one id."""
    pytest.importorskip("aiohttp", reason="of the extra http: uv sync")
    place = tmp_path / "talking"
    place.mkdir()
    for shard in range(2):
        members = []
        for number in range(8):
            names = {} if number == 1 else {"caption": f"picture {number} of {shard}"}
            names |= {"id": "twice" if (shard, number) in ((0, 2), (0, 5)) else f"{shard}-{number}"}
            members += [(f"{number}.png", picture(number)), (f"{number}.json", as_json(**names))]
        write_tar(place / f"{shard}.tar", members)
        (place / f"{shard}_stats.json").write_text('{"successes": 8}')
    with serving(place) as state:
        yield state


def test_silent_samples_are_replaced_and_counted_apart(talking: Serving) -> None:
    source = remote(talking, names="{0,1}.tar", require_captions=True)
    assert (len(source), source.num_without_caption) == (16, 0)
    local = open_source(f"webdataset:{talking.folder}/*.tar", require_captions=True)
    assert (len(local), local.num_without_caption) == (14, 2)  # type: ignore[attr-defined]
    assert reason_of(source, 1) == ("0-1", "no caption")
    assert remote(talking, names="{0,1}.tar")[1].captions == ()  # who does not require captions
    batches = read(source, lanes=2, stop=2)
    ledger = SampleLedger()
    for batch in batches:
        ledger.add(len(batch.ids), batch.bad)
        assert "" not in batch.captions
    assert (ledger.num_without_caption, ledger.num_bad) == (2, 1)


def test_a_silent_sample_is_no_error(talking: Serving) -> None:
    source = remote(talking, names="1.tar", require_captions=True)
    strict = make_builder(make_method("contrastive"), source, on_bad_sample="error")
    made = strict[Plan(step=0, epoch=0, everyone=(0, 1, 2), mine=(0, 1, 2))]
    assert made.bad == (("1-1", "no caption"),)
    assert made.ids[::2] == ("1-0", "1-2")
    assert made.ids[1] in {f"1-{number}" for number in range(3, 8)}


def test_of_samples_with_one_id_in_a_shard_the_first_is_good(talking: Serving) -> None:
    local = open_source(f"webdataset:{talking.folder}/*.tar")
    source = remote(talking, names="{0,1}.tar")
    assert source[2].id == "twice"
    assert reason_of(source, 5) == reason_of(local, 5)
    assert "the sample at position 2 has it already" in reason_of(source, 5)[1]


@pytest.mark.filterwarnings("ignore:.*remote shards? of")
def test_ids_are_compared_in_shards_without_count_alone(talking: Serving) -> None:
    (talking.folder / "0_stats.json").unlink()
    source = remote(talking, names="{0,1}.tar", require_captions=True)
    assert fetched(talking) == {"0.tar"}
    assert (len(source), source.num_claimed, source.num_without_caption) == (7 + 8, 1, 1)
    assert "the sample at position 1 has it already" in reason_of(source, 4)[1]
    assert source[6].captions == ("picture 7 of 0",)
    assert reason_of(source, 7 + 1) == ("1-1", "no caption")


@pytest.mark.filterwarnings("ignore:.*remote shards? of")
def test_a_part_needs_ids_which_counts_do_not_tell(folder: Path, store: Serving) -> None:
    say(folder)
    with pytest.raises(ConfigError, match=r"part= chooses by ids: name other shards .* add counts=index"):
        remote(store, "?part=0-0.5")
    assert not fetched(store)
    parts = [remote(store, f"?part={part}&counts=index") for part in ("0-0.5", "0.5-1")]
    assert sum(map(len, parts)) == SHARDS * IN_SHARD


def test_the_doctor_fetches_nothing_to_compare_ids(folder: Path, store: Serving) -> None:
    say(folder)
    train, val = remote(store, names="{000..007}.tar"), remote(store, names="{008..015}.tar")
    told = [(each.level, each.detail) for each in check_overlap({"train": train, "val": val})]
    assert told == [("note", "not compared with data.train: ids stand in shards, which are not fetched")]
    assert [each.level for each in check_overlap({"train": train, "val": train})] == ["problem"]
    assert not fetched(store)
    recipe = {"student": "tiny:debug", "method": "contrastive", "data": {"train": "scenes"}, "training": {"steps": 1}}
    config = RunConfig.from_mapping(recipe)
    told = [each for each in check_source("val", val, config) if "beside" in each.detail]
    assert [(each.level, each.what) for each in told] == [("ok", "data.val")]
    assert told[0].detail.startswith("samples of 8 shards are counted by what lies beside, and checked")


# ------------------------------------------------------------------------------------------------ options


def test_the_source_may_say_what_counts(folder: Path, store: Serving) -> None:
    say(folder, s001=5)
    (folder / "mine.json").write_text(json.dumps({f"{shard:03}.tar": 4 for shard in range(SHARDS)}))
    assert len(remote(store)) == len(remote(store, "?counts=stats")) == SHARDS * IN_SHARD - 1
    assert len(remote(store, "?counts=mine.json")) == 4 * SHARDS
    with pytest.raises(ConfigError, match=r"no counts lie beside its shards, counts=sizes.json asks for them: leave"):
        remote(store, "?counts=sizes.json")
    for wrong in ("all", "../mine.json"):
        with pytest.raises(ConfigError, match="counts must be index, stats, or the name of a table"):
            remote(store, f"?counts={wrong}")
    assert same_reading("webdataset:s3://a/{0..3}.tar", "webdataset:s3://a/{0..3}.tar?counts=index")  # contents decide


# ------------------------------------------------------------------------------------------------ a run


@pytest.mark.filterwarnings("ignore:.*remote shard of 16")
def test_a_run_keeps_its_counts_wherever_it_goes_on(
    folder: Path, store: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(folder, s003=8, s009=None)
    file = tmp_path / "shards.json"
    with keeping(file) as kept:
        first = remote(store)
        kept.write()
    whole = read(first)
    say(folder, s003=6, s009=3)
    another_machine(monkeypatch, tmp_path)
    assert remote(store).fingerprint() != first.fingerprint()
    with keeping(file) as kept:
        again = pickle.loads(pickle.dumps(remote(store)))  # noqa: S301 - our own
        before = file.stat().st_mtime_ns
        kept.write()
        assert file.stat().st_mtime_ns == before
    assert again.fingerprint() == first.fingerprint()
    assert_same(read(again, start=5, workers=2), whole[5:])


@pytest.mark.filterwarnings("ignore:.*remote shards? of")
def test_a_run_by_indexes_goes_on_by_indexes(
    folder: Path, store: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with keeping(tmp_path / "shards.json") as kept:
        first = remote(store, names="{000..002}.tar")
        kept.write()
    say(folder)
    another_machine(monkeypatch, tmp_path)
    with keeping(tmp_path / "shards.json"):
        assert remote(store, "?counts=stats", names="{000..002}.tar").num_claimed == 3  # of another use of the shards
        assert remote(store, names="{000..002}.tar").fingerprint() == first.fingerprint()


def test_shards_that_were_exchanged_under_a_run_are_named(folder: Path, store: Serving, tmp_path: Path) -> None:
    say(folder)
    file = tmp_path / "shards.json"
    with keeping(file) as kept:
        before = remote(store).fingerprint()
        kept.write()
    store.tags["004.tar"] = "other"
    with (
        keeping(file),
        pytest.raises(ConfigError, match=r"1 of 16 shards are other files .*004.tar \(.* another tag\)"),
    ):
        remote(store)
    file.unlink()
    with keeping(file):
        assert remote(store).fingerprint() == before  # names, sizes and counts are the same


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"[]",
        b'{"version":2,"sets":{}}',
        b'{"version":1,"sets":{"a":{"counts":["1"],"stamps":[[1,2]]}}}',
        b'{"version":1,"sets":{"a":{"counts":[4294967296],"stamps":[[1,2]]}}}',
        b'{"version":1,"sets":{"a":{"counts":[1],"stamps":[[1,2],[1,2]]}}}',
    ],
)
def test_a_damaged_file_of_counts_is_refused(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / "shards.json").write_bytes(damage)
    with pytest.raises(ConfigError, match=r"shards.json is damaged"), keeping(tmp_path / "shards.json"):
        pass


def test_a_run_of_local_data_keeps_no_counts(folder: Path, tmp_path: Path) -> None:
    with keeping(tmp_path / "shards.json") as kept:
        open_source(f"webdataset:{folder}")
        kept.write()
    assert not (tmp_path / "shards.json").exists()


def test_processes_that_read_other_data_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(told: list[Any], own: Any, group: Any) -> None:
        told[:] = [own, other]

    monkeypatch.setattr(contents, "patient_group", lambda: "all of them")
    monkeypatch.setattr(contents.dist, "get_world_size", lambda _: 2)
    monkeypatch.setattr(contents.dist, "all_gather_object", gather)
    mine = {"data.train": {"at": "a", "holds": "5 samples"}, "student": {"at": "b", "holds": "random weights"}}
    other = {"data.train": "5 samples"}
    contents.check_alike(mine)
    other = {"data.train": "6 samples"}
    with pytest.raises(ConfigError, match=r"data.train: process 0 reads 5 samples, and process 1 reads 6 samples"):
        contents.check_alike(mine)


# ------------------------------------------------------------------------------------------------ indexes on the way


def test_shards_are_indexed_before_they_are_read(folder: Path, store: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "002.tar").unlink()
    (folder / "002.tar").write_bytes(b"\x1f\x8b" + bytes(20_000))
    say(folder)
    source = remote(store)
    for _ in range(20):
        if not source.hold([1, 2, 3]):
            break
    else:
        raise AssertionError("a shard that is no tar is indexed for ever")
    assert fetched(store) == {"001.tar", "002.tar", "003.tar"}

    def refuse(*_: Any) -> bytes:
        raise AssertionError("a shard is indexed by its reader")

    monkeypatch.setattr(shard_files, "build", refuse)
    assert source[IN_SHARD].captions == ("picture 0 of 1",)
    assert source[4 * IN_SHARD - 1].captions == ("picture 5 of 3",)
    with pytest.raises(AssertionError, match="by its reader"):
        source[0]

"""A cache that does not fit the run, or is not as it was written, is refused with the reason."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from cache_support import LENGTH, VIEWS, CacheReader, built, cache_plan, contents

from cmapkd.cache import CacheError, Wanted, describe, verify
from cmapkd.cache.folder import CacheFolder
from cmapkd.data.plans import PlanSampler
from cmapkd.data.views import ViewSpec
from cmapkd.models import FrozenTeacher
from cmapkd.models.vocabulary import TrainedTokenizer
from helpers import MemorySource, make_builder, make_method, make_model, make_teacher
from read_only import read_only


def with_tokenizer(words: tuple[str, ...]) -> FrozenTeacher:
    teacher = make_teacher()
    teacher.model.tokenizer = TrainedTokenizer.train([" ".join(words)] * 4, vocab_size=100, context_length=12)
    return teacher


OTHERS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "weights": ("it holds the answers of other weights", {}, lambda: make_teacher(seed=8)),
    "image size": ("image preprocessing differs", {}, lambda: make_teacher(image_size=16)),
    "tokenizer": ("tokenizer differs", {}, lambda: with_tokenizer(("other", "words", "than", "these"))),
    "views": ("other views of the samples", {"views": ViewSpec(crop_scale=(0.5, 1.0), num_views=2)}, None),
    "reading": ("other views of the samples", {"views": VIEWS.model_copy(update={"reading": "fast"})}, None),
    "data": ("made from other data", {"source": MemorySource(LENGTH + 1)}, None),
    "precision": ("in another precision", {"precision": "bf16"}, None),
    "numbers": ("it stores fp32, and cache.store is int8", {"store": "int8"}, None),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("cache") / "c").path


@pytest.mark.parametrize("name", OTHERS)
def test_what_does_not_fit(name: str, cache: Path) -> None:
    reason, changes, teacher = OTHERS[name]
    method = make_method("clip_kd", teacher=teacher() if teacher else None)
    before = contents(cache)
    plan = cache_plan(cache, method, **changes)
    for act in (plan.open, lambda: plan.build(device="cpu")):
        with pytest.raises(CacheError, match=reason):
            act()
    assert contents(cache) == before


def test_more_views_than_stored(cache: Path) -> None:
    plan = cache_plan(cache, views=VIEWS.model_copy(update={"num_views": 3}))
    with pytest.raises(CacheError, match="lacks 24 of the 72 rows"):
        plan.open()
    with pytest.raises(CacheError, match="there is no cache in"):
        cache_plan(cache / "nowhere").open()


def test_its_own_folder_for_each_teacher_and_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plans = [cache_plan(None), cache_plan(None, store="int8"), cache_plan(None, source=MemorySource(30))]
    plans += [cache_plan(None, make_method("clip_kd", teacher=make_teacher(seed=8)))]
    assert len({plan.folder for plan in plans}) == 4
    assert cache_plan(None).folder == plans[0].folder
    assert plans[0].folder.parent == tmp_path / "cmapkd" / "teachers"
    assert plans[0].folder.name.startswith("test-24-memory-")


def read_everything(reader: CacheReader) -> None:
    made = make_builder(make_method("clip_kd"), views=VIEWS, stored={"teacher": reader})
    for plan in PlanSampler(LENGTH, batch_size=8, seed=0, start=0, stop=6):
        made[plan]


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def test_a_flipped_bit(tmp_path: Path) -> None:
    cache = built(tmp_path / "c")
    whole = contents(cache.path)
    shard = sorted(cache.path.rglob("*.rows"))[1]
    flip(shard, shard.stat().st_size // 2 + 20)  # in an embedding
    plan = cache_plan(cache.path)
    with pytest.raises(CacheError, match=f"{shard.name} is damaged .*verify --remove-damaged"):
        read_everything(plan.open())
    with pytest.raises(CacheError, match="its checksum does not fit"):
        cache_plan(cache.path, check="open").open()
    read_everything(cache_plan(cache.path, check="sizes").open())
    assert [name for name, problem in verify(cache) if problem] == [f"part-00000/{shard.name}"]
    assert [name for name, problem in verify(cache, remove_damaged=True) if problem]
    with pytest.raises(CacheError, match="lacks"):
        plan.open()
    plan.build(device="cpu")
    assert contents(cache.path) == whole


@pytest.mark.parametrize("damage", ["shorter", "gone"])
def test_shards_of_another_length(damage: str, tmp_path: Path) -> None:
    cache = built(tmp_path / "c")
    whole = contents(cache.path)
    shard = sorted(cache.path.rglob("*.rows"))[0]
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-1])
    plan = cache_plan(cache.path)
    with pytest.raises(CacheError, match="is missing" if damage == "gone" else r"has [\d,]+ bytes instead of"):
        plan.open()
    assert len(describe(cache)["damaged"]) == 1
    plan.build(device="cpu")
    assert contents(cache.path) == whole


@pytest.mark.parametrize("name", ["cache.json", "part.json", "keys.bin", "shard-00000.json"])
def test_damaged_lists(name: str, tmp_path: Path) -> None:
    keys = Wanted.of((), [0, 2, 5, 7, 30, 31, 40, 47])
    cache_plan(tmp_path / "c", keys=keys).build(device="cpu")
    path = next((tmp_path / "c").rglob(name))
    flip(path, path.stat().st_size // 2)
    with pytest.raises(CacheError, match="damaged"):
        read_everything_of(tmp_path / "c", keys)


def read_everything_of(folder: Path, keys: Any) -> None:
    cache_plan(folder, keys=keys, check="open").open()


def test_another_format(tmp_path: Path) -> None:
    cache = built(tmp_path / "c")
    path = cache.path / "cache.json"
    text = json.loads(path.read_text())
    text["logit_scale"] = 3.0  # edited by hand
    path.write_text(json.dumps(text))
    with pytest.raises(CacheError, match="its digest does not fit"):
        CacheFolder.open(cache.path)


def test_a_folder_that_may_only_be_read(cache: Path, tmp_path: Path) -> None:
    with read_only(cache):
        with pytest.raises(OSError, match="Read-only"):
            (cache / "something").write_text("")  # so this test can fail
        read_everything(cache_plan(cache).open())
        assert cache_plan(cache).build(device="cpu").rows == 0
    (tmp_path / "empty").mkdir()
    with read_only(tmp_path / "empty"), pytest.raises(CacheError, match="cannot be written"):
        built(tmp_path / "empty")


def test_a_reader_crosses_processes(cache: Path) -> None:
    reader = cache_plan(cache).open()
    read_everything(reader)
    assert reader._maps
    assert reader._checks._done[0].all()  # every group of rows, each smaller than a shard here
    reader._checks._done = [each.clone() for each in reader._checks._done]  # shared memory needs torch's own pickler
    again = pickle.loads(pickle.dumps(reader))  # noqa: S301
    assert not again._maps
    read_everything(again)


def test_a_cached_teacher_is_no_part_of_a_copy(cache: Path) -> None:
    plan = cache_plan(cache)
    teacher = plan.cached_teacher(plan.open(), make_model)
    with pytest.raises(TypeError, match="never saved"):
        pickle.dumps(teacher)

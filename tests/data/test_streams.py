"""Streams: several sources side by side, each with its share of every batch and epochs of its own."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from cmapkd.cache import keys_of_run
from cmapkd.config import ConfigError
from cmapkd.data.config import DataConfig
from cmapkd.data.open import open_source, open_streams
from cmapkd.data.plans import Plan, PlanSampler
from cmapkd.data.streams import JoinedSource, Stream, interleaved, stream_sizes, streams_of
from cmapkd.data.types import Batch
from cmapkd.data.views import ViewSpec
from cmapkd.run import RunConfig
from cmapkd.run import run as execute
from helpers import MemorySource, make_builder, make_method, make_model, make_trainer


class Named(MemorySource):
    """A source that names its classes."""

    def __init__(self, length: int = 24, names: Sequence[str] | None = None, **options: Any) -> None:
        super().__init__(length, **options)
        self.names = names

    @property
    def class_names(self) -> Sequence[str] | None:
        return self.names


def streams(*pairs: tuple[int, float]) -> tuple[Stream, ...]:
    """Of (length, share): `train`, then `s1`, `s2`, ..."""
    starts = np.cumsum([0, *(length for length, _ in pairs)]).tolist()
    return tuple(
        Stream("train" if not place else f"s{place}", starts[place], length, share)
        for place, (length, share) in enumerate(pairs)
    )


def sampler(parts: tuple[Stream, ...], batch_size: int = 8, **options: Any) -> PlanSampler:
    length = sum(stream.length for stream in parts)
    return PlanSampler(
        length, **{"batch_size": batch_size, "seed": 0, "start": 0, "stop": 40, "streams": parts, **options}
    )


shares = st.lists(st.integers(1, 12), min_size=2, max_size=4).map(lambda parts: [part / sum(parts) for part in parts])


# ------------------------------------------------------------------------------------------------ how many of each


@given(shares, st.integers(1, 64))
def test_sizes_are_the_shares_rounded_by_largest_remainder(fractions: list[float], batch_size: int) -> None:
    parts = streams(*((1000, fraction) for fraction in fractions))
    if min(fraction * batch_size for fraction in fractions) < 1:  # too little for one, unless the remainders favour it
        with suppress(ConfigError):
            assert min(stream_sizes(batch_size, parts)) == 1
        return
    sizes = stream_sizes(batch_size, parts)
    assert sum(sizes) == batch_size
    assert all(abs(size - fraction * batch_size) < 1 for size, fraction in zip(sizes, fractions, strict=True))


def test_a_stream_that_gets_nothing_or_has_too_little_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"stream 's1' has a share of 0.01, which is no sample of a batch of 8"):
        stream_sizes(8, streams((100, 0.99), (100, 0.01)))
    with pytest.raises(ConfigError, match=r"stream 's1' has 3 samples, fewer than the 4 that each batch of 8 takes"):
        stream_sizes(8, streams((100, 0.5), (3, 0.5)))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 6))
def test_rows_are_spread_so_that_every_part_has_its_share(parts: list[int], processes: int) -> None:
    sizes = [part * processes for part in parts]
    rows = interleaved(sizes)
    assert Counter(rows.tolist()) == dict(enumerate(sizes))
    for part in rows.reshape(processes, -1):
        assert Counter(part.tolist()) == dict(enumerate(parts))


# ------------------------------------------------------------------------------------------------ plans


def test_without_further_streams_plans_are_what_they_were() -> None:
    plans = PlanSampler(1003, batch_size=12, seed=3, start=0, stop=400, rank=1, world_size=3)
    seen = [(plan.step, plan.epoch, plan.everyone, plan.mine) for plan in plans]
    assert hashlib.blake2b(repr(seen).encode(), digest_size=8).hexdigest() == "e7d046caf33c2a18"  # before streams
    assert not any(plan.streams or plan.epochs for plan in plans)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(2, 3), st.integers(1, 4), st.integers(0, 5))
def test_every_sample_of_a_stream_is_shown_once_in_each_of_its_epochs(
    data: st.DataObject, number: int, per_stream: int, seed: int
) -> None:
    lengths = [data.draw(st.integers(per_stream, 30)) for _ in range(number)]
    parts = streams(*((length, 1 / number) for length in lengths))
    plans = sampler(parts, batch_size=per_stream * number, seed=seed, stop=60)
    shown: dict[tuple[str, int], list[int]] = {}
    for plan in plans:
        for index, name, epoch in zip(plan.mine, plan.streams, plan.epochs, strict=True):
            stream = next(each for each in parts if each.name == name)
            assert stream.first <= index < stream.first + stream.length
            shown.setdefault((name, epoch), []).append(index)
    for stream in parts:
        epochs = [epoch for name, epoch in shown if name == stream.name]
        assert epochs == [*range(len(epochs))]
        for epoch in epochs:
            indices = shown[stream.name, epoch]
            assert len(set(indices)) == len(indices)
            if epoch < epochs[-1]:
                assert len(indices) == stream.length // per_stream * per_stream


@settings(max_examples=60, deadline=None)
@given(shares, st.sampled_from([1, 2, 3, 4, 6]), st.integers(0, 30), st.booleans())
def test_any_number_of_processes_and_any_start_read_the_same_batches(
    fractions: list[float], processes: int, start: int, staged: bool
) -> None:
    assume(min(fractions) * 24 >= 1)
    parts = streams(*((29 + 12 * place, fraction) for place, fraction in enumerate(fractions)))
    options: dict[str, Any] = {"batch_size": 24, "seed": 1}
    if staged:
        options["only"] = lambda step: (None, "s1", "train")[step // 7 % 3]
    whole = list(sampler(parts, **options))
    for rank in range(processes):
        own = list(sampler(parts, **options, start=start, rank=rank, world_size=processes))
        rows = slice(24 // processes * rank, 24 // processes * (rank + 1))
        for plan, of_all in zip(own, whole[start:], strict=True):
            assert plan.everyone == of_all.everyone
            assert plan.epoch == of_all.epoch
            assert plan.mine == of_all.everyone[rows]
            assert plan.streams == of_all.streams[rows]
            assert plan.epochs == of_all.epochs[rows]


def test_a_stage_may_read_one_stream_and_the_next_goes_on_where_it_ended() -> None:
    parts = streams((40, 0.5), (30, 0.5))
    only = {range(4, 7): "s1", range(9, 12): "train"}
    plans = list(sampler(parts, only=lambda step: next((name for steps, name in only.items() if step in steps), None)))
    for step, plan in enumerate(plans[:12]):
        names = next(({name} for steps, name in only.items() if step in steps), {"train", "s1"})
        assert {*plan.streams} == names
        assert len(set(plan.everyone)) == 8
    seen: dict[str, list[int]] = {"train": [], "s1": []}
    for plan in plans[:5]:  # 4 steps of 4 and one of 8: 24 of the 30 of s1's first epoch
        for index, name in zip(plan.everyone, plan.streams, strict=True):
            seen[name].append(index)
    assert len(set(seen["s1"])) == len(seen["s1"]) == 24
    assert {epoch for plan in plans[:5] for epoch in plan.epochs} == {0}
    assert {*plans[5].epochs} == {1}  # 6 are left, which fill no batch of 8
    backwards = sampler(parts, only=lambda step: next((name for steps, name in only.items() if step in steps), None))
    assert [backwards.plan(step) for step in reversed(range(12))] == plans[11::-1]


def test_a_stream_that_no_stage_can_read_alone_is_refused() -> None:
    plans = sampler(streams((40, 0.75), (6, 0.25)))
    plans.check_stream("train")
    with pytest.raises(ConfigError, match="stream 's1' has 6 samples, fewer than one batch of 8"):
        plans.check_stream("s1")
    with pytest.raises(ConfigError, match=r"no stream 'trian'.*train"):
        plans.check_stream("trian")


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.booleans(), st.sampled_from([None, 1, 2]))
def test_a_cache_foresees_what_is_read(steps: int, staged: bool, num_views: int | None) -> None:
    parts, views = streams((200, 0.75), (64, 0.25)), ViewSpec(num_views=num_views)
    only = (lambda step: "s1" if step % 10 > 6 else None) if staged else None
    plans = sampler(parts, stop=steps, only=only)
    read = {
        views.view_number(epoch) * 264 + index
        for plan in plans
        for index, epoch in zip(plan.mine, plan.epochs, strict=True)
    }
    keys = keys_of_run(264, batch_size=8, seed=0, steps=steps, views=views, streams=parts, only=only).listed()
    assert keys.tolist() == sorted({*keys.tolist()})
    assert read <= {*keys.tolist()}
    if steps <= 7:
        assert read == {*keys.tolist()}  # far from all: no more than needed


# ------------------------------------------------------------------------------------------------ the joined source


def joined(main: Any = None, other: Any = None, share: float = 0.25) -> JoinedSource:
    return JoinedSource({"train": main or MemorySource(40), "ref": other or MemorySource(16)}, {"ref": share})


def test_samples_keep_their_ids_in_the_main_stream_and_get_a_prefix_in_others() -> None:
    source = joined(MemorySource(40), MemorySource(16, bad=(2,)))
    assert len(source) == 56
    assert (source[3].id, source[43].id) == ("m3", "ref/m3")
    assert source.captions(43) == source.captions(3) == source[43].captions
    assert source[43].texts == source[3].texts
    assert [(stream.name, stream.first, stream.length) for stream in source.streams] == [
        ("train", 0, 40),
        ("ref", 40, 16),
    ]
    assert source.streams[0].share == pytest.approx(0.75)
    with pytest.raises(ValueError, match="'ref/m2': truncated"):
        source[42]
    with pytest.raises(IndexError, match="no sample 56"):
        source[56]
    scenes = joined(MemorySource(8), open_source("scenes?length=8"))
    assert scenes[9].id == "ref/scenes/standard/train/000000001"
    assert scenes[9].captions == open_source("scenes?length=8")[1].captions


def test_class_names_agree_or_are_absent() -> None:
    assert joined().class_names is None
    assert joined(Named(names=("a", "b"))).class_names == ("a", "b")
    assert joined(Named(), Named(names=("a", "b"))).class_names == ("a", "b")
    with pytest.raises(ConfigError, match="class 1 is 'b' in one and 'c' in the other"):
        joined(Named(names=("a", "b")), Named(names=("a", "c")))
    with pytest.raises(ConfigError, match="one has 2 classes, the other 3"):
        joined(Named(names=("a", "b")), Named(names=("a", "b", "c")))


def test_a_fingerprint_is_of_the_data_alone() -> None:
    assert joined().fingerprint() == joined(share=0.5).fingerprint()
    assert joined().fingerprint() != joined(MemorySource(41)).fingerprint()
    assert joined().fingerprint() != joined(other=MemorySource(17)).fingerprint()


def test_the_config_names_and_shares_are_checked() -> None:
    def config(**more: Any) -> DataConfig:
        return DataConfig.from_mapping({"train": "folder:a", "more": more}, where="data")

    assert config().more == {}
    with pytest.raises(ConfigError, match=r"'train' cannot be a name in data\.more"):
        config(train={"source": "x", "share": 0.5})
    with pytest.raises(ConfigError, match=r"add up to 1\.1"):
        config(a={"source": "x", "share": 0.5}, b={"source": "x", "share": 0.6})
    assert config(a={"source": "folder:b", "share": 0.5}).views != ViewSpec(crop_scale=(1, 1))
    assert config(a={"source": "scenes:hard", "share": 0.5}).views == ViewSpec(crop_scale=(1, 1))  # nothing cut off


def test_sources_are_opened_side_by_side() -> None:
    more = DataConfig.from_mapping(
        {"train": "scenes?length=30", "more": {"hard": {"source": "scenes:hard?length=20", "share": 0.25}}},
        where="data",
    ).more
    source = open_streams("scenes?length=30", more)
    assert [stream.name for stream in streams_of(source)] == ["train", "hard"]
    assert len(source) == 50
    assert streams_of(open_streams("scenes?length=30", {})) == ()
    assert source.class_names == open_source("scenes").class_names


def test_a_stream_may_hide_its_labels() -> None:
    task, other = "scenes?length=30&label=count", {"source": "scenes?length=20&start=50", "share": 0.25}

    def opened(**settings: Any) -> JoinedSource:
        given = {"train": task, "more": {"reference": {**other, **settings}}}
        found = open_streams(task, DataConfig.from_mapping(given, where="data").more)
        assert isinstance(found, JoinedSource)
        return found

    with pytest.raises(ConfigError, match=r"name their classes differently.*or hide the labels of one with labels: hi"):
        opened()
    source = opened(labels="hidden")
    assert source.class_names == open_source(task).class_names
    assert [source[index].label is None for index in (0, 29, 30, 49)] == [False, False, True, True]
    assert source[30].id == "reference/scenes/standard/train/000000050"
    assert source.unseen(30).label is None
    assert source[30].captions == open_source("scenes?start=50")[0].captions
    same = {"a": open_source("scenes?length=9"), "b": open_source("scenes?length=9")}
    assert JoinedSource(same, {"b": 0.5}).fingerprint() != JoinedSource(same, {"b": 0.5}, ["b"]).fingerprint()


# ------------------------------------------------------------------------------------------------ batches


def batches(source: JoinedSource, stop: int = 12, **options: Any) -> list[Batch]:
    plans = PlanSampler(len(source), batch_size=8, seed=0, start=0, stop=stop, streams=source.streams)
    builder = make_builder(make_method("hinton"), source, **options)
    return [builder[plan] for plan in plans]


def test_a_batch_names_the_stream_and_the_view_of_every_row() -> None:
    source = joined(share=0.5)
    found = batches(source)
    assert any(len(set(batch.views)) > 1 for batch in found)  # the small stream is in a later epoch
    for batch in found:
        assert Counter(batch.streams) == {"train": 4, "ref": 4}
        assert [name == "ref" for name in batch.streams] == [sample.startswith("ref/") for sample in batch.ids]
        assert len(batch.views) == 8
        part = batch.part(2, 5)
        assert part.streams == batch.streams[2:5]
        assert part.view_of_each == batch.views[2:5]
    (single, *_) = [make_builder(make_method("hinton"))[Plan(0, 3, (1, 2), (1, 2))]]
    assert (single.streams, single.views, single.view_of_each) == ((), (), (3, 3))


def test_a_row_is_what_its_sample_shows_in_its_own_epoch() -> None:
    source, views = joined(share=0.5), ViewSpec(crop_scale=(0.3, 0.6))
    builder = make_builder(make_method("hinton"), source, views=views)
    plans = PlanSampler(len(source), batch_size=8, seed=0, start=0, stop=12, streams=source.streams)
    plan = plans.plan(9)
    batch = builder[plan]
    for row, (index, epoch) in enumerate(zip(plan.mine, plan.epochs, strict=True)):
        alone = builder[Plan(0, epoch, (index,), (index,))]
        assert alone.ids[0] == batch.ids[row]
        assert torch.equal(alone.inputs["teacher"].images[0], batch.inputs["teacher"].images[row])
        assert alone.captions[0] == batch.captions[row]


def test_a_bad_sample_is_replaced_by_one_of_its_stream() -> None:
    source = joined(MemorySource(40, bad=(1, 2, 3)), MemorySource(16, bad=range(0, 16, 2)), share=0.5)
    found = batches(source)
    assert {sample.partition("/")[0] for batch in found for sample, _ in batch.bad} >= {"ref", "m1"}
    for batch in found:
        assert Counter(sample.startswith("ref/") for sample in batch.ids) == {False: 4, True: 4}
        assert len(set(batch.ids)) == 8


def test_parts_of_processes_make_the_whole_batch() -> None:
    source = joined(MemorySource(40, bad=(3,)), MemorySource(16, bad=(5,)), share=0.25)
    builder = make_builder(make_method("hinton"), source)
    for step in range(6):
        whole, *parts = (
            builder[
                PlanSampler(
                    56, batch_size=8, seed=0, start=0, stop=9, rank=rank, world_size=world, streams=source.streams
                ).plan(step)
            ]
            for world, rank in ((1, 0), (2, 0), (2, 1))
        )
        assert whole.ids == tuple(chain.from_iterable(part.ids for part in parts))
        assert whole.streams == tuple(chain.from_iterable(part.streams for part in parts))
        assert all(part.streams.count("ref") == 1 for part in parts)
        images = torch.cat([part.inputs["student"].images for part in parts])
        assert torch.equal(whole.inputs["student"].images, images)


# ------------------------------------------------------------------------------------------------ a whole run


def test_a_run_over_streams_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    source = joined(share=0.5)
    whole = make_trainer(tmp_path / "whole", source=source, steps=6, checkpoint_every=3)
    whole.run()
    (tmp_path / "again").mkdir()
    for name in ("checkpoints", "metrics.jsonl"):
        origin, copy = tmp_path / "whole" / name, tmp_path / "again" / name
        shutil.copytree(origin, copy) if origin.is_dir() else shutil.copy(origin, copy)
    last = max((tmp_path / "again" / "checkpoints").iterdir(), key=lambda folder: folder.name)
    shutil.rmtree(last)
    again = make_trainer(tmp_path / "again", source=source, steps=6, checkpoint_every=3)
    again.run(resume=True)
    assert again.progress.step == 6
    for name, value in whole.method.state_dict().items():
        assert torch.equal(value, again.method.state_dict()[name]), name


def test_a_recipe_with_streams_and_a_cache_is_the_run_without_a_cache(tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    make_model(seed=7).save(teacher)

    def run(out: str, **more: Any) -> dict[str, torch.Tensor]:
        config = RunConfig.from_mapping(
            {
                "teacher": str(teacher),
                "student": "tiny:debug",
                "data": {
                    "train": "scenes?length=24&size=32",
                    "more": {"hard": {"source": "scenes:hard?length=8&size=32", "share": 0.5}},
                    "views": {"num_views": 2},
                },
                "method": "hinton",
                "training": {"steps": 7, "batch_size": 8, "device": "cpu", "precision": "fp32"},
                "baseline": "none",
                **more,
            }
        )
        execute(config, out=tmp_path / out)
        return load_file(next((tmp_path / out / "student").glob("*.safetensors")))

    live = run("live")
    cached = run("cached", cache={"mode": "auto", "store": "fp32", "folder": str(tmp_path / "cache")})
    for name, value in live.items():
        torch.testing.assert_close(value, cached[name], rtol=1e-4, atol=1e-5)

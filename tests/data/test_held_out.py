"""Held-out pairs: a pure function of the step, shared out among processes, and never trained on."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import yaml

from cmapkd.config import ConfigError
from cmapkd.data.batches import BatchBuilder
from cmapkd.data.config import DataConfig
from cmapkd.data.held_out import WithHeldOut, open_held_out
from cmapkd.data.loading import make_loader
from cmapkd.data.open import open_source, open_streams
from cmapkd.data.parts import PartOfSource
from cmapkd.data.plans import PlanSampler
from cmapkd.data.types import Source
from cmapkd.run import RunConfig, run
from helpers import MemorySource, make_builder, make_method

RECIPE = {
    "teacher": "tiny:scenes-teacher",
    "student": "tiny:debug",
    "data": {"train": "scenes:easy?length=30", "test": "scenes:easy@test?length=8", "held_out": 10},
    "method": {"name": "cmapkd", "weighting": {"name": "gradient_alignment", "every": 2}},
    "training": {"steps": 3, "batch_size": 10, "device": "cpu", "log_every": 1},
    "evaluation": {"tasks": ["retrieval"]},
}


def beside(training: Source, held_out: Source, *, every: int = 1, rank: int = 0, world_size: int = 1) -> WithHeldOut:
    method = make_method("contrastive")
    builders: list[BatchBuilder] = [make_builder(method, source) for source in (training, held_out)]
    return WithHeldOut(*builders, every=every, batch_size=4, seed=3, rank=rank, world_size=world_size)


def halves(length: int = 24, held_out: int = 8) -> tuple[Source, Source]:
    source = MemorySource(length)
    return PartOfSource(source, 0, length - held_out), PartOfSource(source, length - held_out, length)


def plans(builder: WithHeldOut, *, rank: int = 0, world_size: int = 1, start: int = 0, stop: int = 6) -> PlanSampler:
    length = len(builder.source)
    return PlanSampler(length, batch_size=4, seed=3, start=start, stop=stop, rank=rank, world_size=world_size)


def test_some_steps_have_held_out_pairs_which_no_step_trains_on() -> None:
    builder = beside(*halves(), every=2)
    batches = [builder[plan] for plan in plans(builder)]
    assert [batch.held_out is not None for batch in batches] == [True, False] * 3
    trained = {each for batch in batches for each in batch.ids}
    held = [each for batch in batches if batch.held_out is not None for each in batch.held_out.ids]
    assert not trained & {*held}
    assert {*held[:8]} == {f"m{i}" for i in range(16, 24)}  # one epoch of the eight is two readings
    assert sorted(held[:4]) != sorted(held[8:])  # and the next epoch has another order
    assert {*batches[0].held_out.inputs} == {"student"}


def test_the_pairs_depend_on_the_step_alone() -> None:
    builder = beside(*halves())
    first = [builder[plan].held_out for plan in plans(builder)]
    later = [beside(*halves())[plan].held_out for plan in plans(builder, start=4)]
    assert [batch.ids for batch in first[4:]] == [batch.ids for batch in later]
    carried = pickle.loads(pickle.dumps(builder))  # noqa: S301  to a worker and back
    assert carried[plans(builder).plan(2)].held_out.ids == first[2].ids


def test_processes_share_the_pairs_of_one() -> None:
    whole = beside(*halves())
    parts = [beside(*halves(), rank=rank, world_size=2) for rank in (0, 1)]
    for step in range(3):
        ids = whole[plans(whole).plan(step)].held_out.ids
        found = [part[plans(part, rank=r, world_size=2).plan(step)].held_out.ids for r, part in enumerate(parts)]
        assert found[0] + found[1] == ids


@pytest.mark.parametrize("workers", [0, 1])
def test_a_training_batch_with_a_held_out_pair_stops_the_run(workers: int) -> None:
    source = MemorySource(12)
    builder = beside(source, PartOfSource(source, 8, 12))
    sampler = plans(builder)
    with pytest.raises(ConfigError, match=r"'m\d+' is among data.held_out and is trained on at step"):
        list(make_loader(builder, sampler, workers=workers, pin_memory=False))


def test_fewer_pairs_than_a_batch_are_one_batch() -> None:
    builder = beside(*halves(24, 3))
    assert len(builder[plans(builder).plan(0)].held_out) == 3
    with pytest.raises(ConfigError, match="3 pairs for 4 processes"):
        beside(*halves(24, 3), world_size=4)


def test_parts_of_a_batch_and_moves() -> None:
    builder = beside(*halves())
    batch = builder[plans(builder).plan(0)]
    assert batch.part(0, 2).held_out is None
    assert batch.only("student").held_out is None
    assert batch.to("cpu").held_out.ids == batch.held_out.ids
    assert batch.to("meta").held_out.inputs["student"].images.device.type == "meta"


def test_a_part_of_a_source_is_that_part() -> None:
    source = MemorySource(10)
    part = PartOfSource(source, 4, 9)
    assert [part[i].id for i in range(len(part))] == [f"m{i}" for i in range(4, 9)]
    assert part.captions(0) == source.captions(4)
    assert part.fingerprint() not in (source.fingerprint(), PartOfSource(source, 4, 8).fingerprint())
    with pytest.raises(IndexError, match="no sample 5"):
        part[5]
    with pytest.raises(ConfigError, match=r"lower data\.held_out"):
        PartOfSource(source, -2, 10)


def test_a_number_takes_the_last_pairs_of_the_training_data() -> None:
    spec = "scenes:easy?length=20"
    training, held_out = open_streams(spec, {}, held_out=5), open_held_out(spec, 5)
    assert (len(training), len(held_out)) == (15, 5)
    assert training[0].id == open_source(spec, split="train")[0].id
    assert held_out[0].id == open_source(spec, split="train")[15].id
    assert open_held_out(spec, "scenes:hard?length=3")[2].id == "scenes/hard/train/000000002"
    with pytest.raises(ConfigError, match=r"lower data\.held_out"):
        open_streams(spec, {}, held_out=20)


def test_one_pair_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to be told apart"):
        DataConfig.from_mapping({"train": "scenes", "held_out": 1})


def test_a_run_selects_by_pairs_that_it_never_trains_on(tmp_path: Path) -> None:
    config = RunConfig.from_mapping(RECIPE)
    run(config, out=tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all("selection/weight/P2" in line for line in lines[:3])
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["data"]["held_out"] == 10


def test_a_run_without_such_pairs_is_refused_before_it_begins(tmp_path: Path) -> None:
    data = {key: value for key, value in RECIPE["data"].items() if key != "held_out"}
    with pytest.raises(ConfigError, match=r"set data\.held_out to a number"):
        run(RunConfig.from_mapping({**RECIPE, "data": data}), out=tmp_path / "run")

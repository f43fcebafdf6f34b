"""Samples kept in memory: the same ones, read once, and no more than fit."""

from __future__ import annotations

from dataclasses import replace

import torch
from PIL import Image

from cmapkd.data.memory import MIB, SampleMemory, size_of
from cmapkd.data.plans import PlanSampler
from helpers import MemorySource, make_builder, make_method


class Counting(MemorySource):
    def __init__(self, length: int, bad: tuple[int, ...] = ()) -> None:
        super().__init__(length, bad=bad)
        self.read: list[int] = []

    def __getitem__(self, index: int):  # type: ignore[no-untyped-def]
        self.read.append(index)
        return super().__getitem__(index)


def test_batches_are_the_same_and_each_sample_is_read_once() -> None:
    plans = list(PlanSampler(12, batch_size=4, seed=0, start=0, stop=9))  # three epochs
    method = make_method("contrastive")
    source = Counting(12, bad=(5,))
    kept = make_builder(method, source, memory=1)
    batches = [kept[plan] for plan in plans]
    good = [index for index in source.read if index != 5]
    assert sorted(good) == [index for index in range(12) if index != 5]
    assert source.read.count(5) == 3  # what cannot be read is tried, and counted, every time
    plain = make_builder(method, MemorySource(12, bad=(5,)))
    for plan, batch in zip(plans, batches, strict=True):
        again = plain[plan]
        assert (batch.ids, batch.captions, batch.bad) == (again.ids, again.captions, again.bad)
        torch.testing.assert_close(batch.inputs["student"].images, again.inputs["student"].images, rtol=0, atol=0)


def test_what_does_not_fit_is_read_again() -> None:
    source = Counting(10)
    memory = SampleMemory(source, 1)
    memory.room = 3 * max(size_of(MemorySource(10)[i]) for i in range(10))
    for _ in range(4):
        for index in range(10):
            assert memory[index].id == MemorySource(10)[index].id
    held = [index for index in range(10) if source.read.count(index) == 1]
    assert 3 <= len(held) < 10  # the first ones, for good
    assert all(source.read.count(index) == 4 for index in range(10) if index not in held)
    assert SampleMemory(source, 64).room == 64 * MIB


def test_one_that_is_too_large_does_not_keep_the_others_out() -> None:
    source = Counting(4)
    memory = SampleMemory(source, 1)
    large = replace(source[0], image=Image.new("RGB", (1024, 1024)))  # 4 MiB
    memory.source = {0: large, 1: source[1]}  # type: ignore[assignment]
    assert memory[0] is large
    assert memory[1] is memory[1]
    memory.source = {0: source[0]}  # type: ignore[assignment]
    assert memory[0] is not large  # read again


def test_none_is_kept_without_memory() -> None:
    source = Counting(4)
    memory = SampleMemory(source, 0)
    assert memory[1].id == memory[1].id
    assert source.read == [1, 1]

"""What the doctor sees in the data: what can be read, and what is missing."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping
from typing import Literal

from cmapkd.config import counted
from cmapkd.data.check import percent
from cmapkd.data.fetch_ahead import FetchAhead
from cmapkd.data.kept_counts import claimed_shards
from cmapkd.data.left_out import without_caption
from cmapkd.data.plans import PlanSampler
from cmapkd.data.stored import StoredSource
from cmapkd.data.types import BadSampleError, Source
from cmapkd.diagnosis.finding import Finding
from cmapkd.run import RunConfig, read_streams

COMPARED_PICTURES = 64  # of those that two sources may share, by the names of their files
FEW_SHARDS = 128  # that batches are mixed from, below which it is told
CHECKED_SAMPLES = 64  # read from the start, the middle and the end of each source


def check_source(role: str, source: Source, config: RunConfig) -> Iterator[Finding]:
    length = len(source)
    step = max(1, length // CHECKED_SAMPLES)
    indices = range(0, length, step)[:CHECKED_SAMPLES]
    bad: list[BadSampleError] = []
    captions: list[int] = []
    asked: list[int] = []
    sizes: list[int] = []
    labelled = 0
    for index in indices:
        try:
            sample = source[index]
        except BadSampleError as error:
            bad.append(error)
            continue
        captions.append(len(sample.captions))
        asked.append(1 if sample.turns else len(sample.questions))
        sizes.append(min(sample.image.size))
        labelled += sample.label is not None
    what = f"data.{role}"
    if captions:
        yield Finding(
            "ok",
            what,
            f"{counted(length, 'sample')}; of {len(captions)} read: {statistics.mean(captions):.1f} captions "
            + (f"and {statistics.mean(asked):.1f} questions or dialogues " if config.writes else "")
            + f"each, short side {min(sizes)}-{max(sizes)} px, {labelled} with a label",
        )
    if bad:
        share = len(bad) / len(indices)
        level: Literal["note", "problem"] = "problem" if share > config.data.max_bad_share else "note"
        limit = config.data.max_bad_share
        yield Finding(
            level,
            what,
            f"{len(bad)} of {len(indices)} samples cannot be used ({percent(share, beside=limit)}; training stops "
            f"above data.max_bad_share, {100 * limit:.4g} %), first: {bad[0]}",
        )
    if claimed := claimed_shards(source):
        yield Finding(
            "ok",
            what,
            f"samples of {counted(claimed, 'shard')} are counted by what lies beside, and checked as they are read",
        )
    if left_out := without_caption(source):
        yield Finding("note", what, f"{counted(left_out, 'sample')} without a caption: left out")
    if role == "train":
        if length < config.training.batch_size:
            yield Finding(
                "problem",
                what,
                f"{counted(length, 'sample')} cannot fill one batch of {config.training.batch_size}: lower "
                "training.batch_size",
            )
        elif captions and not all(captions) and config.method.reads_captions and not config.writes:
            yield Finding(
                "problem", what, f"{captions.count(0)} of {len(captions)} samples have no caption to train on"
            )


def check_order(source: Source, config: RunConfig) -> Iterator[Finding]:
    """How the samples of an epoch are mixed, and what of them is read at a time."""
    size, what = config.training.batch_size, "data.order"
    if len(source) < size:  # `check_source` says so
        return
    try:
        streams = read_streams(config, source)
        FetchAhead(
            source, PlanSampler(len(source), batch_size=size, seed=config.seed, start=0, stop=0, streams=streams)
        )
    except ValueError as error:
        yield Finding("problem", what, str(error))
        return
    for stream in streams:
        order, who = stream.order, "" if len(streams) == 1 else f"{stream.name}: "
        if order is None:
            continue
        middle = order.lane // 2 // order.rows * size
        read, shards = len(order.shards(0, middle, middle + size)), int((order.counts > 0).sum())
        alike = f"1 in {1 / order.share_of_one_shard:,.0f} pairs of a batch is of one shard"
        told = f"{who}{order.describe()}: about {read:,} of {shards:,} shards are read at a time, and {alike}"
        yield Finding("ok", what, told)
        if order.lanes * order.window < FEW_SHARDS and read < shards:
            few = f"{counted(order.lanes, 'lane')} of {counted(order.window, 'shard')}"
            advice = "raise data.window, or take a training.batch_size that 64 divides"
            yield Finding("note", what, f"{who}{few} let samples of one shard meet often: {advice}")


def check_overlap(sources: Mapping[str, Source]) -> Iterator[Finding]:
    """Whether the same pictures are trained on and measured on, or chosen by and reported on.

    Pictures whose files have one name are compared. Built-in sources are the same where their fingerprints are.
    """
    for (first, one), (second, other) in itertools.combinations(sources.items(), 2):
        level: Literal["note", "problem"] = "problem" if first == "train" else "note"
        what = f"data.{second}"
        why = (
            "its scores say nothing of new pictures" if first == "train" else "decisions are made on the final numbers"
        )
        claimed = claimed_shards(one) or claimed_shards(other)
        shared = None if claimed else _shared(one, other)
        if one.fingerprint() == other.fingerprint() and (shared is None or shared[0] == shared[1]):
            yield Finding(level, what, f"is the same data as data.{first}: {why}")
        elif claimed:
            yield Finding("note", what, f"not compared with data.{first}: ids stand in shards, which are not fetched")
        elif shared is not None and shared[0]:
            same, compared, named = shared
            yield Finding(
                level,
                what,
                f"{same} of {compared} pictures compared are in data.{first} too ({named:,} have one file name): {why}",
            )


def _shared(one: Source, other: Source) -> tuple[int, int, int] | None:
    """Of pictures with one file name in both: how many are equal, how many were compared, and how many there are."""
    if not (isinstance(one, StoredSource) and isinstance(other, StoredSource)):
        return None
    places = {one.id(index).rpartition("/")[2]: index for index in range(len(one))}
    pairs = [
        (places[name], index) for index in range(len(other)) if (name := other.id(index).rpartition("/")[2]) in places
    ]
    chosen = pairs[:: max(1, len(pairs) // COMPARED_PICTURES)][:COMPARED_PICTURES]
    same = 0
    for index, its_index in chosen:
        try:
            first, second = one[index].image, other[its_index].image
        except BadSampleError:
            continue
        same += first.size == second.size and first.tobytes() == second.tobytes()
    return same, len(chosen), len(pairs)

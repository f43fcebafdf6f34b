"""What the doctor sees in the data: what can be read, and what is missing."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Literal

from cmapkd.data.types import BadSampleError, Source
from cmapkd.diagnosis.finding import Finding
from cmapkd.run import (
    RunConfig,
)

CHECKED_SAMPLES = 64  # read from the start, the middle and the end of each source


def check_source(role: str, source: Source, config: RunConfig) -> Iterator[Finding]:
    length = len(source)
    step = max(1, length // CHECKED_SAMPLES)
    indices = range(0, length, step)[:CHECKED_SAMPLES]
    bad: list[BadSampleError] = []
    captions: list[int] = []
    sizes: list[int] = []
    labelled = 0
    for index in indices:
        try:
            sample = source[index]
        except BadSampleError as error:
            bad.append(error)
            continue
        captions.append(len(sample.captions))
        sizes.append(min(sample.image.size))
        labelled += sample.label is not None
    what = f"data.{role}"
    if captions:
        yield Finding(
            "ok",
            what,
            f"{length:,} samples; of {len(captions)} read: {statistics.mean(captions):.1f} captions each, short side "
            f"{min(sizes)}-{max(sizes)} px, {labelled} with a label",
        )
    if bad:
        share = len(bad) / len(indices)
        level: Literal["note", "problem"] = "problem" if share > config.data.max_bad_share else "note"
        yield Finding(
            level, what, f"{len(bad)} of {len(indices)} samples cannot be used ({100 * share:.1f} %), first: {bad[0]}"
        )
    if role == "train":
        if length < config.training.batch_size:
            yield Finding(
                "problem",
                what,
                f"{length} samples do not fill one batch of {config.training.batch_size}: lower training.batch_size",
            )
        elif captions and not all(captions) and config.method.reads_captions:
            yield Finding(
                "problem", what, f"{captions.count(0)} of {len(captions)} samples have no caption to train on"
            )

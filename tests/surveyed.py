"""Passes over small data in which a teacher answers, in one line each; and answers that are made up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from cmapkd.config import load_config
from cmapkd.data.texts import TextChoice
from cmapkd.features import sample_keys
from cmapkd.methods import Method
from cmapkd.methods.targets import Answered
from cmapkd.run.cached import wanted_keys
from cmapkd.run.config import RunConfig
from cmapkd.run.targets import SurveyOfRun
from helpers import CLASSES, MemorySource

RUN = ("data.train=scenes?length=40", "training.batch_size=8", "training.micro_batch=5", "baseline=none")


def survey_of(method: Method, *changes: str, source: Any = None, stored: dict[str, Any] | None = None) -> SurveyOfRun:
    """The pass that a run over a `MemorySource` makes."""
    config = load_config(
        RunConfig, "clip_kd_scenes", [*RUN, "training.steps=9", "data.views.crop_scale=[0.6,1]", *changes]
    )
    source = source or MemorySource(40)
    wanted = wanted_keys(config, method, source, whole=False)
    return SurveyOfRun(config, method, source, stored or {}, TextChoice(method.text_pools), wanted)


def made_up(number: int = 40, dim: int = 24, seed: int = 0) -> Any:
    """A survey with answers of noise, as a teacher of `make_teacher` could give them of the samples m0, m1, ..."""
    draws = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, number, dim, generator=draws)
    keys, labels = sample_keys(f"m{i}" for i in range(number)), torch.arange(number) % len(CLASSES.names)

    def survey(role: str = "teacher", *, num: int | None = None, towers: Any = None) -> Iterator[Answered]:
        for first in range(0, number, 16):
            here = slice(first, first + 16)
            yield Answered(image[here], text[here], keys[here], labels[here])

    return survey

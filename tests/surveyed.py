"""Passes over small data in which a teacher answers, in one line each."""

from __future__ import annotations

from typing import Any

from cmapkd.config import load_config
from cmapkd.data.texts import TextChoice
from cmapkd.methods import Method
from cmapkd.run.cached import wanted_keys
from cmapkd.run.config import RunConfig
from cmapkd.run.targets import SurveyOfRun
from helpers import MemorySource

RUN = ("data.train=scenes?length=40", "training.batch_size=8", "training.micro_batch=5", "baseline=none")


def survey_of(method: Method, *changes: str, source: Any = None, stored: dict[str, Any] | None = None) -> SurveyOfRun:
    """The pass that a run over a `MemorySource` makes."""
    config = load_config(
        RunConfig, "clip_kd_scenes", [*RUN, "training.steps=9", "data.views.crop_scale=[0.6,1]", *changes]
    )
    source = source or MemorySource(40)
    assert config.data.views is not None
    wanted = wanted_keys(config, method, source, config.data.views, whole=False)
    return SurveyOfRun(config, method, source, stored or {}, TextChoice(method.text_pools), wanted)

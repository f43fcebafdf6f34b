"""What a user should know of a run before it begins, because its end would come as a surprise."""

from __future__ import annotations

from collections.abc import Iterator

from cmapkd.models.untrained import why_untrained
from cmapkd.run.config import RunConfig


def remarks(config: RunConfig) -> Iterator[str]:
    """Sentences; none of them stops the run."""
    if config.data.final is None:
        yield "neither data.val nor data.test is named: the run ends without scores"
    for role, model in config.teachers.items():
        why = why_untrained(model)
        if why is not None:
            yield f"{role}: {why}"
    steps, warmup = config.training.steps, config.optim.warmup_steps
    if steps is not None and warmup >= steps:
        yield (
            f"{warmup:,} of {steps:,} steps warm up, so the learning rate never reaches its peak: lower "
            "optim.warmup_steps, or take more steps"
        )

"""Where a run stands when a step is taken, and the random numbers that belong to that step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cmapkd.data.random import key_of
from cmapkd.methods.stages import WHOLE_RUN, StageConfig


@dataclass(frozen=True, slots=True)
class StepInfo:
    """One optimizer step of a run. The trainer makes it; every process has the same.

    Attributes:
        step: optimizer steps done before this one; 0 is the first.
        total: optimizer steps of the whole run, >= 1.
        stage: the stage that the step belongs to.
        progress: share of the stage's steps that are done, in [0, 1).
        seed: of the run.
    """

    step: int = 0
    total: int = 1
    stage: StageConfig = WHOLE_RUN
    progress: float = 0.0
    seed: int = 0

    def generator(self, name: str) -> torch.Generator:
        """Random numbers on the CPU for one purpose, a pure function of (seed, step, `name`).

        A loss must draw from such a generator and never from the process's own one. All processes then compute the same
        loss, and a resumed run draws what an undisturbed run would have drawn.
        """
        return torch.Generator().manual_seed(key_of("step", self.seed, self.step, name) % 2**63)

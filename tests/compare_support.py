"""Pretended runs whose scores, curves and pictures a test chooses, for tests of comparisons."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cmapkd.compare import ComparisonConfig, ComparisonResult, compare
from cmapkd.data.open import open_source
from cmapkd.evaluation.picture_ranks import PictureRanks
from cmapkd.evaluation.ranking import RankCounts
from cmapkd.models import build_model
from cmapkd.results import RunResult
from cmapkd.run import RunConfig, vocabulary_captions
from cmapkd.run.measure import RANKS

ARMS = {name: {"method": name} for name in ("contrastive", "hinton", "clip_kd")}
TEACHER_SCORE = 80.0


def write_recipe(folder: Path, *, test: str | None = None, baseline: str = "none", **training: Any) -> Path:
    """A recipe of 40 steps with a teacher on disk; `training` goes over its settings."""
    torch.manual_seed(1)
    build_model("tiny:debug", captions=vocabulary_captions(open_source("scenes?length=50"))).save(folder / "teacher")
    values = {
        "teacher": str(folder / "teacher"),
        "student": {"name": "tiny:debug", "options": {"embed_dim": 16}},
        "data": {"train": "scenes?length=64&size=32", "val": "scenes@val?length=20&size=32", "test": test},
        "method": "clip_kd",
        "training": {"steps": 40, "batch_size": 16, "device": "cpu", **training},
        "evaluation": {"templates": "plain"},
        "baseline": baseline,
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(values))
    return folder / "mine.yaml"


class PretendedRuns:
    """Stands for `run` in a comparison.

    Args:
        score: mean R@1 of a run's student.
        teacher: mean R@1 of a run's teacher.
        curve: share of the final score at each logged validation, by step.
        leave: leaves more files in the folder of a finished run.
    """

    def __init__(
        self,
        score: Callable[[RunConfig], float],
        *,
        teacher: Callable[[RunConfig], float] = lambda config: TEACHER_SCORE,
        curve: Mapping[int, float] | None = None,
        leave: Callable[[RunConfig, Path], None] = lambda config, out: None,
    ) -> None:
        self.score, self.teacher, self.curve, self.leave = score, teacher, curve or {}, leave

    def __call__(self, config: RunConfig, *, out: Path, **_: Any) -> RunResult:
        out.mkdir(parents=True)
        (out / "config.yaml").write_text(yaml.safe_dump(config.plain(), sort_keys=False))
        score = self.score(config)
        lines = [{"step": step, "validation/mean_r@1": score * share} for step, share in self.curve.items()]
        (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        metrics: dict[str, Any] = {
            "teacher": None if config.teacher is None else _scores(self.teacher(config)),
            "student": _scores(score),
            "steps": config.training.steps,
            "batch_size": config.training.batch_size,
            "train_seconds": 4.0,
        }
        (out / "metrics.json").write_text(json.dumps(metrics))
        self.leave(config, out)
        return RunResult(out, metrics)


def hits_of(config: RunConfig) -> torch.Tensor:
    """Which of 60 pictures, of two captions each, a pretended student finds; the same for both directions."""
    share = {"contrastive": 0.3, "hinton": 0.4, "clip_kd": 0.7}[config.method.name]
    of_picture = torch.rand(60, generator=torch.Generator().manual_seed(0))
    of_run = torch.rand(60, generator=torch.Generator().manual_seed(config.seed + 1))
    return 0.7 * of_picture + 0.3 * of_run < share


def score_of(config: RunConfig) -> float:
    return 100 * float(hits_of(config).double().mean())


def leave_ranks(config: RunConfig, out: Path, *, digest: str = "pictures") -> None:
    missed = (~hits_of(config)).long()
    ones, nothing = torch.ones(60, dtype=torch.long), torch.zeros(60, dtype=torch.long)
    both = RankCounts(missed.repeat_interleave(2), nothing.repeat(2), ones.repeat(2))
    ranks = {"i2t": RankCounts(missed, nothing, ones), "t2i": both}
    PictureRanks(digest, 2 * ones, nothing.bool(), ranks).save(out / RANKS)


def _scores(mean: float) -> dict[str, Any]:
    return {
        "retrieval": {"mean_r@1": mean, "i2t": {"median_rank": 100 - mean}},
        "zero_shot": {"top1": mean / 2},
        "params": 10,
    }


def leave_figures_blank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made, and written as empty files: to render them takes most of the time where runs are pretended."""
    if find_spec("matplotlib") is not None:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _figure, path, **_: Path(path).write_bytes(b""))


def compare_pretended(
    recipe: Path, out: Path, monkeypatch: pytest.MonkeyPatch, runs: PretendedRuns, **values: Any
) -> ComparisonResult:
    """Compares `ARMS` over six seeds, or as `values` say, with pretended runs."""
    monkeypatch.setattr("cmapkd.compare.execute.run", runs)
    monkeypatch.setattr("gc.collect", lambda: 0)  # a tenth of a second a run, with nothing to collect here
    leave_figures_blank(monkeypatch)
    settings = {"base": str(recipe), "seeds": list(range(6)), "arms": ARMS} | values
    return compare(ComparisonConfig.from_mapping(settings), out=out)

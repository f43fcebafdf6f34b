"""A metric is a dotted path in a student's scores: its number, how it is called, and which direction is better."""

from __future__ import annotations

from typing import Any

from cmapkd.evaluation.tasks import TASKS, Column, Headline

_LOWER = (
    "median_rank", "mean_rank", "params", "bad_samples",
    "nll", "perplexity", "bits_per_byte", "unended", "empty", "unclear", "passes_per_token",
)  # fmt: skip


def lookup(scores: Any, path: str) -> float | None:
    """The number at a dotted path of nested scores; None where there is none."""
    for key in path.split("."):
        scores = scores.get(key) if isinstance(scores, dict) else None
    return float(scores) if isinstance(scores, int | float) and not isinstance(scores, bool) else None


def metric_label(path: str) -> str:
    """`retrieval.i2t.r@5` as `i2t R@5`."""
    parts = [part for part in path.split(".") if part != "retrieval"]
    return " ".join(parts).replace("zero_shot", "zero-shot").replace("r@", "R@").replace("_", " ")


def metric_digits(path: str) -> int:
    """Decimals in which a metric is read: those of its task's headline or column, else 1."""
    for name, task in TASKS.own.items():
        numbers: list[Column | Headline] = [*task.columns]
        numbers += [task.headline] if task.headline else []
        for number in numbers:
            if f".{path}".endswith("." + ".".join((name, *number.path))):  # further test data stand before the task
                return number.digits
    return 1


def lower_is_better(path: str) -> bool:
    return path.rpartition(".")[2] in _LOWER

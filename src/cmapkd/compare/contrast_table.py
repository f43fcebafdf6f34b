"""Declared contrasts for readers and for programs: columns, notes, plain records, CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

from cmapkd.compare.verdicts import TestedContrast

HEAD = ("contrast", "metric", "difference [95 %]", "covers", "p", "p (Holm)", "smallest", "p equal (Holm)", "verdict")


def contrast_rows(contrasts: Sequence[TestedContrast], labels: Sequence[str], digits: Sequence[int]) -> list[list[str]]:
    """One row of text for each contrast, under `HEAD`.

    Args:
        labels, digits: how each contrast's metric is called, and its decimals.
    """
    return [
        [
            f"{tested.contrast.arm} − {tested.contrast.against}",
            label,
            _shown_difference(tested, places),
            "-" if tested.contrast.estimate is None else tested.contrast.estimate.covers,
            _shown_p(tested.p),
            _shown_p(tested.p_holm),
            "-" if tested.contrast.smallest is None else f"± {tested.contrast.smallest:g}",
            _shown_p(tested.p_equal_holm),
            tested.verdict,
        ]
        for tested, label, places in zip(contrasts, labels, digits, strict=True)
    ]


def contrast_notes(contrasts: Sequence[TestedContrast]) -> Iterator[str]:
    """What the verdicts mean, and why a contrast has none."""
    if not contrasts:
        return
    yield (
        f"Declared contrasts: p values are two-sided, and Holm's correction goes over all {contrasts[0].family_size} "
        "of this comparison's file. Verdicts are at 5 %. Differences that were not declared have no verdict."
    )
    if any(tested.contrast.smallest is not None for tested in contrasts):
        yield (
            "equal: the difference is within ± smallest, by two one-sided tests. A difference that is within these "
            "bounds is called equal even if it is not 0."
        )
    for tested in contrasts:
        for reason in filter(None, (tested.reason, tested.contrast.remark)):
            yield f"{tested.contrast.arm} − {tested.contrast.against}: {reason}."


def plain_contrast(tested: TestedContrast) -> dict[str, Any]:
    """A contrast as plain data for JSON."""
    contrast, estimate = tested.contrast, tested.contrast.estimate
    return {
        "arm": contrast.arm,
        "against": contrast.against,
        "metric": contrast.metric,
        "smallest": contrast.smallest,
        "seeds": [] if contrast.difference is None else list(contrast.difference.seeds),
        "difference": None if contrast.difference is None else contrast.difference.mean,
        "error": None if estimate is None else estimate.error,
        "degrees": None if estimate is None else estimate.degrees,
        "interval": None if estimate is None else list(estimate.interval),
        "covers": None if estimate is None else estimate.covers,
        "p": tested.p,
        "p_holm": tested.p_holm,
        "p_equal": tested.p_equal,
        "p_equal_holm": tested.p_equal_holm,
        "family_size": tested.family_size,
        "verdict": tested.verdict,
        "reason": tested.reason or None,
        "remark": contrast.remark or None,
    }


def contrasts_csv(tables: Sequence[tuple[str, Sequence[TestedContrast]]]) -> str:
    """One line for each contrast of each table, after a line of heads.

    Args:
        tables: titles and contrasts.
    """
    records = [{"table": title} | plain_contrast(tested) for title, contrasts in tables for tested in contrasts]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    heads = [key for key in records[0] if key != "interval"]
    place = heads.index("error")
    writer.writerow([*heads[:place], "low", "high", *heads[place:]])
    for record in records:
        low, high = record["interval"] or (None, None)
        cells = [" ".join(map(str, record[key])) if key == "seeds" else record[key] for key in heads]
        writer.writerow([*cells[:place], low, high, *cells[place:]])
    return text.getvalue()


def _shown_difference(tested: TestedContrast, digits: int) -> str:
    difference, estimate = tested.contrast.difference, tested.contrast.estimate
    if difference is None:
        return "-"
    if estimate is None:
        return f"{difference.mean:+z.{digits}f}"
    low, high = estimate.interval
    return f"{difference.mean:+z.{digits}f} [{low:+z.{digits}f}, {high:+z.{digits}f}]"


def _shown_p(p: float | None) -> str:
    if p is None:
        return "-"
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"
